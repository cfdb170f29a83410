"""Nouns for COCO's categories."""

import pytest
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_V2_Weights

from text.nouns import COCO_CATEGORIES, IRREGULAR_PLURALS, NOUNS, nouns_of, plural


def test_categories_are_those_of_torchvision():
    expected = FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1.meta["categories"]
    assert ["__background__", *(name or "N/A" for name in COCO_CATEGORIES.split(", "))] == expected


def test_all_nouns_are_of_a_category():
    categories = COCO_CATEGORIES.split(", ")
    assert NOUNS.keys() <= set(categories)
    nouns = {noun for name in categories if name for noun in NOUNS.get(name, name.split()[-1]).split()}
    assert IRREGULAR_PLURALS.keys() <= nouns


@pytest.mark.parametrize(
    ("noun", "expected"),
    [("bus", "buses"), ("bench", "benches"), ("baby", "babies"), ("toy", "toys"), ("man", "men"), ("dog", "dogs")],
)
def test_plurals(noun, expected):
    assert plural(noun) == expected


def test_nouns_of_objects():
    assert {"woman", "people", "babies"} <= nouns_of(["person"])
    assert nouns_of(["hot", "dog"]) == {"hotdog", "hotdogs"}
    assert nouns_of(["orange"]) == set()  # in captions a color
    assert nouns_of(["small", "red", "circle"]) == {"circle", "circles"}
