"""Captions and scores of a whole split."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from common.distributed import all_gather, rank, world_size
from datasets import CaptionDataset, in_order, make_batches, make_loader
from decoding.captions import CaptioningModel, ImageCaption, Rerank, caption_batch
from decoding.settings import DecodingSettings
from models import Captioner
from scores.metrics import compute_metrics
from scores.pointing import attention_metrics
from utils import Runtime
from visualization.samples import NUM_PICTURES


def caption_dataset(
    captioner: CaptioningModel,
    datasets: Sequence[CaptionDataset],
    decoding: DecodingSettings,
    runtime: Runtime,
    rerank: Rerank | None = None,
    *,
    num_shown: int = 0,
) -> list[ImageCaption]:
    """Caption every image of a split with a captioner in eval mode; each process decodes its share.

    Args:
        datasets: the split as the captioner takes it; for an ensemble, one dataset for each of its `sources`.
        rerank: re-ranks the candidates of each image, as in `decoding.captions.caption_batch`.
        num_shown: first images for which all that pictures and reports show is kept: attention weights, also of all
            heads, and edges of the graph.

    Returns the captions in the split's order; with attention weights if the split has boxes to compare them with.
    """
    results: list[tuple[int, ImageCaption]] = []  # of this process
    title = f"{decoding.samples} samples" if decoding.samples else f"beam {decoding.beam_size}"
    batches = make_batches(in_order(len(datasets[0])), decoding.batch_size)
    with tqdm(total=len(datasets[0]), desc=title, unit="image", leave=False, disable=rank() > 0) as progress:
        for parts in zip(*(make_loader(dataset, batches) for dataset in datasets), strict=True):
            inputs = tuple(part.inputs for part in parts)
            is_shown = min(parts[0].indices) < num_shown
            decoded = caption_batch(
                captioner,
                inputs[0] if len(inputs) == 1 else inputs,
                decoding,
                runtime,
                boxes=parts[0].boxes,
                with_attention=datasets[0].has_boxes or is_shown,
                with_heads=is_shown,
                rerank=rerank,
            )
            for index, image in zip(parts[0].indices, decoded, strict=True):
                if index >= num_shown:
                    image = replace(image, neighbors=None, edge_weights=[], heads=None)
                results.append((index, image))
            progress.update(len(decoded) * world_size())
    return [image for _, image in sorted(all_gather(results), key=lambda result: result[0])]


def caption_split(
    captioner: CaptioningModel,
    datasets: Sequence[CaptionDataset],
    decoding: DecodingSettings,
    runtime: Runtime,
    rerank: Rerank | None = None,
    *,
    num_shown: int = 0,
) -> tuple[list[ImageCaption], dict[str, Any]]:
    """Caption a split as `caption_dataset` does; return the captions and the start of a row of scores.

    The row tells how the captions were decoded and how fast. It has `attention_metrics` if the split has boxes and the
    decoder has attention.
    """
    start = time.perf_counter()
    images = caption_dataset(captioner, datasets, decoding, runtime, rerank, num_shown=num_shown)
    seconds = time.perf_counter() - start
    row: dict[str, Any] = {"samples": decoding.samples} if decoding.samples else {"beam_size": decoding.beam_size}
    row["images_per_second"] = len(images) / seconds
    if datasets[0].has_boxes and captioner.decoder.has_attention:
        captions = [image.words for image in images]
        row |= attention_metrics(
            datasets[0].objects, captions, [image.alpha for image in images], [image.boxes for image in images]
        )
    return images, row


def evaluate(
    captioner: Captioner, dataset: CaptionDataset, decoding: DecodingSettings, runtime: Runtime
) -> tuple[dict[str, Any], list[ImageCaption]]:
    """Caption a split and score the captions; return the row of scores, and the captions.

    Puts the captioner into eval mode.
    """
    captioner.eval()
    images, row = caption_split(captioner, [dataset], decoding, runtime, num_shown=NUM_PICTURES)
    return row | compute_metrics(dataset.references.decode(), [image.words for image in images]), images
