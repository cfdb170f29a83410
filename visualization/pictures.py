"""Pictures of a caption: the attention at each word, and the edges of the graph that mattered for a word.

Shapes: T words of a caption, R regions (cells of a square grid unless `Regions` describe them). Figures are laid out in
inches of 100 pixels.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from common.files import save_figure
from decoding.captions import CaptioningModel, ImageCaption
from modules.graph import edge_attribution
from modules.regions import RELATIONS, spatial_relations
from visualization.photos import FULL_BRIGHTNESS, MAX_FRAMES, SOFTWARE, Regions, name_regions

MAX_WIDTH, MAX_HEIGHT = 11.5, 16.0  # inches of a picture
TILE_WIDTH, TITLE_HEIGHT, GAP = 2.3, 0.42, 0.03  # inches; many tiles are narrower than TILE_WIDTH
FRAME_COLOR = "orange"
MAX_EDGES = 30  # edges without names in a picture


def plot_pictures(
    photo: Image.Image,
    caption: ImageCaption,
    captioner: CaptioningModel,
    graph_word: str,
    objects: Sequence[dict[str, Any]],
) -> dict[str, Figure]:
    """Plot the pictures of a caption by kind: "attention" and, if the caption has the graph word, "edges".

    Args:
        photo: as `open_for_picture` returns it.
        graph_word: word whose edges are plotted; "": none.
        objects: objects in the photo, which name its regions.
    """
    words = caption.words if captioner.decoder.has_attention else []
    regions = name_regions(captioner, caption, objects)
    is_grid = regions.num_cells == len(regions.boxes)
    alpha = caption.alpha.numpy()
    figures = {"attention": plot_attention(photo, words, alpha, caption.gates, None if is_grid else regions)}
    if graph_word in caption.words and caption.neighbors is not None:
        alpha = caption.alpha[caption.words.index(graph_word)]
        edges = edge_attribution(alpha, caption.neighbors, caption.edge_weights)
        relations = None
        if captioner.graph.edges == "spatial":
            relations = spatial_relations(caption.boxes.unsqueeze(0))[0].numpy()
        figures["edges"] = plot_edges(photo, graph_word, alpha.numpy(), edges, regions, relations)
    return figures


# ---------------------------------------------------------------------------------------------------- attention


def plot_attention(
    photo: Image.Image,
    words: Sequence[str],
    alpha: np.ndarray,
    gates: Sequence[float] | None = None,
    regions: Regions | None = None,
) -> Figure:
    """Plot the photo and, for each word, a tile of the photo that is bright where the attention is high.

    All tiles share one scale, relative to the uniform weight 1 / R, so uniform attention is dim everywhere. Titles
    name a word's largest weight and its gate, the weight of the image: beta of soft attention (Xu et al., 2015,
    section 4.2.1), 1 - beta of adaptive attention (Lu et al., 2017). Objects with more than the uniform weight are
    framed and named.

    Args:
        photo: as `open_for_picture` returns it.
        words: T words; if there are none, the figure is just the photo.
        alpha: (T, R) attention weights; further rows are ignored.
        gates: gates of the T words, None for a decoder without gates; further gates are ignored.
        regions: None for a grid of R cells.
    """
    aspect, title_height = photo.height / photo.width, TITLE_HEIGHT if words else 0
    columns, width = _tile_columns(len(words) + 1, aspect)
    rows, row_height = math.ceil((len(words) + 1) / columns), width * aspect + title_height
    titles = [("", f"uniform: {1 / alpha.shape[1]:.3f}" if words else "")]
    for t, word in enumerate(words):
        titles.append((word, f"max {alpha[t].max():.3f}" + ("" if gates is None else f", gate {gates[t]:.2f}")))
    pixels = np.asarray(photo.resize((round(100 * width), max(1, round(100 * width * aspect)))))
    tiles = [pixels, *(pixels * _brightness(alpha[: len(words)], pixels.shape[:2], regions)).astype(np.uint8)]
    figure = Figure(figsize=(width * columns, row_height * rows))
    axes = figure.add_axes((0, 0, 1, 1))  # shared by all tiles: axes for each would take longer than all the rest
    axes.axis("off")
    for i, (tile, (word, weights)) in enumerate(zip(tiles, titles, strict=True)):
        left, top = width * (i % columns), row_height * (i // columns)
        right, bottom = left + width - GAP, top + row_height - GAP
        axes.imshow(tile, extent=(left + GAP, right, bottom, top + title_height + GAP))
        if regions and i:
            _frame_objects(axes, alpha[i - 1], regions, (left + GAP, top + title_height + GAP, right, bottom))
        style: dict[str, Any] = {"ha": "center", "parse_math": False}  # a caption may hold $ and _
        size = min(11, 110 * width / max(1, len(word)))  # points
        axes.text(left + width / 2, top + 0.22, word, fontsize=size, **style)
        axes.text(left + width / 2, top + 0.37, weights, fontsize=min(7.5, 5 * width), color="dimgray", **style)
    axes.set(xlim=(0, width * columns), ylim=(row_height * rows, 0), aspect="auto")
    return figure


def _tile_columns(num_tiles: int, aspect: float) -> tuple[int, float]:
    """Return the number of columns and the width of tiles in inches that keep a picture within its maximum size."""
    columns, width = min(5, num_tiles), TILE_WIDTH
    while math.ceil(num_tiles / columns) * (width * aspect + TITLE_HEIGHT) > MAX_HEIGHT:
        columns += 1
        width = min(TILE_WIDTH, MAX_WIDTH / columns)
    return columns, width


def _brightness(alpha: np.ndarray, size: tuple[int, ...], regions: Regions | None) -> np.ndarray:
    """Convert attention weights (T, R) to brightness (T, *size, 1) from 0.2 to 1; size is (height, width).

    The brightness of cells is smoothed by half a cell. Objects and the whole photo are as bright as their weights.
    """
    (height, width), relative = size, alpha * alpha.shape[1]
    boxes = regions.boxes[regions.num_cells :] if regions else np.zeros((0, 4))
    side = math.isqrt(alpha.shape[1] - len(boxes))
    light = np.zeros((len(alpha), height, width))
    if side:
        cells = relative[:, : side * side].reshape(-1, side, side)
        light = _smoothing(height, side) @ cells @ _smoothing(width, side).T  # (T, height, width)
    for box, weights in zip(boxes, relative[:, side * side :].T, strict=True):
        left, top, right, bottom = np.round(box * (width, height, width, height)).astype(int)
        part = light[:, top : max(bottom, top + 1), left : max(right, left + 1)]
        np.maximum(part, weights[:, None, None], out=part)
    return 0.2 + 0.8 * np.clip(light / FULL_BRIGHTNESS, 0, 1)[..., None]


def _frame_objects(axes: Axes, alpha: np.ndarray, regions: Regions, tile: tuple[float, float, float, float]) -> None:
    """Frame and name the MAX_FRAMES objects with the largest weights alpha (R,), if these exceed the uniform weight.

    tile: left, top, right and bottom of the photo in the figure, in inches.
    """
    objects = [i for i in range(len(alpha)) if regions.is_part(i) and alpha[i] > 1 / len(alpha)]
    for i in sorted(objects, key=lambda i: -alpha[i])[:MAX_FRAMES]:
        strength = min(1.0, alpha[i] * len(alpha) / FULL_BRIGHTNESS)
        _frame(axes, regions.boxes[i], regions.names[i] or "", tile, strength)


def _frame(axes: Axes, box: np.ndarray, name: str, tile: tuple[float, float, float, float], strength: float) -> None:
    """Frame and name an object in a photo drawn at `tile`: left, top, right and bottom."""
    left, top, right, bottom = tile
    x, y = left + box[0::2] * (right - left), top + box[1::2] * (bottom - top)
    frame = Rectangle((x[0], y[0]), x[1] - x[0], y[1] - y[0], fill=False, linewidth=0.5 + 1.5 * strength)
    frame.set(edgecolor=FRAME_COLOR, alpha=0.4 + 0.6 * strength)
    axes.add_patch(frame)
    axes.text(x[0], y[0], f" {name}", fontsize=6, color=FRAME_COLOR, va="top", clip_on=True, parse_math=False)


def _smoothing(pixels: int, regions: int) -> np.ndarray:
    """Return the weights (pixels, regions) of a Gaussian mean of the regions along one side."""
    centers = (np.arange(pixels) + 0.5) / pixels * regions - 0.5
    weights = np.exp(-2 * (centers[:, None] - np.arange(regions)) ** 2)
    return weights / weights.sum(axis=1, keepdims=True)


# -------------------------------------------------------------------------------------------------------- edges


def plot_edges(
    photo: Image.Image,
    word: str,
    alpha: np.ndarray,
    edges: dict[tuple[int, int], float],
    regions: Regions,
    relations: np.ndarray | None = None,
) -> Figure:
    """Plot the photo with the edges that mattered for a word: circles show the attention, arrows the edges.

    Args:
        photo: as `open_for_picture` returns it.
        alpha: (R,) attention weights at the word.
        edges: shares of (source, target) edges, largest first, as `modules.graph.edge_attribution` returns them.
        regions: regions of the graph.
        relations: (R, R) indices into `modules.regions.RELATIONS`; names the edges of `Regions.named_edges` and
            leaves out all others.
    """
    centers = (regions.boxes[:, :2] + regions.boxes[:, 2:]) / 2 * (photo.width, photo.height)
    figure = Figure(figsize=(6, 6 * photo.height / photo.width + 0.4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(np.asarray(photo) / 255 * 0.6)
    axes.axis("off")
    axes.set_title(word, parse_math=False)
    axes.scatter(*centers.T, s=400 * alpha / alpha.max(), color="white", alpha=0.6)
    largest = list(edges.items())[:MAX_EDGES]
    if relations is not None:
        largest = regions.named_edges(edges)
    whole = (0.0, 0.0, photo.width, photo.height)
    for i, name in enumerate(regions.names):
        if regions.is_part(i) and any(i in edge for edge, _ in largest):
            _frame(axes, regions.boxes[i], name or "", whole, strength=min(1.0, alpha[i] / alpha.max()))
    for (source, target), share in largest:
        strength = share / largest[0][1]
        arrow = {"arrowstyle": "->", "color": FRAME_COLOR, "linewidth": 3 * strength, "alpha": 0.3 + 0.7 * strength}
        axes.annotate("", centers[target], centers[source], arrowprops=arrow)
        if relations is not None:
            x, y = 0.6 * centers[source] + 0.4 * centers[target]  # off the middle, where the edge back has no name
            axes.text(x, y, RELATIONS[relations[source, target]], color="white", fontsize=8, ha="center")
    return figure


def save_picture(figure: Figure, path: str | Path) -> set[str]:
    """Write a figure as a PNG that `is_our_picture` recognizes; return the characters that the font lacks."""
    # Compression level 1 takes half the time of the default; files are a sixth larger.
    return save_figure(figure, path, metadata={"Software": SOFTWARE}, pil_kwargs={"compress_level": 1})
