"""The regions of an image, from a grid, from objects or from region features, and their spatial relations.

Shapes: B images, S x S cells of the grid, F features of a cell, N boxes of an image, R regions. A box is (left, top,
right, bottom) in fractions of the image's sides; padding is a box without area.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import roi_align

if TYPE_CHECKING:
    from models import ModelSettings

REGIONS = ("grid", "objects", "both", "features")
BOX_FEATURES = 5
NO_RELATION = 0
# Relation of a region to another one, numbered as by Yao et al., 2018; 1 means that the other one is inside it.
# 4 to 11 are the directions of the other one's center, an eighth of a turn each, counterclockwise from the right.
RELATIONS = (
    "", "around", "inside", "overlaps",
    "left of", "below", "below", "right of", "right of", "above", "above", "left of",
)  # fmt: skip
GEOMETRY_FEATURES = 64
SMALLEST_DISTANCE = 1e-3  # of centers, in units of a region's side, so that its logarithm is finite


class RegionSource(nn.Module):
    """Choice of the regions: cells of the encoder's grid, objects, or regions of a detector.

    "grid": the cells. "objects": the whole image, then its objects. The features of each are the mean of the grid in
    its box, similar to the regions of "Bottom-Up and Top-Down Attention" (Anderson et al., 2018). "both": the cells,
    then the whole image and the objects. "features": region features that a detector has computed; there is no grid.

    Args:
        settings: regions, and box_features to append `box_features` to the features of each region.
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.regions, self.box_features = settings.regions, settings.box_features

    @property
    def uses_objects(self) -> bool:
        """True if the boxes of objects are needed."""
        return self.regions in ("objects", "both")

    @property
    def uses_region_features(self) -> bool:
        """True if region features with their boxes are needed."""
        return self.regions == "features"

    def forward(self, grid: Tensor, boxes: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return features, boxes and mask of the regions.

        Args:
            grid: (B, S * S, F) in row-major order, or region features (B, N, F).
            boxes: (B, N, 4) of objects or region features; None if there are none.

        Returns:
            Features (B, R, F), or F + 5 with box features, boxes (B, R, 4), and a mask (B, R), False for padding;
            None: all images have R regions.
        """
        if self.uses_region_features:
            assert boxes is not None, "region features need their boxes"
            return self._with_boxes(grid, boxes), boxes, has_area(boxes)
        side = round(grid.shape[1] ** 0.5)
        cells = grid_boxes(side, grid.device).expand(len(grid), -1, -1)
        if not self.uses_objects:
            return self._with_boxes(grid, cells), cells, None
        assert boxes is not None, "a model of objects needs their boxes"
        whole = torch.cat([boxes.new_zeros(len(boxes), 1, 2), boxes.new_ones(len(boxes), 1, 2)], dim=2)
        boxes = torch.cat([whole, boxes], dim=1)
        with torch.autocast(grid.device.type, enabled=False):  # as precise as the grid itself
            features = pooling_weights(boxes, side) @ grid.float()
        if self.regions == "both":
            features, boxes = torch.cat([grid, features], dim=1), torch.cat([cells, boxes], dim=1)
        return self._with_boxes(features, boxes), boxes, has_area(boxes)

    def _with_boxes(self, features: Tensor, boxes: Tensor) -> Tensor:
        """Append box features to features (B, R, F) of regions with boxes (B, R, 4), if box_features is set."""
        if not self.box_features:
            return features
        return torch.cat([features, box_features(boxes).to(features.dtype)], dim=-1)


def has_area(boxes: Tensor) -> Tensor:
    """Return True where a box has area; padding has none: (..., 4) -> (...)."""
    return (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])


def grid_boxes(side: int, device: torch.device | None = None) -> Tensor:
    """Return the boxes of the cells of a grid in row-major order: (side * side, 4)."""
    edges = torch.arange(side, device=device) / side
    top, left = torch.meshgrid(edges, edges, indexing="ij")
    return torch.stack([left, top, left + 1 / side, top + 1 / side], dim=-1).flatten(0, 1)


def pooling_weights(boxes: Tensor, side: int) -> Tensor:
    """Compute each cell's weight in the mean over each box: (B, N, 4) -> (B, N, side * side), zero for padding.

    The mean is RoIAlign with one bin ("Mask R-CNN", He et al., 2017, section 3). It is linear in the grid, so one
    product with these weights pools all features.
    """
    cells = torch.eye(side * side, device=boxes.device).view(1, side * side, side, side)
    with torch.autocast(boxes.device.type, enabled=False):
        rois = functional.pad(boxes.float().flatten(0, 1) * side, (1, 0))  # all of image 0, the cells
        weights = roi_align(cells, rois, output_size=1, aligned=True).view(*boxes.shape[:2], -1)
    return weights * has_area(boxes).unsqueeze(-1)


def are_inside(regions: Tensor, boxes: Tensor) -> Tensor:
    """Return True where a region has its center in a box: regions (B, R, 4), boxes (B, N, 4) -> (B, R, N).

    The whole image is in no box.
    """
    centers = (regions[..., :2] + regions[..., 2:]).unsqueeze(2) / 2  # (B, R, 1, 2)
    in_box = (boxes[..., :2].unsqueeze(1) <= centers) & (centers <= boxes[..., 2:].unsqueeze(1))
    is_part = (regions[..., 2:] - regions[..., :2]).prod(-1) < 1
    return in_box.all(-1) & (is_part & has_area(regions)).unsqueeze(2) & has_area(boxes).unsqueeze(1)


def box_features(boxes: Tensor) -> Tensor:
    """Append to a box its area as a share of the image's: (..., 4) -> (..., 5)."""
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    return torch.cat([boxes, (width * height).unsqueeze(-1)], dim=-1)


def spatial_relations(boxes: Tensor) -> Tensor:
    """Classify the relation of each region to each other one: boxes (B, R, 4) -> indices into RELATIONS (B, R, R).

    Source: the spatial graph of "Exploring Visual Relationship for Image Captioning" (GCN-LSTM, Yao et al., 2018,
    section 3.2). Row i, column j is the first of these that holds: 1, box j is inside box i; 2, box i is inside box j;
    3, their intersection over union is at least 0.5; 4 to 11, the direction from the center of i to that of j, if they
    are less than half of the image's diagonal apart. A region has no relation to itself, and none to padding.
    """
    boxes = boxes.double()  # in single precision two equal distances may differ a little
    first, second = boxes.unsqueeze(2), boxes.unsqueeze(1)  # (B, R, 1, 4), (B, 1, R, 4)
    contains = (first[..., :2] <= second[..., :2]).all(-1) & (first[..., 2:] >= second[..., 2:]).all(-1)
    same = (first == second).all(-1)
    sides = (first[..., 2:].minimum(second[..., 2:]) - first[..., :2].maximum(second[..., :2])).clamp_min(0)
    intersection, areas = sides.prod(-1), (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    union = areas.unsqueeze(2) + areas.unsqueeze(1) - intersection
    centers = (boxes[..., :2] + boxes[..., 2:]) / 2
    x, y = (centers.unsqueeze(1) - centers.unsqueeze(2)).unbind(-1)  # from i to j, y downward
    direction = 4 + _eighth(x, -y)
    is_near = x.square() + y.square() < 0.5
    relations = direction.where(is_near, NO_RELATION)
    relations = relations.masked_fill(intersection >= 0.5 * union, 3)
    inside = contains & ~same
    relations = relations.masked_fill(inside.transpose(1, 2), 2).masked_fill(inside, 1)
    exists = has_area(boxes)
    itself = torch.eye(boxes.shape[1], dtype=torch.bool, device=boxes.device)
    return relations.masked_fill(itself | ~(exists.unsqueeze(1) & exists.unsqueeze(2)), NO_RELATION)


def _eighth(x: Tensor, y: Tensor) -> Tensor:
    """Return the eighth of a turn of a direction (x, y): 0 to 7, counterclockwise from the right, y upward.

    A direction between two eighths is in the first of them; the right and (0, 0) are in the last. Comparisons are
    exact, and ONNX Runtime has no arctangent in double precision.
    """
    in_upper_half = (y > 0) | ((y == 0) & (x < 0))
    x, y = torch.where(in_upper_half, x, -x), torch.where(in_upper_half, y, -y)
    eighth = (y > x).long() + (x < 0) + (x + y < 0) + 4 * ~in_upper_half
    return eighth.masked_fill((x == 0) & (y == 0), 7)


def reverse_relations(relations: Tensor) -> Tensor:
    """Convert the relations of i to j into those of j to i: (...) -> (...)."""
    reversed_directions = 4 + relations % 8  # (eighth + 4) % 8 + 4 of 4 + eighth
    others = (3 - relations).where((relations == 1) | (relations == 2), relations)
    return reversed_directions.where(relations >= 4, others)


def pairwise_geometry(boxes: Tensor) -> Tensor:
    """Encode relative position and size of each two regions: boxes (B, R, 4) -> (B, R, R, GEOMETRY_FEATURES).

    Source: "Image Captioning: Transforming Objects into Words" (Herdade et al., 2019, section 3.2), each of its four
    numbers as sines and cosines of eight wavelengths as in "Relation Networks for Object Detection" (Hu et al., 2018).
    """
    boxes = boxes.float()
    centers, sides = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]).clamp_min(1e-3)
    distances = (centers.unsqueeze(2) - centers.unsqueeze(1)).abs() / sides.unsqueeze(2)  # (B, R, R, 2)
    ratios = sides.unsqueeze(2) / sides.unsqueeze(1)
    displacement = torch.cat([distances.clamp_min(SMALLEST_DISTANCE), ratios], dim=-1).log()  # (B, R, R, 4)
    wavelengths = 1000 ** (torch.arange(8, device=boxes.device) / 8)
    angles = (100 * displacement.unsqueeze(-1) / wavelengths).flatten(-2)  # (B, R, R, 32)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
