"""Where the attention is, on scenes with known boxes."""

import math

import pytest
import torch

from modules.regions import grid_boxes
from scores.pointing import attention_metrics

CELLS = grid_boxes(2)


def pointing_accuracy(objects, captions, alphas):
    return attention_metrics(objects, captions, alphas, [CELLS] * len(objects))["pointing"]


OBJECTS = [
    {"words": ["small", "red", "circle"], "box": [0, 0, 0.5, 0.5]},
    {"words": ["large", "blue", "circle"], "box": [0.5, 0.5, 1, 1]},
    {"words": ["large", "blue", "star"], "box": [0.5, 0, 1, 0.5]},
]


@pytest.mark.parametrize(
    ("caption", "regions", "accuracy"),
    [
        ("a red circle", (3, 3, 0), 1),
        ("a blue circle", (3, 3, 0), 0),  # the color selects the other circle
        ("a pink circle", (0, 0, 3), 1),  # the color selects none: either circle counts
        ("a blue star left of a blue circle", (0, 0, 1, 0, 0, 0, 0, 1), 0.5),
        ("a red square", (0, 0, 0), 0),  # no noun of this data set
    ],
)
def test_pointing_accuracy(caption, regions, accuracy):
    alpha = torch.eye(4)[list(regions)]  # all attention on one of 2x2 regions at each word
    assert pointing_accuracy([OBJECTS], [caption.split()], [alpha]) == accuracy


def test_a_noun_that_names_no_object_is_a_miss():
    other = [{"words": ["small", "red", "square"], "box": [0, 0, 1, 1]}]
    assert pointing_accuracy([OBJECTS, other], [["a", "red", "circle"]] * 2, [torch.eye(4)[[0, 0, 0]]] * 2) == 0.5


def test_an_object_may_be_named_by_one_word():
    objects = [{"words": ["dog"], "box": [0, 0, 0.5, 0.5]}, {"words": ["red", "dog"], "box": [0.5, 0, 1, 0.5]}]
    alpha = torch.eye(4)[[0, 0]]
    assert pointing_accuracy([objects], [["a", "dog"]], [alpha]) == 1  # either dog counts
    assert pointing_accuracy([objects], [["red", "dog"]], [alpha]) == 0  # the red one is elsewhere
    assert pointing_accuracy([objects], [["dog"]], [alpha]) == 1


def test_nouns_name_detected_objects_of_their_category():
    objects = [
        {"words": ["person"], "box": [0, 0, 0.5, 0.5], "score": 0.9},
        {"words": ["sports", "ball"], "box": [0.5, 0, 1, 0.5], "score": 0.3},
        {"words": ["dog"], "box": [0, 0, 1, 1], "score": 0.2},  # too uncertain
    ]
    images = [objects, []]
    alpha = torch.eye(4)[[0, 0, 1, 1]]
    captions = [["two", "men", "women", "ball"], ["a", "man", "a", "football"]]  # the detector may have missed them
    assert pointing_accuracy(images, captions, [alpha] * 2) == pytest.approx(2 / 3)
    assert pointing_accuracy(images, [["dog"], []], [alpha] * 2) == 0  # nothing to point at


def test_correctness_is_the_weight_inside_the_boxes_and_entropy_that_of_the_weights():
    objects = [{"words": ["dog"], "box": [0, 0, 0.5, 0.5]}, {"words": ["dog"], "box": [0, 0, 1, 0.4]}]
    alpha = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.25] * 4, [0, 0, 1, 0], [1, 0, 0, 0]])
    metrics = attention_metrics([objects], [["dog", "dogs", "dog", "cat"]], [alpha], [CELLS])
    assert metrics == pytest.approx(
        {
            "pointing": 1 / 3,  # the first maximum of uniform weights is inside
            "correctness": (0.3 + 0.5 + 0) / 3,  # two boxes of the upper row: a region counts once
            "entropy": (-sum(p * math.log(p) for p in (0.1, 0.2, 0.3, 0.4)) + math.log(4)) / 3,
        }
    )
    assert attention_metrics([objects], [["cat"]], [alpha], [CELLS]) == {"pointing": 0, "correctness": 0, "entropy": 0}


def test_a_region_is_inside_where_its_center_is():
    objects = [{"words": ["dog"], "box": [0, 0, 0.5, 1]}, {"words": ["dogs"], "box": [0, 0, 1, 1]}]
    regions = torch.tensor([[0, 0, 1, 1], [0.2, 0.0, 0.7, 0.2], [0.4, 0, 1, 0.9], [0.1, 0.2, 0.11, 0.21]])
    for region, inside in enumerate((0, 1, 0, 1)):  # the whole image is inside of nothing
        alpha = torch.eye(4)[[region]]
        assert attention_metrics([objects], [["dog"]], [alpha], [regions])["pointing"] == inside
    alpha = torch.eye(4)[[0]]
    assert attention_metrics([objects[1:]], [["dogs"]], [alpha], [regions])["pointing"] == 0
