"""Shapes, a data set drawn here: scenes of one or two colored shapes, what is said of them, and where they are."""

import math
import random

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
RADII = {"small": 0.16, "large": 0.22}  # shares of the image's side
POSITIONS = {(0, 0): "top left", (1, 0): "top right", (0, 1): "bottom left", (1, 1): "bottom right"}  # (column, row)


def outline(kind, x, y, radius):
    """The corners of a shape around its center, `radius` from it to each side; a circle is a polygon of many."""
    third = radius / 3
    corners = {
        "circle": [(radius * math.sin(turn), radius * math.cos(turn)) for turn in np.linspace(0, 2 * math.pi, 60)],
        "square": [(-radius, -radius), (radius, -radius), (radius, radius), (-radius, radius)],
        "triangle": [(0, -radius), (radius, radius), (-radius, radius)],
        "cross": [
            (-third, -radius), (third, -radius), (third, -third), (radius, -third), (radius, third), (third, third),
            (third, radius), (-third, radius), (-third, third), (-radius, third), (-radius, -third), (-third, -third),
        ],
    }  # fmt: skip
    return [(x + dx, y + dy) for dx, dy in corners[kind]]


def draw_scene(generator, size):
    """Draw one or two shapes; returns the picture, five captions and the objects with their boxes.

    A box is left, top, right, bottom as shares of the image's side.
    """
    background = generator.choice(list(BACKGROUNDS))
    picture = Image.new("RGB", (4 * size, 4 * size), BACKGROUNDS[background])  # drawn large for smooth edges
    pencil = ImageDraw.Draw(picture)
    cells = sorted(generator.sample(list(POSITIONS), generator.choice((1, 2, 2))))
    looks = generator.sample([(color, kind) for color in COLORS for kind in KINDS], len(cells))
    things, objects = [], []
    for (column, row), (color, kind) in zip(cells, looks, strict=True):
        size_word = generator.choice(list(RADII))
        x, y = (0.26 + 0.48 * place + generator.uniform(-0.02, 0.02) for place in (column, row))
        radius = RADII[size_word]
        points = [(4 * size * px, 4 * size * py) for px, py in outline(kind, x, y, radius)]
        pencil.polygon(points, fill=COLORS[color])
        things.append((size_word, f"{color} {kind}", POSITIONS[column, row], (column, row)))
        box = [x - radius, y - radius, x + radius, y + radius]
        objects.append({"words": [size_word, color, kind], "box": box})
    picture = picture.resize((size, size), Image.Resampling.BOX)
    return picture, describe(things, background), objects


def describe(things, background):
    """Five captions of one or two shapes, given as (size, color and kind, position words, (column, row))."""
    full = [f"a {size} {name}" for size, name, _, _ in things]
    short = [f"an {name}" if name.startswith("o") else f"a {name}" for _, name, _, _ in things]
    if len(things) == 1:
        position = things[0][2]
        return [
            f"{full[0]} at the {position}",
            f"{short[0]} at the {position}",
            f"{full[0]} on {background}",
            f"{short[0]} on {background}",
            f"just {full[0]}",
        ]
    columns = [column for *_, (column, _) in things]
    if columns[0] < columns[1]:  # the cells are sorted by column
        relation, inverse = "left of", "right of"
    else:
        relation, inverse = "above", "below"
    return [
        f"{full[0]} {relation} {full[1]}",
        f"{full[1]} {inverse} {full[0]}",
        f"{full[0]} and {full[1]}",
        f"{short[0]} {relation} {short[1]}",
        f"{short[0]} and {short[1]} on {background}",
    ]


def draw_shapes(folder, scenes, size, seed):
    """Draw a data set of shapes into a folder: photos/ and dataset_shapes.json in Karpathy's format, with boxes."""
    generator = random.Random(seed)
    (folder / "photos").mkdir()
    held_out = max(1, scenes // 10)
    splits = ["train"] * scenes + ["val"] * held_out + ["test"] * held_out
    images = []
    for number, split in enumerate(tqdm(splits, desc="drawing shapes", unit="scene")):
        picture, captions, objects = draw_scene(generator, size)
        name = f"{split}_{number:05d}.png"
        picture.save(folder / "photos" / name)
        sentences = [{"tokens": caption.split(), "raw": caption} for caption in captions]
        images.append({"filename": name, "imgid": number, "split": split, "sentences": sentences, "objects": objects})
    write_json(folder / "dataset_shapes.json", {"dataset": "shapes", "images": images})
