"""Validation: its loss, the choice of the best epoch, and the line printed for each epoch."""

import torch
from torch import nn
from tqdm import tqdm

from common.distributed import all_reduce_sum, rank, world_size
from datasets import CaptionDataset, in_order, make_batches, make_loader
from models import Captioner
from training.steps import forward
from utils import Runtime


@torch.no_grad()
def validation_loss(captioner: Captioner, validation: CaptionDataset, batch_size: int, runtime: Runtime) -> float:
    """Return the mean cross-entropy of the words of all validation captions, without label smoothing."""
    captioner.eval()
    losses, count = [], 0
    progress = tqdm(total=len(validation), desc="validation loss", unit="image", leave=False, disable=rank() > 0)
    with progress as bar:
        for batch in make_loader(validation, make_batches(in_order(len(validation)), batch_size)):
            output = forward(captioner, batch, runtime)
            losses.append(nn.functional.cross_entropy(output.logits.float(), output.targets, reduction="sum"))
            count += batch.counts()[0]
            bar.update(len(batch.indices) * world_size())
    total = sum(torch.stack(losses).tolist()) if losses else 0.0  # one wait for a GPU
    total, count = all_reduce_sum([total, count])
    return total / count


def is_informative(best_metric: str, num_images: int) -> bool:
    """Return True if a metric can tell epochs apart; CIDEr of one image is 0: all images have all of its n-grams."""
    return best_metric != "cider" or num_images > 1


def epoch_key(row: dict, best_metric: str, num_images: int) -> tuple[float, ...]:
    """Return the sort key of an epoch from its row of the log; the best epoch sorts last.

    It consists of `best_metric`, the other metric and the negative loss. Scores count to the four digits that are
    printed. If the metric is not informative, the loss alone counts.
    """
    if not is_informative(best_metric, num_images):
        return (-row["val/loss"],)
    other_metric = "bleu_4" if best_metric == "cider" else "cider"
    return round(row[f"val/{best_metric}"], 4), round(row[f"val/{other_metric}"], 4), -row["val/loss"]


def describe_best(key: tuple[float, ...], best_metric: str) -> str:
    """Describe the score, or loss, in an `epoch_key`."""
    score = key[0]
    return f"{best_metric} {score:.4f}" if len(key) > 1 else f"validation loss {-score:.4f}"


def print_epoch(row: dict, improved: bool) -> None:
    """Print a row of the log as one line."""
    metric = "reward" if "train/reward" in row else "loss"
    print(
        f"epoch {row['epoch']}: {metric} {row[f'train/{metric}']:.3f}, validation loss {row['val/loss']:.3f}, "
        f"BLEU-4 {row['val/bleu_4']:.4f}, CIDEr {row['val/cider']:.4f}, {row['captions_per_second']:.0f} captions/s, "
        f"{row['seconds']:.0f} s{', best' if improved else ''}"
    )
