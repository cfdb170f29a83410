"""How the regions of an image lie to each other: spatial relations with names, and their geometry as numbers.

Shapes: B images, R regions. A box is (left, top, right, bottom) in fractions of the image's sides; those without area
stand for none.
"""

import torch
from torch import Tensor

from modules.regions import has_area

NO_RELATION = 0
# What a region is to another one, by the numbers of Yao et al., 2018: 1 says that the other one is inside of it.
# 4 to 11 are the directions of the other one's center, an eighth of a turn each, counterclockwise from the right.
RELATIONS = (
    "",
    "around",
    "inside",
    "overlaps",
    "left of",
    "below",
    "below",
    "right of",
    "right of",
    "above",
    "above",
    "left of",
)
GEOMETRY_FEATURES = 64
SMALLEST_DISTANCE = 1e-3  # of centers, in units of a region's side, so that its logarithm is finite


def spatial_relations(boxes: Tensor) -> Tensor:
    """The relation of each region to each other one: boxes (B, R, 4) -> (B, R, R) of indices into RELATIONS.

    Source: the spatial graph of "Exploring Visual Relationship for Image Captioning" (GCN-LSTM, Yao et al., 2018,
    section 3.2). Of the first that holds, row i has in column j: 1, box j is inside of box i; 2, box i is inside of box
    j; 3, their intersection over union is at least 0.5; 4 to 11, the direction from the center of i to that of j, where
    they are less than half of the image's diagonal apart. A region has no relation to itself, nor to what is no region.
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
    """The eighth of a turn in which a direction (x, y) lies: 0 to 7, counterclockwise from the right, y upward.

    A direction between two eighths is in the first of them, the right in the last, and so is no direction (0, 0).
    By comparisons: they are exact, and ONNX Runtime has no arctangent in double precision.
    """
    in_upper_half = (y > 0) | ((y == 0) & (x < 0))
    x, y = torch.where(in_upper_half, x, -x), torch.where(in_upper_half, y, -y)
    eighth = (y > x).long() + (x < 0) + (x + y < 0) + 4 * ~in_upper_half
    return eighth.masked_fill((x == 0) & (y == 0), 7)


def reverse_relations(relations: Tensor) -> Tensor:
    """The relations of j to i, of those of i to j: (...) -> (...)."""
    reversed_directions = 4 + relations % 8  # (eighth + 4) % 8 + 4 of 4 + eighth
    others = (3 - relations).where((relations == 1) | (relations == 2), relations)
    return reversed_directions.where(relations >= 4, others)


def pairwise_geometry(boxes: Tensor) -> Tensor:
    """Where each region lies from each other one, and how large: boxes (B, R, 4) -> (B, R, R, GEOMETRY_FEATURES).

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
