"""Draw the diagrams of the tutorial: boxes, arrows and example captions, without a model."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from preparation.images import to_square

INK, GRAY, PALE = "#222222", "#8a8f98", "#eceef1"
IMAGE, ATTENTION, STATE, WORD = "#7a5fb0", "#e07b1a", "#2f6db5", "#3f8f55"  # the meaning of a color in every diagram


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Create a figure of width x height inches, with frameless axes over all of it, in inches."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.set(xlim=(0, width), ylim=(0, height))
    return figure, axes


def tint(color: str, strength: float = 0.16) -> tuple[float, ...]:
    """Mix a color with white."""
    return tuple(1 - strength * (1 - part) for part in to_rgb(color))


def box(
    axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str, size: float = 10, **style: Any
) -> None:
    """Draw a rounded box with text, centered at (x, y)."""
    style = {"facecolor": tint(color), "edgecolor": color, "linewidth": 1.3} | style
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle="round,pad=0,rounding_size=0.08", **style))
    if "\n" in text:
        axes.text(x, y, text, ha="center", va="center", fontsize=size, color=INK, linespacing=1.35)
    else:  # align words on one baseline, with or without descenders
        axes.text(x, y - 0.36 * size / 72, text, ha="center", va="baseline", fontsize=size, color=INK)


def arrow(axes: Axes, *points: tuple[float, float], color: str = GRAY, **style: Any) -> None:
    """Draw a line through points, with an arrowhead at the last one."""
    style = {"color": color, "linewidth": 1.5} | style
    *line, end = points
    if len(line) > 1:
        axes.plot(*zip(*line, strict=True), solid_joinstyle="round", **style)
    head = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "mutation_scale": 13} | style
    axes.annotate("", end, line[-1], arrowprops=head)


def show_image(axes: Axes, pixels: np.ndarray, x: float, y: float, width: float, height: float, **style: Any) -> None:
    """Show pixels with their lower left corner at (x, y), keeping the limits of the axes."""
    limits = axes.axis()
    axes.imshow(pixels, extent=(x, x + width, y, y + height), aspect="auto", **style)
    axes.axis(limits)


def draw_grid(axes: Axes, x: float, y: float, size: float, side: int) -> None:
    """Draw the borders of side x side regions."""
    for i in range(side + 1):
        axes.plot([x + size * i / side] * 2, [y, y + size], color="white", linewidth=0.9)
        axes.plot([x, x + size], [y + size * i / side] * 2, color="white", linewidth=0.9)


def draw_overview(photo: np.ndarray) -> Figure:
    """Draw the way from a photo to words: the encoder's grid and the decoder's loop."""
    figure, axes = canvas(10, 2.9)
    show_image(axes, photo, 0.15, 0.65, 2.4, 1.6)
    square = to_square(Image.fromarray(photo), 256, "squash").permute(1, 2, 0).numpy()
    show_image(axes, square, 3.95, 0.6, 1.7, 1.7)
    draw_grid(axes, 3.95, 0.6, 1.7, 8)
    arrow(axes, (2.65, 1.45), (3.85, 1.45), color=IMAGE)
    axes.text(3.25, 1.6, "encoder\n(a CNN)", ha="center", va="bottom", fontsize=10, color=IMAGE)
    box(axes, 7.2, 1.45, 1.5, 1.7, "decoder\n\nattend\nupdate\npredict", STATE)
    arrow(axes, (5.75, 1.75), (6.42, 1.75), color=ATTENTION)
    arrow(axes, (6.42, 1.15), (5.75, 1.15), color=ATTENTION)
    axes.text(6.08, 1.86, "regions", ha="center", fontsize=8.5, color=ATTENTION)
    axes.text(6.08, 0.9, "where?", ha="center", fontsize=8.5, color=ATTENTION)
    words = ("a", "cup", "of", "coffee", "<end>")
    for i, word in enumerate(words):
        box(axes, 9.2, 2.25 - 0.4 * i, 1.0, 0.32, word, WORD)
        arrow(axes, (7.97, 1.45), (8.66, 2.25 - 0.4 * i), color=WORD, linewidth=1)
    arrow(axes, (9.2, 0.46), (9.2, 0.22), (7.2, 0.22), (7.2, 0.57), color=WORD)
    axes.text(8.2, 0.06, "each word is the next input", ha="center", va="center", fontsize=8.5, color=WORD)
    for x, text in ((1.35, "photo"), (4.8, "8 x 8 regions"), (7.2, "one step per word"), (9.2, "caption")):
        axes.text(x, 2.62, text, ha="center", fontsize=11, color=INK, weight="bold")
    return figure


def draw_regions(photo: np.ndarray) -> Figure:
    """Draw a photo, the square that the encoder sees with its grid, and the regions as rows of a matrix."""
    figure, axes = canvas(10, 3.3)
    titles = ("photo", "256 x 256 pixels:\n8 x 8 regions", "224 x 224 pixels:\n7 x 7 regions", "regions (R, D)")
    for x, title in zip((1.3, 4.15, 6.65, 8.95), titles, strict=True):
        axes.text(x, 2.98, title, ha="center", va="center", fontsize=10.5, color=INK, weight="bold")
    show_image(axes, photo, 0.1, 0.8, 2.4, 1.6)
    arrow(axes, (2.58, 1.6), (3.0, 1.6), color=IMAGE)
    for x, side in ((3.1, 8), (5.6, 7)):
        square = to_square(Image.fromarray(photo), 32 * side, "squash").permute(1, 2, 0).numpy()
        show_image(axes, square, x, 0.55, 2.1, 2.1)
        draw_grid(axes, x, 0.55, 2.1, side)
    marked = (5.6 + 0.3 * 3, 0.55 + 0.3 * 3)  # row 3, column 3 of 7: region 24
    axes.add_patch(Rectangle(marked, 0.3, 0.3, facecolor="none", edgecolor=ATTENTION, linewidth=2.5))
    values = np.random.default_rng(0).random((49, 24)) ** 3  # made-up values, to show rows
    show_image(axes, values, 8.15, 0.55, 1.6, 2.1, cmap="Purples", interpolation="nearest")
    row = 2.65 - 2.1 * 25 / 49
    axes.add_patch(Rectangle((8.15, row), 1.6, 2.1 / 49, facecolor="none", edgecolor=ATTENTION, linewidth=2))
    arrow(axes, (marked[0] + 0.3, marked[1] + 0.15), (8.12, row + 1.05 / 49), color=ATTENTION)
    axes.text(8.95, 0.33, "D features", ha="center", va="center", fontsize=9, color=GRAY)
    axes.text(9.92, 1.6, "R rows", rotation=90, ha="center", va="center", fontsize=9, color=GRAY)
    axes.text(4.15, 0.33, "squashed, whatever the photo's shape", ha="center", va="center", fontsize=9, color=GRAY)
    return figure


def draw_show_and_tell() -> Figure:
    """Draw the decoder without attention, unrolled over five steps."""
    figure, axes = canvas(10, 2.9)
    box(axes, 0.95, 1.45, 1.5, 0.8, "mean region\n(D)", IMAGE)
    inputs, outputs = ("<start>", "a", "cup", "of", "coffee"), ("a", "cup", "of", "coffee", "<end>")
    arrow(axes, (1.7, 1.45), (2.55, 1.45), color=STATE)
    axes.text(2.12, 1.55, "$h_0, c_0$", ha="center", va="bottom", fontsize=10, color=STATE)
    for i, (before, after) in enumerate(zip(inputs, outputs, strict=True)):
        x = 3.15 + 1.5 * i
        box(axes, x, 1.45, 1.15, 0.8, f"LSTM\nstep {i + 1}", STATE)
        box(axes, x, 0.42, 1.05, 0.4, before, WORD)
        box(axes, x, 2.48, 1.05, 0.4, after, WORD)
        arrow(axes, (x, 0.62), (x, 1.05), color=WORD)
        arrow(axes, (x, 1.85), (x, 2.28), color=WORD)
        if i < 4:
            arrow(axes, (x + 0.58, 1.45), (x + 0.92, 1.45), color=STATE)
            side = {"color": WORD, "linewidth": 1.2, "linestyle": (0, (3, 2))}
            arrow(axes, (x + 0.52, 2.48), (x + 0.75, 2.48), (x + 0.75, 0.42), (x + 0.97, 0.42), **side)
    axes.text(0.95, 2.48, "predicted word", ha="center", va="center", fontsize=10, color=WORD)
    axes.text(0.95, 0.42, "previous word", ha="center", va="center", fontsize=10, color=WORD)
    return figure


def draw_decoder() -> Figure:
    """Draw one step of the decoder with attention, with shapes and equation numbers."""
    figure, axes = canvas(10.6, 4.5)
    box(axes, 0.95, 3.85, 1.5, 0.8, "state\n$h_{t-1},\\ c_{t-1}$  (H)", STATE)
    box(axes, 0.95, 2.2, 1.5, 0.8, "regions $a$\n(R, D)", IMAGE)
    box(axes, 0.95, 0.55, 1.5, 0.8, "word $y_{t-1}$", WORD)
    box(axes, 3.15, 2.2, 1.35, 0.8, "scores $e_t$\n(R)   eq. 4", ATTENTION)
    box(axes, 4.95, 2.2, 1.35, 0.8, "softmax $\\alpha_t$\n(R)   eq. 5", ATTENTION)
    box(axes, 6.75, 2.2, 1.35, 0.8, "context $z_t$\n(D)   eq. 13", ATTENTION)
    box(axes, 3.15, 0.55, 1.6, 0.8, "embedding $E y_{t-1}$\n(E)", WORD)
    box(axes, 8.75, 3.55, 1.1, 1.4, "LSTM\n\neq. 1 to 3", STATE)
    box(axes, 8.75, 0.8, 1.1, 1.3, "deep\noutput\n\neq. 7", WORD)
    arrow(axes, (1.7, 3.85), (8.2, 3.85), color=STATE)  # the state, with branches to the scores and the gate
    arrow(axes, (3.15, 3.85), (3.15, 2.6), color=STATE)
    arrow(axes, (6.5, 3.85), (6.5, 2.6), color=STATE)
    axes.text(6.42, 3.1, "gate $\\beta_t$", ha="right", va="center", fontsize=10, color=STATE)
    axes.text(3.07, 3.1, "query $W_h h_{t-1}$", ha="right", va="center", fontsize=10, color=STATE)
    arrow(axes, (1.7, 2.2), (2.48, 2.2), color=IMAGE)
    axes.text(2.08, 2.3, "keys\n$W_a a$", ha="center", va="bottom", fontsize=10, color=IMAGE)
    arrow(axes, (0.95, 1.8), (0.95, 1.4), (6.5, 1.4), (6.5, 1.8), color=IMAGE)
    arrow(axes, (3.83, 2.2), (4.28, 2.2), color=ATTENTION)
    arrow(axes, (5.63, 2.2), (6.08, 2.2), color=ATTENTION)
    arrow(axes, (7.0, 2.6), (7.0, 3.45), (8.2, 3.45), color=ATTENTION)
    arrow(axes, (7.0, 1.8), (7.0, 1.1), (8.2, 1.1), color=ATTENTION)
    arrow(axes, (1.7, 0.55), (2.35, 0.55), color=WORD)
    arrow(axes, (3.95, 0.55), (8.2, 0.55), color=WORD)
    arrow(axes, (7.75, 0.55), (7.75, 3.05), (8.2, 3.05), color=WORD)
    arrow(axes, (8.75, 2.85), (8.75, 1.45), color=STATE)
    axes.text(8.83, 2.15, "$h_t$", ha="left", va="center", fontsize=10, color=STATE)
    arrow(axes, (9.3, 3.55), (9.72, 3.55), color=STATE)
    axes.text(9.78, 3.55, "$h_t,\\ c_t$", ha="left", va="center", fontsize=11, color=STATE)
    arrow(axes, (9.3, 0.8), (9.72, 0.8), color=WORD)
    axes.text(9.78, 0.8, "$p(y_t)$\n(V)", ha="left", va="center", fontsize=11, color=WORD)
    for x, y, color in ((3.15, 3.85, STATE), (6.5, 3.85, STATE), (7.75, 0.55, WORD)):
        axes.plot(x, y, "o", markersize=4.5, color=color)
    return figure


def draw_teacher_forcing(captions: list[list[list[str]]]) -> Figure:
    """Draw the captions of one image as a matrix, and the block of unfinished captions of four images at three steps.

    Args:
        captions: of each of four images, lists of words without <start> and <end>.
    """
    ordered = [sorted(image, key=len, reverse=True) for image in captions]
    ordered.sort(key=lambda image: len(image[0]), reverse=True)
    lengths = np.array([[len(caption) + 1 for caption in image] for image in ordered])  # (B, C), <end> included
    longest = int(lengths.max())
    figure, axes = canvas(10.6, 4.6)
    axes.text(0.15, 4.38, "one image: C captions, T words to predict", fontsize=11, color=INK, weight="bold")
    width = 10.3 / longest
    for c, caption in enumerate(ordered[0]):
        for t in range(longest):
            word = [*caption, "<end>"][t] if t <= len(caption) else "<pad>"
            color = GRAY if word == "<pad>" else WORD
            style = {"facecolor": PALE, "edgecolor": "#cfd3d8"} if word == "<pad>" else {}
            x, y = 0.15 + width * (t + 0.5), 4.03 - 0.36 * c
            box(axes, x, y, width - 0.06, 0.3, word, color, size=8.5, **style)
    axes.text(0.15, 2.0, "the batch: lengths (B, C), and what step t computes", fontsize=11, color=INK, weight="bold")
    rows, columns = lengths.shape
    for panel, t in enumerate((0, 6, 9)):
        left, top, cell = 0.45 + 2.6 * panel, 1.55, 0.36
        unfinished = lengths > t
        b, c = int(unfinished.any(axis=1).sum()), int(unfinished.any(axis=0).sum())
        for i in range(rows):
            for j in range(columns):
                inside = i < b and j < c
                color = STATE if unfinished[i, j] else ATTENTION if inside else GRAY
                corner = (left + cell * j, top - cell * (i + 1))
                face = tint(color, 0.35 if inside else 0.12)
                axes.add_patch(Rectangle(corner, cell, cell, facecolor=face, edgecolor="white", linewidth=1.5))
                center = (corner[0] + cell / 2, corner[1] + cell / 2)
                axes.text(*center, lengths[i, j], ha="center", va="center", fontsize=9, color=INK if inside else GRAY)
        corner = (left, top - cell * b)
        axes.add_patch(Rectangle(corner, cell * c, cell * b, facecolor="none", edgecolor=STATE, linewidth=2.2))
        axes.text(left, top + 0.08, f"t = {t}:  [:{b}, :{c}]", fontsize=10, color=STATE)
    axes.text(0.38, top - cell * rows / 2, "B images", rotation=90, ha="right", va="center", color=GRAY)
    legend = ((STATE, 0.35, "unfinished: computed"), (ATTENTION, 0.35, "finished: computed,\nthen dropped"))
    for i, (color, strength, text) in enumerate((*legend, (GRAY, 0.12, "finished: not computed"))):
        y = top - 0.18 - 0.5 * i
        axes.add_patch(Rectangle((8.25, y - 0.13), 0.26, 0.26, facecolor=tint(color, strength)))
        axes.text(8.62, y, text, va="center", fontsize=9.5, color=INK)
    return figure
