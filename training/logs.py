"""The log of a run as TensorBoard files and as a picture of its curves."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.files import read_jsonl, require_writable, save_figure
from utils import InputError

# The panels of curves.png: the log keys of each and the line style of each key.
PANELS = {
    "loss": {"train/loss": "-", "val/loss": "--"},
    "CIDEr": {"train/reward": "--", "val/cider": "-"},
    "validation BLEU-4": {"val/bleu_4": "-"},
}
SAMPLES = ".samples-"  # with the epoch, the suffix of TensorBoard's files of sample captions
MIN_FREE_BYTES = 2**23  # more than an epoch writes for TensorBoard


@contextlib.contextmanager
def _open_tensorboard(folder: str | Path, suffix: str = "") -> Iterator[Any]:
    """Open a new file of TensorBoard in a folder; None where the package tensorboard is not installed.

    Raises OSError where the disk is full.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        yield None
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < MIN_FREE_BYTES:  # TensorBoard's thread would print a traceback
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    with SummaryWriter(str(folder), filename_suffix=suffix) as writer:
        yield writer


def write_tensorboard(folder: str | Path, rows: list[dict]) -> None:
    """Add rows of the log to TensorBoard's files in a folder, where the package tensorboard is installed.

    Raises OSError where the disk is full.
    """
    with _open_tensorboard(folder) as writer:
        for row in rows if writer else []:
            for name in row.keys() - {"epoch"}:
                if row[name] is not None:
                    writer.add_scalar(name, row[name], row["epoch"])


def write_samples(folder: str | Path, epoch: int, draw: Callable[[], tuple[list[np.ndarray], str]]) -> None:
    """Add sample captions of an epoch to TensorBoard's files in a folder, in a file of their own.

    `draw` returns pictures (h, w, 3) uint8 and a text; it is called only where the package tensorboard is installed.
    Raises OSError where the disk is full.
    """
    with _open_tensorboard(folder, f"{SAMPLES}{epoch}") as writer:
        if writer:
            pictures, text = draw()
            for i, picture in enumerate(pictures, start=1):
                writer.add_image(f"attention/{i}", picture, epoch, dataformats="HWC")
            writer.add_text("captions", text, epoch)


def rewrite_tensorboard(folder: str | Path, rows: list[dict]) -> None:
    """Bring TensorBoard's files in a folder to these rows of the log, the only ones of the run.

    Curves are written again. Samples cannot be, they are in no log: their files stay, but for those of other epochs.
    """
    kept = {f"{SAMPLES}{row['epoch']}" for row in rows}
    for path in Path(folder).glob("events.out.tfevents.*"):
        if path.suffix not in kept:
            path.unlink()
    if rows:
        write_tensorboard(folder, rows)


def plot_curves(log_paths: Sequence[str | Path], picture_path: str | Path) -> None:
    """Plot losses and validation scores by epoch of one run or several, from their logs, training beside validation."""
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
    """Plot the curves of several runs into curves.png beside the first; returns its path.

    Raises InputError for a folder without a run.
    """
    for folder in folders:
        if not read_jsonl(Path(folder) / "log.jsonl"):
            raise InputError(f"--plot {folder}: no run there, it has no log.jsonl with an epoch")
    picture = Path(folders[0]).resolve().parent / "curves.png"
    require_writable(picture.parent)
    plot_curves([Path(folder) / "log.jsonl" for folder in folders], picture)
    return picture
