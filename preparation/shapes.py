"""The synthetic data set `shapes`: scenes of a few colored shapes, their captions and their bounding boxes."""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from common.files import write_json

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 40),
    "orange": (245, 140, 30),
    "purple": (140, 60, 170),
}
BACKGROUNDS = {"white": (245, 245, 245), "gray": (130, 130, 130), "black": (20, 20, 20)}
KINDS = ("circle", "square", "triangle", "cross")
RADII = {"small": 0.16, "large": 0.22}  # fractions of the image's side if two shapes fit beside each other
COLUMNS = {2: ("left", "right"), 3: ("left", "center", "right")}  # by the number of shapes that fit beside each other
ROWS = {2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
MAX_SHAPES = 9  # of a scene
Shape = tuple[str, str, tuple[int, int]]  # size, color and kind, (column, row)


def outline(kind: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Return the vertices of a shape that extends `radius` from its center (x, y) to each side; 60 for a circle."""
    third = radius / 3
    vertices = {
        "circle": [(radius * math.sin(angle), radius * math.cos(angle)) for angle in np.linspace(0, 2 * math.pi, 60)],
        "square": [(-radius, -radius), (radius, -radius), (radius, radius), (-radius, radius)],
        "triangle": [(0, -radius), (radius, radius), (-radius, radius)],
        "cross": [
            (-third, -radius), (third, -radius), (third, -third), (radius, -third), (radius, third), (third, third),
            (third, radius), (-third, radius), (-third, third), (-radius, third), (-radius, -third), (-third, -third),
        ],
    }  # fmt: skip
    return [(x + dx, y + dy) for dx, dy in vertices[kind]]


def draw_scene(
    generator: random.Random, size: int, num_shapes: Sequence[int] = (1, 2, 2)
) -> tuple[Image.Image, list[str], list[dict[str, Any]]]:
    """Draw a scene with one of `num_shapes` shapes; returns the picture, five captions and the objects.

    The picture has sides of `size` pixels. An object is {"words": [size, color, kind], "box": [left, top, right,
    bottom]}, with its box in fractions of the side.
    """
    side = 2 if max(num_shapes) <= 4 else 3  # shapes that fit beside each other
    scale = 2 / side
    background = generator.choice(list(BACKGROUNDS))
    picture = Image.new("RGB", (4 * size, 4 * size), BACKGROUNDS[background])  # downsampled below: smooth edges
    canvas = ImageDraw.Draw(picture)
    all_cells = [(column, row) for row in range(side) for column in range(side)]
    cells = sorted(generator.sample(all_cells, generator.choice(num_shapes)))
    colored_kinds = generator.sample([(color, kind) for color in COLORS for kind in KINDS], len(cells))
    shapes, objects = [], []
    for (column, row), (color, kind) in zip(cells, colored_kinds, strict=True):
        size_word = generator.choice(list(RADII))
        x, y = (scale * (0.26 + 0.48 * cell + generator.uniform(-0.02, 0.02)) for cell in (column, row))
        radius = scale * RADII[size_word]
        vertices = [(4 * size * px, 4 * size * py) for px, py in outline(kind, x, y, radius)]
        canvas.polygon(vertices, fill=COLORS[color])
        shapes.append((size_word, f"{color} {kind}", (column, row)))
        box = [x - radius, y - radius, x + radius, y + radius]
        objects.append({"words": [size_word, color, kind], "box": box})
    picture = picture.resize((size, size), Image.Resampling.BOX)
    if len(shapes) == 1:
        captions = describe_shape(shapes[0], background, side)
    elif len(shapes) == 2:
        captions = describe_pair(shapes, background)
    else:  # each caption relates two of them
        pairs = [describe_pair(generator.sample(shapes, 2), background) for _ in range(5)]
        captions = [generator.choice([captions[0], captions[1], captions[3]]) for captions in pairs]
    return picture, captions, objects


def names_of(size_word: str, name: str) -> tuple[str, str]:
    """Return a shape's name with article, with and without its size."""
    return f"a {size_word} {name}", f"an {name}" if name.startswith("o") else f"a {name}"


def describe_shape(shape: Shape, background: str, side: int) -> list[str]:
    """Return five captions of a single shape in a scene in which `side` shapes fit beside each other."""
    size_word, name, (column, row) = shape
    full, short = names_of(size_word, name)
    position = f"{ROWS[side][row]} {COLUMNS[side][column]}"
    return [
        f"{full} at the {position}",
        f"{short} at the {position}",
        f"{full} on {background}",
        f"{short} on {background}",
        f"just {full}",
    ]


def describe_pair(shapes: Sequence[Shape], background: str) -> list[str]:
    """Return five captions of two shapes; the first, second and fourth relate them."""
    shapes = sorted(shapes, key=lambda shape: shape[2])  # by column, those of a column by row
    (full_1, short_1), (full_2, short_2) = (names_of(size_word, name) for size_word, name, _ in shapes)
    (first_column, _), (second_column, _) = (cell for _, _, cell in shapes)
    relation, inverse = ("left of", "right of") if first_column < second_column else ("above", "below")
    return [
        f"{full_1} {relation} {full_2}",
        f"{full_2} {inverse} {full_1}",
        f"{full_1} and {full_2}",
        f"{short_1} {relation} {short_2}",
        f"{short_1} and {short_2} on {background}",
    ]


def draw_shapes(folder: Path, num_scenes: int, size: int, seed: int, num_shapes: Sequence[int] = (1, 2, 2)) -> None:
    """Draw the data set: photos/ with sides of `size` pixels, and dataset_shapes.json in Karpathy's format.

    Training has `num_scenes` scenes, val and test a tenth as many each. Each scene has one of `num_shapes` shapes.
    """
    generator = random.Random(seed)
    (folder / "photos").mkdir()
    held_out = max(1, num_scenes // 10)
    splits = ["train"] * num_scenes + ["val"] * held_out + ["test"] * held_out
    images = []
    for index, split in enumerate(tqdm(splits, desc="drawing shapes", unit="scene")):
        picture, captions, objects = draw_scene(generator, size, num_shapes)
        name = f"{split}_{index:05d}.png"
        picture.save(folder / "photos" / name)
        sentences = [{"tokens": caption.split(), "raw": caption} for caption in captions]
        images.append({"filename": name, "imgid": index, "split": split, "sentences": sentences, "objects": objects})
    write_json(folder / "dataset_shapes.json", {"dataset": "shapes", "images": images})
