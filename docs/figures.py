"""Draw the figures of docs/tutorial.md: python docs/figures.py

The diagrams and the figures over a photo need nothing. The others need what `make demo` leaves, data/shapes and
runs/shapes/best.pt, or, as --checkpoint, a model trained on Flickr8k. Figures that cannot be drawn are skipped with one
line each.
"""

import io
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from nltk.util import ngrams
from PIL import Image
from pycocoevalcap.meteor.meteor import Meteor
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.files import atomic_write
from evaluation.generation import DecodingSettings, caption_image
from evaluation.metrics import compute_metrics, has_java
from evaluation.pictures import plot_attention
from models import Captioner, load_captioner
from modules.beam_search import beam_search, sample
from preparation.images import load_image, to_square
from preparation.shapes import draw_scene
from preparation.storage import read_captions
from text.vocabulary import END, Vocabulary
from training.rewards import CiderReward
from utils import Runtime, choose_runtime, run_script

INK, GRAY, PALE = "#222222", "#8a8f98", "#eceef1"
IMAGE, ATTENTION, STATE, WORD = "#7a5fb0", "#e07b1a", "#2f6db5", "#3f8f55"  # what a color means in every diagram
BEAM_SCENE, ATTENTION_SCENE, SAMPLES_SCENE = 5, 77, 75  # of the test split: one shape; two shapes on white
PHOTOS = ("astronaut", "coffee", "chelsea")  # of scikit-image


@dataclass(frozen=True)
class Settings:
    """Draw the figures of docs/tutorial.md. Edit a value here or give it as flag."""

    output_folder: str = "docs/figures"  # folder of the figures
    checkpoint: str = ""  # a model trained on Flickr8k, for the photos' captions; empty leaves them out
    shapes_checkpoint: str = "runs/shapes/best.pt"  # a model trained on shapes, as make demo trains it
    data_folder: str = "data/shapes"  # the shapes, as make demo draws them


# ------------------------------------------------------------------------------------------------ drawing


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of width x height inches and axes over all of it, in inches and without a frame."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.set(xlim=(0, width), ylim=(0, height))
    return figure, axes


def save_figure(figure: Figure, path: Path, dpi: int = 110) -> None:
    """Write a figure as a PNG of 256 colors."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    picture = Image.open(buffer).convert("RGB").quantize(256, kmeans=2, dither=Image.Dither.NONE)
    with atomic_write(path) as temporary:
        picture.save(temporary, optimize=True)
    print(f"{path} ({path.stat().st_size / 1000:.0f} KB)")


def tint(color: str, strength: float = 0.16) -> tuple[float, ...]:
    """A color mixed with white."""
    return tuple(1 - strength * (1 - part) for part in to_rgb(color))


def box(
    axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str, size: float = 10, **style: Any
) -> None:
    """A rounded box around its center (x, y), with text."""
    style = {"facecolor": tint(color), "edgecolor": color, "linewidth": 1.3} | style
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle="round,pad=0,rounding_size=0.08", **style))
    if "\n" in text:
        axes.text(x, y, text, ha="center", va="center", fontsize=size, color=INK, linespacing=1.35)
    else:  # words on one line, whatever their descenders
        axes.text(x, y - 0.36 * size / 72, text, ha="center", va="baseline", fontsize=size, color=INK)


def arrow(axes: Axes, *points: tuple[float, float], color: str = GRAY, **style: Any) -> None:
    """A line through points, with a head at the last."""
    style = {"color": color, "linewidth": 1.5} | style
    *line, end = points
    if len(line) > 1:
        axes.plot(*zip(*line, strict=True), solid_joinstyle="round", **style)
    head = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "mutation_scale": 13} | style
    axes.annotate("", end, line[-1], arrowprops=head)


def show_image(axes: Axes, pixels: np.ndarray, x: float, y: float, width: float, height: float, **style: Any) -> None:
    """Pixels with their lower left corner at (x, y), without a change of the axes' limits."""
    limits = axes.axis()
    axes.imshow(pixels, extent=(x, x + width, y, y + height), aspect="auto", **style)
    axes.axis(limits)


def draw_grid(axes: Axes, x: float, y: float, size: float, side: int) -> None:
    """The borders of side x side regions."""
    for i in range(side + 1):
        axes.plot([x + size * i / side] * 2, [y, y + size], color="white", linewidth=0.9)
        axes.plot([x, x + size], [y + size * i / side] * 2, color="white", linewidth=0.9)


# ----------------------------------------------------------------------------------- diagrams and a photo


def draw_overview(photo: np.ndarray) -> Figure:
    """From a photo to words: the encoder's grid, the decoder's loop."""
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
    """A photo, the square that the encoder sees with its grid, and the regions as rows of a matrix."""
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
    values = np.random.default_rng(0).random((49, 24)) ** 3  # of no network: a drawing of rows
    show_image(axes, values, 8.15, 0.55, 1.6, 2.1, cmap="Purples", interpolation="nearest")
    row = 2.65 - 2.1 * 25 / 49
    axes.add_patch(Rectangle((8.15, row), 1.6, 2.1 / 49, facecolor="none", edgecolor=ATTENTION, linewidth=2))
    arrow(axes, (marked[0] + 0.3, marked[1] + 0.15), (8.12, row + 1.05 / 49), color=ATTENTION)
    axes.text(8.95, 0.33, "D features", ha="center", va="center", fontsize=9, color=GRAY)
    axes.text(9.92, 1.6, "R rows", rotation=90, ha="center", va="center", fontsize=9, color=GRAY)
    axes.text(4.15, 0.33, "squashed, whatever the photo's shape", ha="center", va="center", fontsize=9, color=GRAY)
    return figure


def draw_show_and_tell() -> Figure:
    """The decoder without attention, unrolled over five steps."""
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
    """One step of the decoder with attention, with shapes and the numbers of the equations."""
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
    arrow(axes, (1.7, 3.85), (8.2, 3.85), color=STATE)  # the state, and its branches to the scores and the gate
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
    """The captions of one image as a matrix, and the block of unfinished captions of four images at three steps.

    captions are four images' captions, each a list of words without <start> and <end>.
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


def draw_bleu(candidate: str, references: Sequence[str]) -> Figure:
    """Which n-grams of a candidate occur in a reference, and BLEU-4 from their shares."""
    words = candidate.split()
    scores = compute_metrics([[reference.split() for reference in references]], [words])
    figure, axes = canvas(10, 4)
    for i, reference in enumerate(references, start=1):
        axes.text(0.2, 3.95 - 0.3 * i, f"reference {i}:  {reference}", fontsize=10.5, color=GRAY)
    for i, word in enumerate(words):
        axes.text(1.5 + 0.95 * i, 2.8, word, ha="center", va="baseline", fontsize=12, color=INK, weight="bold")
    for n in range(1, 5):
        known = {gram for reference in references for gram in ngrams(reference.split(), n)}
        grams = list(ngrams(words, n))
        y = 2.95 - 0.6 * n
        axes.text(0.2, y, f"n = {n}", va="center", fontsize=10.5, color=INK)
        for i, gram in enumerate(grams):
            lift = 0.13 * (i % n - (n - 1) / 2) if n > 1 else 0
            start, end = 1.5 + 0.95 * i - 0.36, 1.5 + 0.95 * (i + n - 1) + 0.36
            color, line = (WORD, "solid") if gram in known else ("#c9cdd3", (0, (2, 1)))
            axes.plot([start, end], [y - lift] * 2, color=color, linewidth=4, linestyle=line, solid_capstyle="butt")
        hits = sum(gram in known for gram in grams)  # no n-gram of this candidate repeats, so nothing is clipped
        axes.text(8.3, y, f"$p_{n}$ = {hits} / {len(grams)}", va="center", fontsize=11.5, color=INK)
    axes.text(8.3, 2.8, f"BLEU-4 = {scores['bleu_4']:.3f}", va="baseline", fontsize=11.5, color=INK, weight="bold")
    axes.text(0.2, 2.8, "candidate", fontsize=10.5, color=INK)
    return figure


CANDIDATES = {
    "correct, in other words": "an orange cross over a yellow cross",
    "the relation is wrong": "a small orange cross below a large yellow cross",
    "a color is wrong": "a small orange cross above a large green cross",
    "correct, with half of it missing": "a small orange cross",
}


def draw_metrics(picture: np.ndarray, references: list[list[str]], all_references: list[list[list[str]]]) -> Figure:
    """Four captions of a scene under four metrics, as bars; without Java there are none for METEOR.

    all_references are the captions of many scenes, whose n-gram frequencies CIDEr takes.
    """
    reward = CiderReward(all_references)
    texts = {i: [" ".join(reference) for reference in references] for i in range(len(CANDIDATES))}
    meteor = [None] * len(CANDIDATES)
    if has_java():  # once for all: it takes seconds to start
        meteor = Meteor().compute_score(texts, {i: [text] for i, text in enumerate(CANDIDATES.values())})[1]
    names = {"bleu_4": "BLEU-4", "meteor": "METEOR", "rouge_l": "ROUGE-L", "cider": "CIDEr / 10"}
    colors = (STATE, IMAGE, WORD, ATTENTION)
    figure, axes = canvas(10, 3.9)
    show_image(axes, picture, 0.2, 1.25, 2.2, 2.2)
    axes.text(1.3, 3.62, "scene", ha="center", fontsize=11, weight="bold", color=INK)
    axes.text(1.3, 1.05, "references", ha="center", va="center", fontsize=9.5, weight="bold", color=GRAY)
    for i, reference in enumerate(references):
        axes.text(1.3, 0.86 - 0.18 * i, " ".join(reference), ha="center", va="center", fontsize=6.8, color=GRAY)
    for i, (title, caption) in enumerate(CANDIDATES.items()):
        scores = compute_metrics([references], [caption.split()]) | {"meteor": meteor[i]}
        scores["cider"] = reward(references, [caption.split()])[0] / 10
        bottom = 2.88 - 0.92 * i
        axes.text(3.0, bottom + 0.62, title, fontsize=10.5, weight="bold", color=INK)
        axes.text(3.0, bottom + 0.36, caption, fontsize=9, color=INK)
        shown = {name: score for name in names if (score := scores[name]) is not None}
        for j, (name, score) in enumerate(shown.items()):
            y = bottom + 0.78 - 0.19 * j
            axes.barh(y, 2.0 * score, left=7.35, height=0.15, color=colors[list(names).index(name)])
            axes.text(7.28, y, names[name], ha="right", va="center", fontsize=7.5, color=INK)
            axes.text(7.4 + 2.0 * score, y, f"{score:.2f}", va="center", fontsize=7.5, color=INK)
    return figure


# --------------------------------------------------------------------------- a model trained on shapes


def draw_beam_search(
    picture: np.ndarray, captioner: Captioner, vocabulary: Vocabulary, image: Tensor, beam_size: int = 3
) -> Figure:
    """The beams of a search, step by step: with max_length t it returns those that it keeps at step t."""
    regions = captioner.encode_images(image.unsqueeze(0))
    steps = []  # at each step the beams: pairs of a caption, a tuple of word ids, and its log-probability
    for t in range(1, 12):
        captions, log_probs = beam_search(captioner.decoder, regions, beam_size, max_length=t)
        beams = zip(captions[0].tolist(), log_probs[0].tolist(), strict=True)
        steps.append([(tuple(caption), log_prob) for caption, log_prob in beams])
        if bool((captions == END).any(dim=-1).all()):
            break
    spacing, left = 1.02, 2.15
    figure, axes = canvas(left + spacing * len(steps) - 0.45, 0.85 * beam_size + 0.5)
    height = figure.get_figheight()
    show_image(axes, picture, 0.1, height / 2 - 0.75, 1.2, 1.2)
    positions = {(): (1.34, height / 2 - 0.15)}
    best = steps[-1][0][0]
    kept = {caption[:t] for caption, _ in steps[-1] for t in range(len(steps) + 1)}
    for t, beams in enumerate(steps, start=1):
        axes.text(left + spacing * (t - 1), height - 0.2, f"step {t}", ha="center", fontsize=9, color=GRAY)
        for rank, (caption, score) in enumerate(beams):
            x, y = left + spacing * (t - 1), height - 0.7 - 0.85 * rank
            positions[caption] = (x, y)
            on_best = caption == best[:t]
            color = WORD if on_best else STATE if caption in kept else GRAY
            start_x, start_y = positions[caption[:-1]]
            start = (start_x + (0.41 if t > 1 else 0), start_y)
            arrow(axes, start, (x - 0.42, y), color=color, linewidth=2 if on_best else 1.1)
            word = vocabulary.idx2word[caption[-1]]
            box(axes, x, y, 0.8, 0.5, f"{word}\n{score:.2f}", color, size=8.5)
    return figure


def draw_attention_shapes(
    picture: np.ndarray, words: list[str], alpha: np.ndarray, objects: list[dict[str, Any]]
) -> Figure:
    """Attention weights at each word as they are, region by region, with the box of the object that the word names."""
    side = round(alpha.shape[1] ** 0.5)
    columns = min(6, len(words) + 1)
    rows = -(-(len(words) + 1) // columns)
    figure = Figure(figsize=(1.66 * columns, 1.95 * rows), layout="constrained")
    tiles = figure.subplots(rows, columns, squeeze=False).flatten()
    for tile in tiles:
        tile.axis("off")
    tiles[0].imshow(picture, extent=(0, 1, 1, 0))
    tiles[0].set_title("scene", fontsize=11)
    for t, (tile, word) in enumerate(zip(tiles[1:], words, strict=False)):
        tile.imshow(picture, extent=(0, 1, 1, 0), alpha=0.6)
        cover = np.zeros((side, side, 4))
        cover[..., :3] = to_rgb(ATTENTION)
        cover[..., 3] = alpha[t].reshape(side, side)
        tile.imshow(cover, extent=(0, 1, 1, 0), interpolation="nearest")
        row, column = divmod(int(alpha[t].argmax()), side)
        tile.plot((column + 0.5) / side, (row + 0.5) / side, "x", color=INK, markersize=8, markeredgewidth=2)
        tile.set_title(word, fontsize=11)
        for item in objects:
            if item["words"][-1] == word and item["words"][-2] == words[t - 1]:
                x0, y0, x1, y1 = item["box"]
                tile.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, facecolor="none", edgecolor=STATE, linewidth=2.5))
        tile.set(xlim=(0, 1), ylim=(1, 0))
    return figure


def draw_self_critical(picture: np.ndarray, captions: list[str], rewards: list[float]) -> Figure:
    """Sampled captions of one scene, their rewards, and each one's advantage over the mean of the others."""
    figure, axes = canvas(10, 0.5 * len(captions) + 0.85)
    height = figure.get_figheight()
    show_image(axes, picture, 0.15, height / 2 - 0.95, 1.7, 1.7)
    for x, title in ((2.1, "sampled caption"), (7.1, "CIDEr-D"), (8.75, "advantage")):
        align = "left" if x < 3 else "center"
        axes.text(x, height - 0.3, title, ha=align, va="center", fontsize=10.5, color=INK, weight="bold")
    axes.plot([8.75, 8.75], [0.15, height - 0.5], color=GRAY, linewidth=1)
    advantages = [reward - (sum(rewards) - reward) / (len(rewards) - 1) for reward in rewards]
    scale = 0.65 / max(1e-6, *map(abs, advantages))  # inches
    for i, (caption, reward, advantage) in enumerate(zip(captions, rewards, advantages, strict=True)):
        y = height - 0.75 - 0.5 * i
        color = WORD if advantage > 0 else ATTENTION
        axes.text(2.1, y, caption, va="center", fontsize=9.5, color=INK)
        axes.text(7.1, y, f"{reward:.2f}", ha="center", va="center", fontsize=10, color=INK)
        axes.barh(y, scale * advantage, left=8.75, height=0.26, color=color)
        text_x, align = 8.75 + scale * advantage, "left" if advantage > 0 else "right"
        axes.text(
            text_x + (0.05 if advantage > 0 else -0.05), y, f"{advantage:+.2f}", ha=align, va="center", fontsize=9
        )
    return figure


def draw_shapes_figures(settings: Settings, folder: Path, runtime: Runtime) -> None:
    """Draw what a model trained on shapes does with scenes of the test split."""
    captioner, vocabulary = load_captioner(settings.shapes_checkpoint, runtime.device)
    entries, packed = read_captions(settings.data_folder, "test")
    references = packed.decode()

    def scene(index: int) -> tuple[np.ndarray, Tensor]:
        """A scene enlarged for a figure, (256, 256, 3), and as the model sees it, (3, h, w)."""
        path = Path(settings.data_folder) / "photos" / entries[index]["image"]
        picture = Image.open(path).convert("RGB").resize((256, 256), Image.Resampling.NEAREST)
        return np.asarray(picture), torch.from_numpy(load_image(path, captioner.image_size, captioner.resize))

    beam, attention, samples = (i % len(entries) for i in (BEAM_SCENE, ATTENTION_SCENE, SAMPLES_SCENE))
    picture, image = scene(beam)
    save_figure(draw_beam_search(picture, captioner, vocabulary, image), folder / "beam_search.png")

    picture, image = scene(attention)
    caption = caption_image(captioner, vocabulary, image, DecodingSettings(beam_size=3), runtime)
    figure = draw_attention_shapes(picture, caption.words, caption.alpha.numpy(), entries[attention]["objects"])
    save_figure(figure, folder / "attention_shapes.png")

    picture, image = scene(samples)
    torch.manual_seed(2)
    regions = captioner.encode_images(image.unsqueeze(0))
    sampled = [vocabulary.decode(caption) for caption in sample(captioner.decoder, regions, 5)[0].tolist()]
    rewards = CiderReward(references)(references[samples], sampled)
    figure = draw_self_critical(picture, [" ".join(words) for words in sampled], rewards)
    save_figure(figure, folder / "self_critical.png")


# ------------------------------------------------------------------------- a model trained on Flickr8k


def draw_photos(settings: Settings, folder: Path, runtime: Runtime) -> None:
    """Caption scikit-image's photos and draw the attention at each word."""
    captioner, vocabulary = load_captioner(settings.checkpoint, runtime.device)
    for name in PHOTOS:
        photo = Image.fromarray(getattr(skimage.data, name)())
        image = to_square(photo, captioner.image_size, captioner.resize)
        caption = caption_image(captioner, vocabulary, image, DecodingSettings(beam_size=5), runtime)
        photo.thumbnail((320, 320))
        figure = plot_attention(photo, caption.words, caption.alpha.numpy())
        save_figure(figure, folder / f"photo_{name}.png", dpi=85)
        print(f"  {' '.join(caption.words)}")


def draw_diagrams(folder: Path) -> None:
    """Draw the figures that need no model."""
    photo = skimage.data.coffee()
    save_figure(draw_overview(photo), folder / "overview.png")
    save_figure(draw_regions(photo), folder / "regions.png")
    save_figure(draw_show_and_tell(), folder / "show_and_tell.png")
    save_figure(draw_decoder(), folder / "decoder.png")
    generator = random.Random(3)
    scenes = [draw_scene(generator, 64) for _ in range(400)]
    captions = [[caption.split() for caption in scene_captions] for _, scene_captions, _ in scenes]
    save_figure(draw_teacher_forcing(captions[:4]), folder / "teacher_forcing.png")
    references = ("a dog runs across the grass", "a brown dog is running on the green grass")
    save_figure(draw_bleu("a dog runs on the green grass", references), folder / "bleu.png")
    pair = next(i for i, (_, _, objects) in enumerate(scenes) if len(objects) == 2)
    picture = np.asarray(scenes[pair][0].resize((256, 256), Image.Resampling.NEAREST))
    save_figure(draw_metrics(picture, captions[pair], captions), folder / "metrics.png")


@torch.inference_mode()
def main(settings: Settings) -> None:
    """Draw all figures that can be drawn."""
    folder, runtime = Path(settings.output_folder), choose_runtime("cpu", "fp32")
    draw_diagrams(folder)
    if Path(settings.shapes_checkpoint).is_file() and Path(settings.data_folder, "dataset.json").is_file():
        draw_shapes_figures(settings, folder, runtime)
    else:
        print(
            f"skipped the figures of shapes: make demo writes {settings.shapes_checkpoint} and {settings.data_folder}"
        )
    if settings.checkpoint:
        draw_photos(settings, folder, runtime)
    else:
        print("skipped the figures of photos: give a model trained on Flickr8k as --checkpoint")


if __name__ == "__main__":
    run_script(main, Settings)
