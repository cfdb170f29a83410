"""Initialization, masked scores and masked means, shared by the encoder side and the decoders.

Shapes: B images, R regions, D their width, C captions of an image.
"""

import math

from torch import Tensor, nn


def init_linear(layer: nn.Linear) -> None:
    """Initialize the weight as in Glorot and Bengio (2010, equation 16) and the bias, if there is one, with zeros."""
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def init_linears(module: nn.Module) -> None:
    """Initialize all linear layers of a module that have weights with `init_linear`."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and layer.weight.numel():
            init_linear(layer)


def mask_scores(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Convert attention scores (B, C, R) to float32, with -inf where a mask (B, R) is False: their softmax is 0."""
    scores = scores.float()
    return scores if mask is None else scores.masked_fill(~mask.unsqueeze(1), -math.inf)


def masked_mean(regions: Tensor, mask: Tensor | None) -> Tensor:
    """Average the regions (B, R, D) for which a mask (B, R) is True -> (B, 1, D)."""
    if mask is None:
        return regions.mean(dim=1, keepdim=True)
    shares = mask / mask.sum(dim=1, keepdim=True)
    return shares.unsqueeze(1).to(regions.dtype) @ regions
