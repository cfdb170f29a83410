"""Regions of objects against means over the cells in their boxes; relations of boxes placed in all directions."""

import math

import pytest
import torch

from models import ModelSettings
from modules.regions import (
    RELATIONS,
    RegionSource,
    box_features,
    grid_boxes,
    has_area,
    pairwise_geometry,
    pooling_weights,
    reverse_relations,
    spatial_relations,
)
from preparation.images import flip_boxes

SIDE = 4
NONE = [0.0, 0.0, 0.0, 0.0]


@pytest.fixture
def grid():
    return torch.rand(2, SIDE * SIDE, 3, generator=torch.Generator().manual_seed(0))


def test_a_box_of_whole_cells_is_the_mean_of_them(grid):
    boxes = torch.tensor([[[0.25, 0.0, 0.75, 1.0], [0.0, 0.0, 1.0, 1.0], [0.5, 0.75, 0.75, 1.0]]]).expand(2, -1, -1)
    pooled = pooling_weights(boxes, SIDE) @ grid
    cells = grid.unflatten(1, (SIDE, SIDE))
    torch.testing.assert_close(pooled[:, 0], cells[:, :, 1:3].mean(dim=(1, 2)))
    torch.testing.assert_close(pooled[:, 1], grid.mean(dim=1))
    torch.testing.assert_close(pooled[:, 2], cells[:, 3, 2])


def test_any_box_has_weights_that_sum_to_one_and_lie_around_it():
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(1, 200, 2, 2, generator=generator).sort(dim=2).values
    boxes = corners.flatten(2)[has_area(corners.flatten(2))].unsqueeze(0)
    weights = pooling_weights(boxes, SIDE)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, boxes.shape[1]))
    cells = grid_boxes(SIDE)
    centers = torch.stack([cells[:, 0::2].mean(1), cells[:, 1::2].mean(1)], dim=1)  # (R, 2)
    left_top, right_bottom = boxes[0, :, None, :2], boxes[0, :, None, 2:]
    far = ((centers < left_top - 1 / SIDE) | (centers > right_bottom + 1 / SIDE)).any(-1)
    inner = ((centers > 1 / 2 / SIDE) & (centers < 1 - 1 / 2 / SIDE)).all(-1)  # those at the edge stand for what is out
    assert (weights[0][far & inner] == 0).all()
    middle = torch.einsum("nr,rd->nd", weights[0], centers)
    assert ((middle - (boxes[0, :, :2] + boxes[0, :, 2:]) / 2).abs() <= 0.5 / SIDE + 1e-6).all()


def test_no_box_has_no_weights_and_is_masked(grid):
    boxes = torch.tensor([[[0.1, 0.2, 0.6, 0.9], NONE], [NONE, NONE]])
    features, region_boxes, mask = RegionSource(ModelSettings(regions="objects", box_features=True))(grid, boxes)
    assert mask.tolist() == [[True, True, False], [True, False, False]]
    assert features.shape == (2, 3, 3 + 5) and (features[~mask] == 0).all() and (features[mask] != 0).any(-1).all()
    torch.testing.assert_close(features[:, 0, :3], grid.mean(dim=1))  # the whole image
    assert region_boxes[:, 0].tolist() == [[0, 0, 1, 1]] * 2 and torch.equal(region_boxes[:, 1:], boxes)
    assert features[0, 1, 3:].tolist() == pytest.approx([0.1, 0.2, 0.6, 0.9, 0.35])


def test_both_are_the_cells_and_then_the_objects(grid):
    boxes = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(2)).sort(dim=-1).values[..., [0, 1, 2, 3]]
    cells, cell_boxes, no_mask = RegionSource(ModelSettings(regions="grid"))(grid, None)
    objects, object_boxes, mask = RegionSource(ModelSettings(regions="objects"))(grid, boxes)
    assert torch.equal(cells, grid) and no_mask is None
    both, both_boxes, both_mask = RegionSource(ModelSettings(regions="both"))(grid, boxes)
    torch.testing.assert_close(both, torch.cat([cells, objects], dim=1))
    assert torch.equal(both_boxes, torch.cat([cell_boxes, object_boxes], dim=1))
    assert both_mask[:, :16].all() and torch.equal(both_mask[:, 16:], mask)


def test_the_boxes_of_a_grid_are_its_cells_row_by_row():
    boxes = grid_boxes(2)
    assert boxes.tolist() == [[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]]
    assert box_features(boxes)[:, 4].tolist() == [0.25] * 4


def test_flipped_boxes_pool_the_flipped_grid(grid):
    boxes = torch.tensor([[[0.1, 0.2, 0.6, 0.9], [0.0, 0.0, 0.3, 0.3], NONE]]).expand(2, -1, -1)
    flipped = grid.unflatten(1, (SIDE, SIDE)).flip(2).flatten(1, 2)
    pooled = pooling_weights(flip_boxes(boxes), SIDE) @ flipped
    torch.testing.assert_close(pooled, pooling_weights(boxes, SIDE) @ grid)
    assert has_area(flip_boxes(boxes)).tolist() == [[True, True, False]] * 2


def box_around(x, y, side=0.1):
    return [x - side / 2, y - side / 2, x + side / 2, y + side / 2]


def relation(first, second):
    """The relation of two boxes, and that of the second to the first."""
    found = spatial_relations(torch.tensor([[first, second]]))[0]
    assert found[0, 0] == found[1, 1] == 0
    return found[0, 1].item(), found[1, 0].item()


@pytest.mark.parametrize("degrees", [1, 20, 44, 46, 70, 89, 91, 134, 136, 179, 181, 224, 226, 269, 271, 314, 316, 359])
def test_directions_between_the_axes(degrees):
    x, y = 0.3 * math.cos(math.radians(degrees)), -0.3 * math.sin(math.radians(degrees))  # y is downward
    number = math.ceil(degrees / 45) + 3
    assert relation(box_around(0.5, 0.5), box_around(0.5 + x, 0.5 + y)) == (number, (number - 4 + 4) % 8 + 4)
    side = "left of" if x > abs(y) else "right of" if -x > abs(y) else "below" if y < 0 else "above"
    assert RELATIONS[number] == side


@pytest.mark.parametrize(
    ("x", "y", "number"),
    [(1, 0, 11), (1, -1, 4), (0, -1, 5), (-1, -1, 6), (-1, 0, 7), (-1, 1, 8), (0, 1, 9), (1, 1, 10)],
)
@pytest.mark.parametrize("distance", [0.25, 0.2, 0.125])
def test_directions_on_the_axes_and_diagonals_belong_to_the_smaller_angle(x, y, number, distance):
    """0 degrees count as 360, and 45 as the end of the first eighth."""
    found = relation(box_around(0.5, 0.5, 0.0625), box_around(0.5 + x * distance, 0.5 + y * distance, 0.0625))
    assert found == (number, (number - 4 + 4) % 8 + 4)


def test_boxes_in_each_other_and_overlapping_boxes():
    large, small = [0.1, 0.1, 0.9, 0.9], [0.2, 0.3, 0.4, 0.5]
    assert relation(large, small) == (1, 2) and relation(small, large) == (2, 1)
    assert relation([0, 0, 1, 1], [0, 0, 0.5, 1]) == (1, 2)  # with an edge in common
    assert relation([0, 0, 1, 1], [0, 0, 0.9, 1]) == (1, 2)  # inside comes before overlap
    assert relation([0.0, 0, 0.6, 1], [0.2, 0, 0.8, 1]) == (3, 3)  # 0.4 of 0.8
    assert relation([0.0, 0, 0.6, 1], [0.21, 0, 0.81, 1]) == (11, 7)  # a little less
    assert relation(small, small) == (3, 3)


def test_far_boxes_and_padding_have_no_relation():
    assert relation(box_around(0.1, 0.1), box_around(0.9, 0.9)) == (0, 0)
    assert relation(box_around(0.1, 0.1), box_around(0.59, 0.59)) != (0, 0)  # 0.69 apart, half a diagonal is 0.71
    assert relation(box_around(0.5, 0.5), [0, 0, 0, 0]) == (0, 0)
    assert relation([0, 0, 0, 0], [0, 0, 0, 0]) == (0, 0)


def test_reversing_twice_changes_nothing_and_reversing_is_the_relation_of_the_other():
    numbers = torch.arange(len(RELATIONS))
    assert torch.equal(reverse_relations(reverse_relations(numbers)), numbers)
    boxes = torch.rand(2, 12, 2, 2, generator=torch.Generator().manual_seed(0)).sort(dim=2).values.flatten(2)
    found = spatial_relations(boxes)
    assert torch.equal(reverse_relations(found), found.transpose(1, 2)) and len(found.unique()) == len(RELATIONS)


def test_geometry_is_the_embedding_of_four_numbers():
    boxes = torch.tensor([[[0.1, 0.2, 0.5, 0.4], [0.3, 0.2, 0.4, 1.0], [0.1, 0.2, 0.5, 0.4]]])
    found = pairwise_geometry(boxes)
    assert found.shape == (1, 3, 3, 64)
    for m, n in ((0, 1), (1, 0), (0, 2), (1, 1)):
        (left, top, right, bottom), (left_n, top_n, right_n, bottom_n) = boxes[0, m].tolist(), boxes[0, n].tolist()
        width, height = right - left, bottom - top
        numbers = [
            math.log(max(abs((left + right - left_n - right_n) / 2) / width, 1e-3)),
            math.log(max(abs((top + bottom - top_n - bottom_n) / 2) / height, 1e-3)),
            math.log(width / (right_n - left_n)),
            math.log(height / (bottom_n - top_n)),
        ]
        angles = [100 * number / 1000 ** (k / 8) for number in numbers for k in range(8)]
        expected = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        assert found[0, m, n].tolist() == pytest.approx(expected, abs=1e-3)
