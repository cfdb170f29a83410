"""Decoding captions: of one image, or of a whole split with its scores.

Shapes: T words of a caption, R regions, N neighbors of a region in the graph.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from common.distributed import all_gather, rank, world_size
from datasets import CaptionDataset, in_order, make_batches, make_loader
from evaluation.metrics import compute_metrics
from evaluation.pointing import pointing_accuracy
from models import Captioner
from modules.beam_search import beam_search, force_decode
from text.vocabulary import Vocabulary
from utils import Runtime


@dataclass(frozen=True)
class DecodingSettings:
    """How captions are decoded."""

    beam_size: int = 1  # beams per image; 1 is greedy decoding
    max_length: int = 30  # maximum words of a caption, <end> included
    length_penalty: float = 0.5  # captions are ranked by log-probability / length ** length_penalty
    batch_size: int = 32  # images decoded at once


@dataclass(frozen=True)
class ImageCaption:
    """The caption of one image and what it was decoded from, on the CPU."""

    words: list[str]
    log_prob: float
    alpha: Tensor  # (T, R) attention weights, one row more where the caption ends with <end>
    neighbors: Tensor | None  # (R, N) of the graph; None without graph layers
    edge_weights: list[Tensor]  # (R, N) of each graph layer


@torch.inference_mode()
def caption_image(
    captioner: Captioner, vocabulary: Vocabulary, image: Tensor, decoding: DecodingSettings, runtime: Runtime
) -> ImageCaption:
    """Caption one image (3, h, w) uint8 with a captioner in eval mode."""
    with runtime.autocast():
        regions, neighbors, edge_weights = captioner.encode(image.unsqueeze(0).to(runtime.device))
        captions, _ = beam_search(
            captioner.decoder, regions, decoding.beam_size, decoding.max_length, decoding.length_penalty
        )
        log_probs, alpha = force_decode(captioner.decoder, regions, captions[:, 0])
    return ImageCaption(
        words=vocabulary.decode(captions[0, 0].tolist()),
        log_prob=log_probs.item(),
        alpha=alpha[0].float().cpu(),
        neighbors=None if neighbors is None else neighbors[0].cpu(),
        edge_weights=[weights[0].float().cpu() for weights in edge_weights],
    )


def caption_dataset(
    captioner: Captioner,
    vocabulary: Vocabulary,
    dataset: CaptionDataset,
    decoding: DecodingSettings,
    runtime: Runtime,
) -> tuple[list[list[str]], list[Tensor | None]]:
    """Caption every image of a dataset; each process decodes its share.

    Returns, in the dataset's order, the captions as lists of words and the attention weights (T, R) of each, which are
    None where the dataset has no boxes to compare them with.
    """
    captioner.eval()
    results: list[tuple[int, list[str], Tensor | None]] = []  # of this process
    batches = make_batches(in_order(len(dataset)), decoding.batch_size)
    progress = tqdm(
        total=len(dataset), desc=f"beam {decoding.beam_size}", unit="image", leave=False, disable=rank() > 0
    )
    with torch.inference_mode(), progress:
        for batch in make_loader(dataset, batches):
            with runtime.autocast():
                inputs = batch.inputs.to(runtime.device, non_blocking=True)
                regions = captioner.encode_images(inputs, batch.is_features)
                decoded, _ = beam_search(
                    captioner.decoder, regions, decoding.beam_size, decoding.max_length, decoding.length_penalty
                )
                alpha = force_decode(captioner.decoder, regions, decoded[:, 0])[1] if dataset.has_boxes else None
            for b, index in enumerate(batch.indices):
                image_alpha = None if alpha is None else alpha[b].float().cpu()
                results.append((index, vocabulary.decode(decoded[b, 0].tolist()), image_alpha))
            progress.update(len(batch.indices) * world_size())
    captions: list[list[str]] = [[] for _ in range(len(dataset))]
    alphas: list[Tensor | None] = [None] * len(dataset)
    for index, caption, image_alpha in all_gather(results):
        captions[index], alphas[index] = caption, image_alpha
    return captions, alphas


def evaluate(
    captioner: Captioner,
    vocabulary: Vocabulary,
    dataset: CaptionDataset,
    decoding: DecodingSettings,
    runtime: Runtime,
    meteor: bool = False,
) -> tuple[dict[str, Any], list[list[str]]]:
    """Caption a dataset and score the captions.

    Returns a row of scores.json, with pointing accuracy where the dataset has boxes and the decoder has attention, and
    the captions as lists of words.
    """
    start = time.perf_counter()
    captions, alphas = caption_dataset(captioner, vocabulary, dataset, decoding, runtime)
    seconds = time.perf_counter() - start
    row: dict[str, Any] = {"beam_size": decoding.beam_size}
    row |= compute_metrics(dataset.references.decode(), captions, meteor)
    row["images_per_second"] = len(dataset) / seconds
    if dataset.has_boxes and captioner.decoder.has_attention:
        row["pointing"] = pointing_accuracy(dataset.entries, captions, [alpha for alpha in alphas if alpha is not None])
    return row, captions
