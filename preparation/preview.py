"""Plot a prepared folder to check it before training: photos with captions and boxes, lengths and frequencies."""

import textwrap
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from common.files import require_writable, save_figure
from preparation.storage import SPLITS, PackedCaptions, SplitContent, read_captions, read_metadata

COLUMNS, ROWS = 6, 4
MAX_BOXES = 8  # drawn over a photo, those of the highest scores: more would hide it


def plot_preview(data_folder: str | Path) -> list[Path]:
    """Plot contact_sheet.png and words.png into a prepared folder and return their paths.

    Raises InputError if the folder is incomplete or cannot be written.
    """
    folder = Path(data_folder)
    metadata = read_metadata(folder)
    require_writable(folder)
    filled = [split for split in SPLITS if metadata["splits"][split]["images"]]
    contents = {split: read_captions(folder, split, metadata) for split in filled}
    figures = {
        folder / "contact_sheet.png": plot_photos(folder, filled[0], contents[filled[0]]),
        folder / "words.png": plot_words({split: content.captions for split, content in contents.items()}),
    }
    missing_glyphs = [save_figure(figure, path) for path, figure in figures.items()]
    if any(missing_glyphs):
        print("matplotlib's font lacks some characters: they are drawn as boxes")
    return list(figures)


def plot_photos(folder: Path, split: str, content: SplitContent) -> Figure:
    """Plot images evenly spaced over a split, each with its first two captions and the boxes of its objects."""
    captions = content.captions
    count = min(COLUMNS * ROWS, len(captions))
    indices = [i * len(captions) // count for i in range(count)]
    rows = -(-count // COLUMNS)
    figure = Figure(figsize=(2.4 * COLUMNS, 3.4 * rows), layout="constrained")
    tiles: Any = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    with h5py.File(folder / f"{split}_images.hdf5") as file:
        images: Any = file["images"]
        for tile, index in zip(tiles, indices, strict=False):
            tile.imshow(images[index].transpose(1, 2, 0))
            _plot_boxes(tile, content.objects[index][:MAX_BOXES], images.shape[-1])
            texts = [" ".join(captions.idx2word[word_id] for word_id in caption) for caption in captions[index][:2]]
            wrapped = ["\n".join(textwrap.wrap(text, 34, max_lines=3, placeholder=" ...")) for text in texts]
            tile.set_xlabel("\n\n".join(wrapped), fontsize=8, parse_math=False)
    for tile in tiles:
        tile.set(xticks=[], yticks=[], frame_on=False)
    return figure


def _plot_boxes(tile: Axes, objects: list[dict[str, Any]], size: int) -> None:
    """Draw the boxes of objects, each with its words, over an image of this size."""
    for i, item in enumerate(objects):
        left, top, right, bottom = (edge * size - 0.5 for edge in item["box"])
        tile.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color=f"C{i}", linewidth=1.2))
        label = {"facecolor": f"C{i}", "edgecolor": "none", "pad": 0.8}
        options: Any = {"color": "white", "fontsize": 5, "va": "top", "bbox": label, "clip_on": True}
        tile.text(left, top, " ".join(item["words"]), parse_math=False, **options)


def plot_words(captions: dict[str, PackedCaptions]) -> Figure:
    """Plot caption lengths by split, and for the first split the most frequent words and frequencies by rank."""
    figure = Figure(figsize=(15, 5), layout="constrained")
    lengths, frequent, ranks = figure.subplots(1, 3)
    for split, packed in captions.items():
        values, counts = np.unique(packed.lengths(), return_counts=True)
        lengths.plot(values, counts / packed.num_captions(), marker="o", markersize=3, label=split)
    lengths.set(title="caption lengths", xlabel="words", ylabel="share of captions")
    lengths.legend()
    split, packed = next(iter(captions.items()))
    counts = packed.counts()
    shown = counts.most_common(30)[::-1]
    frequent.barh(range(len(shown)), [count for _, count in shown])
    frequent.set_yticks(range(len(shown)), [word for word, _ in shown], fontsize=8, parse_math=False)
    frequent.set(title=f"most frequent of {len(counts)} words ({split})", xlabel="count")
    ranks.loglog(range(1, len(counts) + 1), sorted(counts.values(), reverse=True))
    for min_word_freq in (2, 5, 10):  # how many words --min_word_freq would keep
        kept = sum(count >= min_word_freq for count in counts.values())
        if kept:
            text, point = f"{kept} words at least {min_word_freq} times", (kept, min_word_freq)
            ranks.annotate(text, point, textcoords="offset points", xytext=(-6, -4), ha="right", va="top")
            ranks.plot(*point, "o", color="black", markersize=4)
    ranks.set(title=f"word frequency by rank ({split})", xlabel="rank", ylabel="count")
    for axes in (lengths, frequent, ranks):
        axes.grid(alpha=0.3)
    return figure
