"""A prepared folder to look at before training: photos with their captions, lengths and word frequencies."""

import textwrap
import warnings
from pathlib import Path

import h5py
import numpy as np
from matplotlib.figure import Figure

from common.files import atomic_write, require_writable
from preparation.storage import SPLITS, read_captions, read_metadata

COLUMNS, ROWS = 6, 4


def plot_preview(data_folder):
    """Draw contact_sheet.png and words.png into a prepared folder; returns their paths. Raises InputError."""
    folder = Path(data_folder)
    metadata = read_metadata(folder)
    require_writable(folder)
    captions = {split: read_captions(folder, split)[1] for split in SPLITS if metadata["splits"][split]["images"]}
    split = next(iter(captions))
    figures = {
        folder / "contact_sheet.png": plot_photos(folder, split, captions[split]),
        folder / "words.png": plot_words(captions),
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for path, figure in figures.items():
            with atomic_write(path) as temporary:
                figure.savefig(temporary, dpi=100)
    if any("Glyph" in str(one.message) for one in caught):
        print("matplotlib's font lacks some of the letters: they are drawn as boxes")
    return list(figures)


def plot_photos(folder, split, captions):
    """A figure of photos from the beginning to the end of a split, each with its first two captions."""
    number = min(COLUMNS * ROWS, len(captions))
    chosen = [i * len(captions) // number for i in range(number)]
    rows = -(-number // COLUMNS)
    figure = Figure(figsize=(2.4 * COLUMNS, 3.4 * rows), layout="constrained")
    tiles = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    with h5py.File(folder / f"{split}_images.hdf5") as file:
        for tile, i in zip(tiles, chosen, strict=False):
            tile.imshow(file["images"][i].transpose(1, 2, 0))
            said = [" ".join(captions.words[number] for number in caption) for caption in captions[i][:2]]
            lines = ["\n".join(textwrap.wrap(one, 34, max_lines=3, placeholder=" ...")) for one in said]
            tile.set_xlabel("\n\n".join(lines), fontsize=8, parse_math=False)
    for tile in tiles:
        tile.set(xticks=[], yticks=[], frame_on=False)
    return figure


def plot_words(captions):
    """A figure of a folder's words: lengths of captions by split, the most frequent words, frequencies by rank.

    captions: {split: PackedCaptions}
    """
    figure = Figure(figsize=(15, 5), layout="constrained")
    lengths, frequent, ranks = figure.subplots(1, 3)
    for split, packed in captions.items():
        words, captions_so_long = np.unique(packed.lengths(), return_counts=True)
        lengths.plot(words, captions_so_long / packed.num_captions(), marker="o", markersize=3, label=split)
    lengths.set(title="lengths of captions", xlabel="words", ylabel="share of captions")
    lengths.legend()
    split, packed = next(iter(captions.items()))
    counts = packed.counts()
    shown = counts.most_common(30)[::-1]
    frequent.barh(range(len(shown)), [n for _, n in shown])
    frequent.set_yticks(range(len(shown)), [word for word, _ in shown], fontsize=8, parse_math=False)
    frequent.set(title=f"the most frequent of {len(counts)} words ({split})", xlabel="times")
    values = sorted(counts.values(), reverse=True)
    ranks.loglog(range(1, len(values) + 1), values)
    for least in (2, 5, 10):
        kept = sum(n >= least for n in values)
        if kept:
            note = f"{kept} words at least {least} times"
            ranks.annotate(note, (kept, least), textcoords="offset points", xytext=(-6, -4), ha="right", va="top")
            ranks.plot(kept, least, "o", color="black", markersize=4)
    ranks.set(title=f"how often each word occurs ({split})", xlabel="rank of the word", ylabel="times")
    for axes in (lengths, frequent, ranks):
        axes.grid(alpha=0.3)
    return figure
