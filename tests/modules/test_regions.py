"""Regions of objects against means over the cells in their boxes."""

import pytest
import torch

from modules.regions import RegionSource, box_features, grid_boxes, has_area, pooling_weights
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
    features, region_boxes, mask = RegionSource("objects", box_features=True)(grid, boxes)
    assert mask.tolist() == [[True, True, False], [True, False, False]]
    assert features.shape == (2, 3, 3 + 5) and (features[~mask] == 0).all() and (features[mask] != 0).any(-1).all()
    torch.testing.assert_close(features[:, 0, :3], grid.mean(dim=1))  # the whole image
    assert region_boxes[:, 0].tolist() == [[0, 0, 1, 1]] * 2 and torch.equal(region_boxes[:, 1:], boxes)
    assert features[0, 1, 3:].tolist() == pytest.approx([0.1, 0.2, 0.6, 0.9, 0.35])


def test_both_are_the_cells_and_then_the_objects(grid):
    boxes = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(2)).sort(dim=-1).values[..., [0, 1, 2, 3]]
    cells, cell_boxes, no_mask = RegionSource("grid", box_features=False)(grid, None)
    objects, object_boxes, mask = RegionSource("objects", box_features=False)(grid, boxes)
    assert torch.equal(cells, grid) and no_mask is None
    both, both_boxes, both_mask = RegionSource("both", box_features=False)(grid, boxes)
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
