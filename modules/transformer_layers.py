"""What the layers of the transformer's encoder and decoder share ("Attention Is All You Need", Vaswani et al., 2017).

Shapes: n heads, d = D / n their width, ... any leading axes.
"""

import math

import torch
from torch import Tensor, nn

from modules.layers import init_linear


def feed_forward(width: int, ffn_dim: int) -> nn.Sequential:
    """The feed-forward network of a layer (section 3.3), with the ReLU of the paper: on a CPU GELU takes longer."""
    return nn.Sequential(nn.Linear(width, ffn_dim), nn.ReLU(inplace=True), nn.Linear(ffn_dim, width))


def init_linears(module: nn.Module) -> None:
    """Glorot-initialize the linear layers, as `torch.nn.Transformer` does."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            init_linear(layer)


def split_heads(x: Tensor, parts: int, heads: int) -> Tensor:
    """Split what one linear layer projects, such as queries, keys and values: (..., parts n d) -> (..., parts, n, d)."""
    return x.unflatten(-1, (parts, heads, x.shape[-1] // (parts * heads)))


def sine_positions(positions: Tensor, width: int) -> Tensor:
    """Encode positions (...) as sines and cosines (..., width) of geometrically rising wavelengths.

    Source: Vaswani et al., 2017, section 3.5, with all sines before all cosines. There is no largest position.
    """
    half = (width + 1) // 2
    frequencies = torch.exp(torch.arange(half, device=positions.device) * (-math.log(10_000) / half))
    angles = positions.unsqueeze(-1) * frequencies  # (..., half)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[..., :width]
