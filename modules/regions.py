"""The regions of an image: the cells of the encoder's grid, the objects in it, both, or those of region features.

Shapes: B images, S x S cells of the grid, F features of a cell, N boxes of an image, R regions. A box is (left, top,
right, bottom) in fractions of the image's sides; one without area stands for none, where images have different numbers.
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


class RegionSource(nn.Module):
    """Makes the regions of an image from the grid of its encoder and the boxes of its objects.

    "grid": the cells. "objects": the whole image, then its objects, each the mean of the grid in its box, as
    the regions of "Bottom-Up and Top-Down Attention" (Anderson et al., 2018). "both": the cells, then those.
    "features": there is no grid, the features are those of regions already, as a detector computed them.

    Args:
        settings: regions, and box_features to append `box_features` to the features of each region.
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.regions, self.box_features = settings.regions, settings.box_features

    @property
    def uses_objects(self) -> bool:
        """Whether it needs the boxes of objects."""
        return self.regions in ("objects", "both")

    @property
    def uses_region_features(self) -> bool:
        """Whether it needs region features, with their boxes."""
        return self.regions == "features"

    def forward(self, grid: Tensor, boxes: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Features, boxes and mask of the regions.

        grid (B, S * S, F) in row-major order, boxes of objects (B, N, 4), where they are used; or region features
        (B, N, F) and their boxes (B, N, 4)
        -> (B, R, F), with box features F + 5, boxes (B, R, 4), mask (B, R), which is None where all images have R.
        """
        if self.uses_region_features:
            assert boxes is not None, "region features need their boxes"
            return self._with_boxes(grid, boxes), boxes, has_area(boxes)
        side = round(grid.shape[1] ** 0.5)
        features, region_boxes, mask = grid, grid_boxes(side, grid.device).expand(len(grid), -1, -1), None
        if self.uses_objects:
            assert boxes is not None, "a model of objects needs their boxes"
            whole = torch.cat([boxes.new_zeros(len(boxes), 1, 2), boxes.new_ones(len(boxes), 1, 2)], dim=2)
            boxes = torch.cat([whole, boxes], dim=1)
            mask = has_area(boxes)
            with torch.autocast(grid.device.type, enabled=False):  # as precise as the grid itself
                pooled = pooling_weights(boxes, side) @ grid.float()
            if self.regions == "both":
                pooled, boxes = torch.cat([grid, pooled], dim=1), torch.cat([region_boxes, boxes], dim=1)
                mask = torch.cat([mask.new_ones(grid.shape[:2]), mask], dim=1)
            features, region_boxes = pooled, boxes
        return self._with_boxes(features, region_boxes), region_boxes, mask

    def _with_boxes(self, features: Tensor, boxes: Tensor) -> Tensor:
        """Features (B, R, F) of regions, with those of their boxes (B, R, 4) where they are asked for."""
        if not self.box_features:
            return features
        return torch.cat([features, box_features(boxes).to(features.dtype)], dim=-1)


def has_area(boxes: Tensor) -> Tensor:
    """Which boxes there are: (..., 4) -> (...)."""
    return (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])


def grid_boxes(side: int, device: torch.device | None = None) -> Tensor:
    """The boxes of the cells of a grid in row-major order: (side * side, 4)."""
    edges = torch.arange(side, device=device) / side
    top, left = torch.meshgrid(edges, edges, indexing="ij")
    return torch.stack([left, top, left + 1 / side, top + 1 / side], dim=-1).flatten(0, 1)


def pooling_weights(boxes: Tensor, side: int) -> Tensor:
    """The share of each cell in the mean over each box: boxes (B, N, 4) -> (B, N, side * side), zero without a box.

    They are those of RoIAlign ("Mask R-CNN", He et al., 2017, section 3) with one bin. As it is linear in the grid, one
    product with these weights pools all features.
    """
    cells = torch.eye(side * side, device=boxes.device).view(1, side * side, side, side)
    with torch.autocast(boxes.device.type, enabled=False):
        rois = functional.pad(boxes.float().flatten(0, 1) * side, (1, 0))  # all of image 0, the cells
        weights = roi_align(cells, rois, output_size=1, aligned=True).view(*boxes.shape[:2], -1)
    return weights * has_area(boxes).unsqueeze(-1)


def are_inside(regions: Tensor, boxes: Tensor) -> Tensor:
    """Which regions have their center in which boxes: regions (B, R, 4), boxes (B, N, 4) -> (B, R, N).

    The whole image is in no box.
    """
    centers = (regions[..., :2] + regions[..., 2:]).unsqueeze(2) / 2  # (B, R, 1, 2)
    in_box = (boxes[..., :2].unsqueeze(1) <= centers) & (centers <= boxes[..., 2:].unsqueeze(1))
    is_part = (regions[..., 2:] - regions[..., :2]).prod(-1) < 1
    return in_box.all(-1) & (is_part & has_area(regions)).unsqueeze(2) & has_area(boxes).unsqueeze(1)


def box_features(boxes: Tensor) -> Tensor:
    """Where a box is and how large: (..., 4) -> its edges and its area as a share of the image's, (..., 5)."""
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    return torch.cat([boxes, (width * height).unsqueeze(-1)], dim=-1)
