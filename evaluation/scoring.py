"""Captions and scores of a whole split."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from common.distributed import all_gather, rank, world_size
from datasets import CaptionDataset, in_order, make_batches, make_loader
from evaluation.consensus import Consensus
from evaluation.ensemble import Ensemble
from evaluation.metrics import compute_metrics
from evaluation.pointing import attention_metrics
from models import Captioner
from modules.decoding import DecodingSettings
from modules.generation import ImageCaption, caption_batch
from utils import Runtime


def caption_dataset(
    captioner: Captioner | Ensemble,
    datasets: Sequence[CaptionDataset],
    decoding: DecodingSettings,
    runtime: Runtime,
    consensus: Consensus | None = None,
) -> list[ImageCaption]:
    """Caption every image of a split; each process decodes its share.

    Args:
        datasets: the split, as the captioner takes it; of an ensemble, as each of its `sources` takes it.

    Returns the captions in the split's order, with attention weights where it has boxes to compare them with.
    """
    captioner.eval()
    results: list[tuple[int, ImageCaption]] = []  # of this process
    title = f"{decoding.samples} samples" if decoding.samples else f"beam {decoding.beam_size}"
    batches = make_batches(in_order(len(datasets[0])), decoding.batch_size)
    with tqdm(total=len(datasets[0]), desc=title, unit="image", leave=False, disable=rank() > 0) as progress:
        for parts in zip(*(make_loader(dataset, batches) for dataset in datasets), strict=True):
            inputs, are_features = tuple(part.inputs for part in parts), [part.is_features for part in parts]
            single = isinstance(captioner, Captioner)
            decoded = caption_batch(
                captioner,
                inputs[0] if single else inputs,
                decoding,
                runtime,
                is_features=are_features[0] if single else are_features,
                boxes=parts[0].boxes,
                with_attention=datasets[0].has_boxes,
                rerank=consensus.rerank if consensus else None,
            )
            for index, image in zip(parts[0].indices, decoded, strict=True):
                results.append((index, replace(image, neighbors=None, edge_weights=[])))
            progress.update(len(decoded) * world_size())
    return [image for _, image in sorted(all_gather(results), key=lambda result: result[0])]


def evaluate(
    captioner: Captioner | Ensemble,
    datasets: Sequence[CaptionDataset],
    decoding: DecodingSettings,
    runtime: Runtime,
    *,
    meteor: bool = False,
    consensus: Consensus | None = None,
) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """Caption a split, as `caption_dataset` does, and score the captions.

    Returns a row of scores, with `attention_metrics` where the split has boxes and the decoder has attention, and the
    captions as lists of words. With a `consensus`, a row of the captions without it comes first.
    """
    start = time.perf_counter()
    images = caption_dataset(captioner, datasets, decoding, runtime, consensus)
    seconds = time.perf_counter() - start
    references = datasets[0].references.decode()
    row: dict[str, Any] = {"samples": decoding.samples} if decoding.samples else {"beam_size": decoding.beam_size}
    rows = []
    if consensus:
        captions = [image.before_consensus for image in images]
        rows.append(row | {"consensus": 0.0} | compute_metrics(references, captions, meteor))
        row["consensus"] = consensus.weight
    captions = [image.words for image in images]
    row |= compute_metrics(references, captions, meteor)
    row["images_per_second"] = len(images) / seconds
    if datasets[0].has_boxes and captioner.decoder.has_attention:
        row |= attention_metrics(
            datasets[0].objects, captions, [image.alpha for image in images], [image.boxes for image in images]
        )
    return [*rows, row], captions
