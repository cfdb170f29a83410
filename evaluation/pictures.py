"""Pictures of a caption: the attention at each word, and the edges of the graph that mattered for a word.

Shapes: T words of a caption, R regions of a square grid.
"""

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from skimage.transform import pyramid_expand, resize

from preparation.images import open_photo, to_square

PHOTO_SIDE = 400  # pixels of a photo's longer side in a picture


def open_for_picture(path: str | Path, resize_mode: str) -> Image.Image:
    """A photo as its pictures show it, so that the grid of regions spans it exactly.

    The image that the model sees is the whole photo where `resize_mode` is squash, otherwise its square
    (`preparation.images.to_square`).
    """
    photo = open_photo(path, PHOTO_SIDE)
    if resize_mode == "squash":
        photo.thumbnail((PHOTO_SIDE, PHOTO_SIDE))
        return photo
    return Image.fromarray(to_square(photo, PHOTO_SIDE, resize_mode).permute(1, 2, 0).numpy())


def plot_attention(photo: Image.Image, words: list[str], alpha: np.ndarray) -> Figure:
    """Plot the photo and, for each word, a tile of the photo that is bright where the attention is high.

    Args:
        words: T words; without any, the figure is just the photo.
        alpha: (T, R) attention weights; further rows are ignored.
    """
    pixels = np.asarray(photo) / 255
    side = math.isqrt(alpha.shape[1])
    columns = min(5, len(words) + 1)
    rows = math.ceil((len(words) + 1) / columns)
    tile_height = 2.3 * pixels.shape[0] / pixels.shape[1]
    figure = Figure(figsize=(2.3 * columns, (tile_height + 0.3) * rows), layout="constrained")
    tiles = figure.subplots(rows, columns, squeeze=False).flatten()
    for tile in tiles:
        tile.axis("off")
    tiles[0].imshow(pixels)
    for tile, word, word_alpha in zip(tiles[1:], words, alpha, strict=False):
        smooth = pyramid_expand(word_alpha.reshape(side, side), upscale=16, sigma=8)
        smooth = np.asarray(resize(smooth, pixels.shape[:2], order=1))
        brightness = (smooth - smooth.min()) / max(np.ptp(smooth), 1e-8)
        tile.imshow(pixels * (0.2 + 0.8 * brightness[..., None]))
        tile.set_title(word, fontsize=13)
    return figure


def plot_edges(
    photo: Image.Image, word: str, alpha: np.ndarray, edges: dict[tuple[int, int], float], max_edges: int = 30
) -> Figure:
    """Plot the photo with the edges that mattered for a word: circles show the attention, arrows the edges.

    Args:
        alpha: (R,) attention weights at the word.
        edges: shares of (source, target) edges, largest first, as `modules.graph.edge_attribution` returns them.
        max_edges: edges to draw.
    """
    side = math.isqrt(len(alpha))

    def center(region: int) -> tuple[float, float]:
        row, column = divmod(region, side)
        return (column + 0.5) / side * photo.width, (row + 0.5) / side * photo.height

    figure = Figure(figsize=(6, 6 * photo.height / photo.width + 0.4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(np.asarray(photo) / 255 * 0.6)
    axes.axis("off")
    axes.set_title(word)
    x, y = zip(*map(center, range(len(alpha))), strict=True)
    axes.scatter(x, y, s=400 * alpha / alpha.max(), color="white", alpha=0.6)
    largest = list(edges.items())[:max_edges]
    for (source, target), share in largest:
        strength = share / largest[0][1]
        arrow = {"arrowstyle": "->", "color": "orange", "linewidth": 3 * strength, "alpha": 0.3 + 0.7 * strength}
        axes.annotate("", center(target), center(source), arrowprops=arrow)
    return figure
