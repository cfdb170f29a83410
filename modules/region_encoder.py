"""Transformer encoder layers over the regions of an image, between the encoder or the graph and the decoder.

Shapes: B images, R regions, D their width, n heads, d = D / n their width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from modules.cpu import Dropout
from modules.layers import init_linears
from modules.regions import GEOMETRY_FEATURES, pairwise_geometry
from modules.transformer import feed_forward, scaled_dot_product, sine_positions, split_heads
from utils import InputError

if TYPE_CHECKING:
    from models import ModelSettings

POSITIONS = ("none", "learned", "sine")
SMALLEST_WEIGHT = 1e-6  # of geometry, so that its logarithm is finite
INIT_STD = 0.02  # of learned positions, as in ViT (Dosovitskiy et al., 2021)


def grid_positions(side: int, width: int, device: torch.device | None = None) -> Tensor:
    """Encode the rows and columns of a square grid: (R, width), half of it for each, width a multiple of 4.

    Source: "End-to-End Object Detection with Transformers" (DETR, Carion et al., 2020), appendix A.4, with unit steps
    between rows and columns.
    """
    codes = sine_positions(torch.arange(side, device=device), width // 2)  # (side, width / 2)
    rows, columns = codes.unsqueeze(1).expand(-1, side, -1), codes.unsqueeze(0).expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network (Vaswani et al., 2017, section 3.1).

    Each follows a layer normalization and has a residual connection ("On Layer Normalization in the Transformer
    Architecture", Xiong et al., 2020), so it trains without a long warmup. Dropout is on its output. With `geometry`
    the weights also depend on the relative position and size of the regions ("Image Captioning: Transforming Objects
    into Words", Herdade et al., 2019, equations 6 to 8).
    """

    def __init__(self, *, width: int, heads: int, ffn_dim: int, geometry: bool, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.ffn_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_proj = nn.Linear(width, width)
        self.ffn = feed_forward(width, ffn_dim)
        self.geometry = nn.Linear(GEOMETRY_FEATURES, heads) if geometry else None
        self.dropout = Dropout(dropout)

    def forward(self, regions: Tensor, mask: Tensor | None = None, geometry: Tensor | None = None) -> Tensor:
        """regions (B, R, D), mask (B, 1, 1, R), geometry (B, R, R, GEOMETRY_FEATURES) -> (B, R, D)."""
        if self.geometry is not None and geometry is not None:
            bias = self.geometry(geometry).relu().float().clamp_min(SMALLEST_WEIGHT).log().permute(0, 3, 1, 2)
            mask = bias if mask is None else bias.masked_fill(~mask, -math.inf)  # (B, n, R, R)
        projected = split_heads(self.query_key_value(self.attention_norm(regions)), 3, self.heads)  # (B, R, 3, n, d)
        query, key, value = projected.permute(2, 0, 3, 1, 4)  # (B, n, R, d) each
        attended = scaled_dot_product(query, key, value, mask)[0].transpose(1, 2).flatten(-2)  # (B, R, D)
        regions = regions + self.dropout(self.attention_proj(attended))
        return regions + self.dropout(self.ffn(self.ffn_norm(regions)))


class RegionEncoder(nn.Module):
    """A stack of encoder layers over the regions, after adding positions; with 0 layers, the identity.

    Args:
        settings: encoder_layers, encoder_positions, heads, ffn_dim, geometry and dropout.
        region_dim: D, a multiple of heads and, for sine positions, of 4.
        num_cells: number of regions that are cells of a grid; they come first and get positions.

    Raises InputError for heads or positions that do not fit the regions.
    """

    def __init__(self, settings: ModelSettings, *, region_dim: int, num_cells: int) -> None:
        super().__init__()
        layers, heads, positions = settings.encoder_layers, settings.heads, settings.encoder_positions
        if layers and region_dim % heads:
            raise InputError(f"--heads {heads}: does not divide the {region_dim} features of a region")
        if layers and num_cells and positions == "sine" and (region_dim % 4 or round(num_cells**0.5) ** 2 != num_cells):
            raise InputError(
                f"--encoder_positions sine: requires a square grid and a multiple of 4 features, not {num_cells} "
                f"regions of {region_dim}: give learned or none"
            )
        self.layers = nn.ModuleList(
            EncoderLayer(
                width=region_dim,
                heads=heads,
                ffn_dim=settings.ffn_dim,
                geometry=settings.geometry,
                dropout=settings.dropout,
            )
            for _ in range(layers)
        )
        self.geometry = settings.geometry
        self.num_cells = num_cells
        self.positions, self.learned_positions = positions if num_cells else "none", None
        if layers:
            self.norm = nn.LayerNorm(region_dim)
            init_linears(self)
            if self.positions == "learned":
                self.learned_positions = nn.Parameter(torch.empty(num_cells, region_dim))
                nn.init.normal_(self.learned_positions, std=INIT_STD)

    def forward(self, regions: Tensor, boxes: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """regions (B, R, D), boxes (B, R, 4) for geometry, mask (B, R), False for padding -> (B, R, D)."""
        if not self.layers:
            return regions
        if self.positions != "none":
            codes = self.learned_positions
            if codes is None:
                codes = grid_positions(round(self.num_cells**0.5), regions.shape[2], regions.device)
            regions = regions + functional.pad(codes, (0, 0, 0, regions.shape[1] - self.num_cells))
        if mask is not None:
            mask = mask.view(len(mask), 1, 1, -1)
        geometry = pairwise_geometry(boxes) if self.geometry and boxes is not None else None
        for layer in self.layers:
            regions = layer(regions, mask, geometry)
        return self.norm(regions)
