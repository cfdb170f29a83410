"""What the layers of the transformer's encoder and decoder share ("Attention Is All You Need", Vaswani et al., 2017).

Shapes: n heads, d = D / n their width, Q queries, K keys, ... at least one leading axis.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


def feed_forward(width: int, ffn_dim: int) -> nn.Sequential:
    """The feed-forward network of a layer (section 3.3), with the ReLU of the paper: on a CPU GELU takes longer."""
    return nn.Sequential(nn.Linear(width, ffn_dim), nn.ReLU(inplace=True), nn.Linear(ffn_dim, width))


def split_heads(x: Tensor, parts: int, heads: int) -> Tensor:
    """Split what a linear layer projects, such as queries, keys and values: (..., parts n d) -> (..., parts, n, d)."""
    return x.unflatten(-1, (parts, heads, x.shape[-1] // (parts * heads)))


def scaled_dot_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    with_alpha: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention (equation 1), with its weights alpha where they are asked for.

    query (..., n, Q, d), key and value (..., n, K, d) -> (..., n, Q, d), alpha (..., n, Q, K). A boolean mask
    (..., 1, 1, K) is False for keys that no query sees, another one (..., n, Q, K) is added to the scores. Where
    `is_causal`, Q = K and a query sees no later key. On a CPU torch's fused attention takes seven times as long in
    bfloat16, for its gradient.
    """
    if not (with_alpha or query.is_cpu):
        return fused_attention(query, key, value, mask, is_causal=is_causal), None
    scores = (query @ key.transpose(-1, -2)).float() / math.sqrt(query.shape[-1])
    if is_causal:
        scores = scores + torch.full(scores.shape[-2:], -math.inf, device=scores.device).triu(diagonal=1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    alpha = scores.softmax(dim=-1)
    return alpha.to(value.dtype) @ value, alpha if with_alpha else None


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, is_causal: bool = False
) -> Tensor:
    """`scaled_dot_product` without weights, by torch's fused kernels, which take four dimensions and no more.

    query (..., n, Q, d), key and value (..., n, K, d), mask as there -> (..., n, Q, d).
    """
    leading = query.shape[:-3]
    query, key, value = (x.flatten(0, -4) for x in (query, key, value))
    if mask is not None:
        mask = mask.flatten(0, -4)
        mask = mask if mask.dtype == torch.bool else mask.to(query.dtype)
    attended = functional.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal)
    return attended.unflatten(0, leading)


def sine_positions(positions: Tensor, width: int) -> Tensor:
    """Encode positions (...) as sines and cosines (..., width) of geometrically rising wavelengths.

    Source: Vaswani et al., 2017, section 3.5, with all sines before all cosines. There is no largest position.
    """
    half = (width + 1) // 2
    frequencies = torch.exp(torch.arange(half, device=positions.device) * (-math.log(10_000) / half))
    angles = positions.unsqueeze(-1) * frequencies  # (..., half)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[..., :width]
