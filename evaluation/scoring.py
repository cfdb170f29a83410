"""Captions and scores of a whole split.

Shapes: T words of a caption, R regions.
"""

import time
from typing import Any

from torch import Tensor
from tqdm import tqdm

from common.distributed import all_gather, rank, world_size
from datasets import CaptionDataset, in_order, make_batches, make_loader
from evaluation.generation import DecodingSettings, caption_images
from evaluation.metrics import compute_metrics
from evaluation.pointing import pointing_accuracy
from models import Captioner
from text.vocabulary import Vocabulary
from utils import Runtime


def caption_dataset(
    captioner: Captioner,
    vocabulary: Vocabulary,
    dataset: CaptionDataset,
    decoding: DecodingSettings,
    runtime: Runtime,
) -> tuple[list[list[str]], list[Tensor]]:
    """Caption every image of a dataset; each process decodes its share.

    Returns, in the dataset's order, the captions as lists of words and the attention weights (T, R) of each, with T = 0
    where the dataset has no boxes to compare them with.
    """
    captioner.eval()
    results: list[tuple[int, list[str], Tensor]] = []  # of this process
    batches = make_batches(in_order(len(dataset)), decoding.batch_size)
    progress = tqdm(
        total=len(dataset), desc=f"beam {decoding.beam_size}", unit="image", leave=False, disable=rank() > 0
    )
    with progress:
        for batch in make_loader(dataset, batches):
            decoded = caption_images(
                captioner,
                vocabulary,
                batch.inputs,
                decoding,
                runtime,
                is_features=batch.is_features,
                with_attention=dataset.has_boxes,
            )
            for index, image in zip(batch.indices, decoded, strict=True):
                results.append((index, image.words, image.alpha.clone()))  # a pickled view holds the whole batch
            progress.update(len(batch.indices) * world_size())
    results = sorted(all_gather(results), key=lambda result: result[0])
    return [words for _, words, _ in results], [alpha for _, _, alpha in results]


def evaluate(
    captioner: Captioner,
    vocabulary: Vocabulary,
    dataset: CaptionDataset,
    decoding: DecodingSettings,
    runtime: Runtime,
    meteor: bool = False,
) -> tuple[dict[str, Any], list[list[str]]]:
    """Caption a dataset and score the captions.

    Returns a row of scores, with pointing accuracy where the dataset has boxes and the decoder has attention, and
    the captions as lists of words.
    """
    start = time.perf_counter()
    captions, alphas = caption_dataset(captioner, vocabulary, dataset, decoding, runtime)
    seconds = time.perf_counter() - start
    row: dict[str, Any] = {"beam_size": decoding.beam_size}
    row |= compute_metrics(dataset.references.decode(), captions, meteor)
    row["images_per_second"] = len(dataset) / seconds
    if dataset.has_boxes and captioner.decoder.has_attention:
        row["pointing"] = pointing_accuracy(dataset.entries, captions, alphas)
    return row, captions
