"""The log of a run: its best epoch, a printed line for each epoch, TensorBoard files and curves."""

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from common.files import read_jsonl, require_writable, save_figure
from utils import InputError

# Panels of curves.png: the log keys in each, with their line styles.
PANELS = {
    "loss": {"train/loss": "-", "val/loss": "--"},
    "CIDEr": {"train/reward": "--", "val/cider": "-"},
    "validation BLEU-4": {"val/bleu_4": "-"},
}
EPOCH_SUFFIX = ".epoch-"  # followed by the epoch, the suffix of a TensorBoard file
MIN_FREE_BYTES = 2**23  # more than TensorBoard writes in an epoch


def is_informative(best_metric: str, num_images: int) -> bool:
    """Return True if a metric can tell epochs apart; CIDEr is always 0 for a single image."""
    return best_metric != "cider" or num_images > 1


def epoch_key(row: dict, best_metric: str, num_images: int) -> tuple[float, ...]:
    """Return the sort key of an epoch from its row of the log; the best epoch sorts last.

    It consists of `best_metric`, the other metric and the negative loss. Scores are rounded to the four digits that are
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


def write_tensorboard(folder: Path, row: dict, draw: Callable[[], tuple[list[np.ndarray], str]]) -> None:
    """Write an epoch's row of the log and its sample captions to a TensorBoard file, if tensorboard is installed.

    `draw` returns pictures (h, w, 3) uint8 and a text; it is not called without tensorboard. Raises OSError if the disk
    is full.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < MIN_FREE_BYTES:  # TensorBoard's thread would print a traceback
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    epoch = row["epoch"]
    pictures, text = draw()
    with SummaryWriter(str(folder), filename_suffix=f"{EPOCH_SUFFIX}{epoch}") as writer:
        for name in row.keys() - {"epoch"}:
            if row[name] is not None:
                writer.add_scalar(name, row[name], epoch)
        for i, picture in enumerate(pictures, start=1):
            writer.add_image(f"attention/{i}", picture, epoch, dataformats="HWC")
        writer.add_text("captions", text, epoch)


def prune_tensorboard(folder: Path, epoch: int) -> None:
    """Remove TensorBoard's files of epochs after `epoch`, which a resumed or overwritten run trains again."""
    kept = {f"{EPOCH_SUFFIX}{kept_epoch}" for kept_epoch in range(1, epoch + 1)}
    for path in folder.glob("events.out.tfevents.*"):
        if path.suffix not in kept:
            path.unlink()


def plot_curves(log_paths: Sequence[str | Path], picture_path: str | Path) -> None:
    """Plot the losses and validation scores of one or several runs by epoch, from their logs."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    figure = Figure(figsize=(12, 3.5), layout="constrained")
    for axes, (title, styles) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for i, path in enumerate(log_paths):
            rows, run = read_jsonl(path), Path(path).parent.name
            for name, style in styles.items():
                points = [(row["epoch"], row[name]) for row in rows if name in row]
                if points:
                    label = f"{run} {name}" if len(log_paths) > 1 else name
                    axes.plot(*zip(*points, strict=True), style, marker="o", markersize=3, color=f"C{i}", label=label)
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)
    save_figure(figure, picture_path)


def plot_runs(folders: Sequence[str]) -> Path:
    """Plot the curves of several runs into curves.png beside the first run folder; return its path.

    Raises InputError for a folder without a run.
    """
    for folder in folders:
        if not read_jsonl(Path(folder) / "log.jsonl"):
            raise InputError(f"--plot {folder}: no run there, it has no log.jsonl with an epoch")
    picture = Path(folders[0]).resolve().parent / "curves.png"
    require_writable(picture.parent)
    plot_curves([Path(folder) / "log.jsonl" for folder in folders], picture)
    return picture
