"""The shapes data set: deterministic, with boxes around its shapes and captions of what is drawn."""

import json
import random

import numpy as np
import pytest
from PIL import Image

from benchmarks.relation_accuracy import judge
from preparation.shapes import (
    BACKGROUNDS,
    COLORS,
    KINDS,
    RADII,
    describe_pair,
    describe_shape,
    draw_scene,
    draw_shapes,
)

SIZE = 64


@pytest.fixture
def drawn(tmp_path):
    """A folder of 20 training, 2 val and 2 test scenes."""
    draw_shapes(tmp_path, 20, SIZE, seed=3)
    return tmp_path


def read_images(folder):
    return json.loads((folder / "dataset_shapes.json").read_text())["images"]


def test_a_seed_always_draws_the_same(drawn, tmp_path):
    (tmp_path / "again").mkdir()
    draw_shapes(tmp_path / "again", 20, SIZE, seed=3)
    names = ["dataset_shapes.json", *(f"photos/{image['filename']}" for image in read_images(drawn))]
    assert [image["split"] for image in read_images(drawn)] == ["train"] * 20 + ["val"] * 2 + ["test"] * 2
    for name in names:
        assert (drawn / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_boxes_hold_the_shapes(drawn):
    for image in read_images(drawn):
        pixels = np.asarray(Image.open(drawn / "photos" / image["filename"])).astype(int)
        background = pixels[0, 0]
        inside = np.zeros(pixels.shape[:2], bool)
        for item in image["objects"]:
            left, top, right, bottom = (round(SIZE * side) for side in item["box"])
            assert (pixels[top:bottom, left:right] != background).any()
            inside[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1] = True
        assert (pixels[~inside] == background).all(), image["filename"]


def test_captions_name_the_shapes(drawn):
    for image in read_images(drawn):
        assert len(image["sentences"]) == 5
        for item in image["objects"]:
            size, color, kind = item["words"]
            assert size in RADII and color in COLORS and kind in KINDS
            assert sum(kind in sentence["tokens"] for sentence in image["sentences"]) >= 4


def test_colors_are_those_of_the_captions():
    for seed in range(20):
        picture, captions, objects = draw_scene(random.Random(seed), 32)
        (background,) = {word for caption in captions for word in caption.split() if word in BACKGROUNDS}
        assert picture.getpixel((0, 0)) == BACKGROUNDS[background]
        for item in objects:
            left, top, right, bottom = (32 * side for side in item["box"])
            center = (int((left + right) / 2), int((top + bottom) / 2))
            assert picture.getpixel(center) == COLORS[item["words"][1]]


@pytest.mark.parametrize(
    ("first", "second", "relation", "inverse"),
    [((0, 1), (1, 0), "left of", "right of"), ((1, 0), (1, 1), "above", "below")],
)
def test_relations(first, second, relation, inverse):
    shapes = [("small", "red cross", first), ("large", "orange square", second)]
    assert describe_pair(shapes, "gray") == describe_pair(shapes[::-1], "gray")
    assert describe_pair(shapes, "gray") == [
        f"a small red cross {relation} a large orange square",
        f"a large orange square {inverse} a small red cross",
        "a small red cross and a large orange square",
        f"a red cross {relation} an orange square",
        "a red cross and an orange square on gray",
    ]


@pytest.mark.parametrize(
    ("side", "cell", "position"),
    [(2, (0, 0), "top left"), (2, (1, 1), "bottom right"), (3, (1, 1), "middle center"), (3, (2, 0), "top right")],
)
def test_one_shape_is_described_by_its_position(side, cell, position):
    captions = describe_shape(("small", "red cross", cell), "gray", side)
    assert captions[1] == f"a red cross at the {position}" and captions[3] == "a red cross on gray"


def test_many_shapes_are_apart_and_captions_relate_two_of_them():
    counts = set()
    for seed in range(60):
        _, captions, objects = draw_scene(random.Random(seed), 16, num_shapes=(4, 6, 9))
        counts.add(len(objects))
        assert len({tuple(item["words"][1:]) for item in objects}) == len(objects)
        boxes = np.array([item["box"] for item in objects])
        assert boxes.min() >= 0 and boxes.max() <= 1
        for i in range(len(boxes)):
            for j in range(i):
                overlap = np.minimum(boxes[i, 2:], boxes[j, 2:]) - np.maximum(boxes[i, :2], boxes[j, :2])
                assert overlap.min() <= 0
        judged = [judge(caption, objects) for caption in captions]
        assert judged == [(True, True)] * 5
    assert counts == {4, 6, 9}


def test_relations_that_are_not_there_are_false():
    objects = [
        {"words": ["small", "red", "cross"], "box": [0.1, 0.1, 0.2, 0.2]},
        {"words": ["large", "blue", "circle"], "box": [0.6, 0.5, 0.8, 0.7]},
    ]
    assert judge("a red cross left of a large blue circle", objects) == (True, True)
    assert judge("a red cross above a blue circle", objects) == (True, False)  # it is, but columns come first
    assert judge("a large red cross left of a blue circle", objects) == (False, False)  # it is small
    assert judge("a red cross left of a red cross", objects) == (False, False)
    assert judge("a red cross and a blue circle on gray", objects) is None
