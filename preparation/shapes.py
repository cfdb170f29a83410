"""Shapes, a synthetic data set: scenes of one or two colored shapes, their captions and their bounding boxes."""

import math
import random
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
RADII = {"small": 0.16, "large": 0.22}  # as fractions of the image's side
POSITIONS = {(0, 0): "top left", (1, 0): "top right", (0, 1): "bottom left", (1, 1): "bottom right"}  # (column, row)


def outline(kind: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """The vertices of a shape that reaches `radius` from its center (x, y) to each side; a circle has 60 of them."""
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


def draw_scene(generator: random.Random, size: int) -> tuple[Image.Image, list[str], list[dict[str, Any]]]:
    """Draw one or two shapes; returns the picture of `size` pixels a side, five captions and the objects.

    An object is {"words": [size, color, kind], "box": [left, top, right, bottom]}, its box in fractions of the side.
    """
    background = generator.choice(list(BACKGROUNDS))
    picture = Image.new("RGB", (4 * size, 4 * size), BACKGROUNDS[background])  # downsampled below: smooth edges
    canvas = ImageDraw.Draw(picture)
    cells = sorted(generator.sample(list(POSITIONS), generator.choice((1, 2, 2))))
    colored_kinds = generator.sample([(color, kind) for color in COLORS for kind in KINDS], len(cells))
    shapes, objects = [], []
    for (column, row), (color, kind) in zip(cells, colored_kinds, strict=True):
        size_word = generator.choice(list(RADII))
        x, y = (0.26 + 0.48 * cell + generator.uniform(-0.02, 0.02) for cell in (column, row))
        radius = RADII[size_word]
        vertices = [(4 * size * px, 4 * size * py) for px, py in outline(kind, x, y, radius)]
        canvas.polygon(vertices, fill=COLORS[color])
        shapes.append((size_word, f"{color} {kind}", (column, row)))
        box = [x - radius, y - radius, x + radius, y + radius]
        objects.append({"words": [size_word, color, kind], "box": box})
    picture = picture.resize((size, size), Image.Resampling.BOX)
    return picture, describe(shapes, background), objects


def describe(shapes: list[tuple[str, str, tuple[int, int]]], background: str) -> list[str]:
    """Five captions of one or two shapes, given as (size, color and kind, (column, row)), sorted by column."""
    full = [f"a {size} {name}" for size, name, _ in shapes]
    short = [f"an {name}" if name.startswith("o") else f"a {name}" for _, name, _ in shapes]
    if len(shapes) == 1:
        position = POSITIONS[shapes[0][2]]
        return [
            f"{full[0]} at the {position}",
            f"{short[0]} at the {position}",
            f"{full[0]} on {background}",
            f"{short[0]} on {background}",
            f"just {full[0]}",
        ]
    (first_column, _), (second_column, _) = (cell for _, _, cell in shapes)
    relation, inverse = ("left of", "right of") if first_column < second_column else ("above", "below")
    return [
        f"{full[0]} {relation} {full[1]}",
        f"{full[1]} {inverse} {full[0]}",
        f"{full[0]} and {full[1]}",
        f"{short[0]} {relation} {short[1]}",
        f"{short[0]} and {short[1]} on {background}",
    ]


def draw_shapes(folder: Path, num_scenes: int, size: int, seed: int) -> None:
    """Draw the data set into a folder: photos/ of `size` pixels a side and dataset_shapes.json in Karpathy's format.

    num_scenes are for training; val and test have a tenth as many each.
    """
    generator = random.Random(seed)
    (folder / "photos").mkdir()
    held_out = max(1, num_scenes // 10)
    splits = ["train"] * num_scenes + ["val"] * held_out + ["test"] * held_out
    images = []
    for index, split in enumerate(tqdm(splits, desc="drawing shapes", unit="scene")):
        picture, captions, objects = draw_scene(generator, size)
        name = f"{split}_{index:05d}.png"
        picture.save(folder / "photos" / name)
        sentences = [{"tokens": caption.split(), "raw": caption} for caption in captions]
        images.append({"filename": name, "imgid": index, "split": split, "sentences": sentences, "objects": objects})
    write_json(folder / "dataset_shapes.json", {"dataset": "shapes", "images": images})
