"""Layers shared by the encoder side and the decoder: initialization, sampling, scores, masks, dropout.

Shapes: B images, R regions, C captions of an image, A width of the attention, V categories.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def init_linear(layer: nn.Linear) -> None:
    """Initialize the weight after Glorot and Bengio (2010, equation 16) and the bias, if there is one, with zeros."""
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def init_linears(module: nn.Module) -> None:
    """`init_linear` for all linear layers of a module that have weights."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and layer.weight.numel():
            init_linear(layer)


def sample_categorical(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Sample a category index from probabilities (..., V), which need not sum to one -> (...).

    By inverting the cumulative distribution, which takes an eighth of the time of torch's `multinomial` on a CPU. NaNs
    count as 1: a diverged model then shows in its loss.
    """
    cumulative = probabilities.nan_to_num(1.0).cumsum(dim=-1)
    uniform = torch.empty_like(cumulative[..., -1:]).uniform_(generator=generator)
    threshold = uniform * cumulative[..., -1:]  # below the last, as a uniform number is below 1
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)


def mask_scores(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores (B, C, R) of attention in float32, -inf where a mask (B, R) is False: their softmax is exactly 0 there."""
    scores = scores.float()
    return scores if mask is None else scores.masked_fill(~mask.unsqueeze(1), -math.inf)


def masked_mean(regions: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of the regions (B, R, D) that there are by a mask (B, R): (B, 1, D)."""
    if mask is None:
        return regions.mean(dim=1, keepdim=True)
    shares = mask / mask.sum(dim=1, keepdim=True)
    return shares.unsqueeze(1).to(regions.dtype) @ regions


def additive_scores(keys: Tensor, query: Tensor, weight: Tensor) -> Tensor:
    """Scores of additive attention, weight . tanh(keys + query): (B, C, R), float32 on a CPU.

    Source: "Neural Machine Translation by Jointly Learning to Align and Translate" (Bahdanau et al., 2015), A.1.2.

    Args:
        keys: (B, R, A).
        query: (B, C, A).
        weight: (A,).
    """
    if keys.is_cpu and not torch.compiler.is_exporting():  # the number of blocks depends on the sizes
        with torch.autocast("cpu", enabled=False):
            return _BlockedAdditiveScores.apply(keys.float(), query.float(), weight)
    return (keys.unsqueeze(1) + query.unsqueeze(2)).tanh_() @ weight.to(keys.dtype)


class _BlockedAdditiveScores(torch.autograd.Function):
    """`additive_scores` of float32 tensors on a CPU, a few images at a time.

    The sum (B, C, R, A) is the largest tensor of a training step. In blocks it stays in the cache of a core and is
    computed again for the gradient, which takes less time than to write it to memory and read it back. Its tanh takes
    a sixth of the time that it takes in bfloat16.
    """

    BLOCK = 2**18  # elements of the sum

    @staticmethod
    def forward(ctx: Any, keys: Tensor, query: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(keys, query, weight)
        blocks = zip(*_BlockedAdditiveScores.split(keys, query), strict=True)
        return torch.cat([_tanh_of_sum(k, q) @ weight for k, q in blocks])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, query, weight = ctx.saved_tensors
        grad_keys, grad_query, grad_weight = torch.empty_like(keys), torch.empty_like(query), torch.zeros_like(weight)
        blocks = _BlockedAdditiveScores.split(keys, query, grad, grad_keys, grad_query)
        for k, q, g, grad_k, grad_q in zip(*blocks, strict=True):
            tanh = _tanh_of_sum(k, q)  # (b, C, R, A)
            grad_weight += g.flatten() @ tanh.flatten(0, 2)
            grad_sum = tanh.square_().sub_(1).mul_(-g.unsqueeze(-1))  # g (1 - tanh^2), without its factor weight
            grad_k.copy_(grad_sum.sum(dim=1).mul_(weight))
            grad_q.copy_(grad_sum.sum(dim=2).mul_(weight))
        return grad_keys, grad_query, grad_weight

    @staticmethod
    def split(keys: Tensor, query: Tensor, *others: Tensor) -> list[tuple[Tensor, ...]]:
        """Split tensors along the images so that a block's sum has about BLOCK elements for each thread."""
        elements = query.shape[1] * keys.shape[1] * keys.shape[2]  # of an image
        images = max(1, _BlockedAdditiveScores.BLOCK * torch.get_num_threads() // elements)
        return [x.split(images) for x in (keys, query, *others)]


def _tanh_of_sum(keys: Tensor, query: Tensor) -> Tensor:
    """tanh(keys + query): (b, R, A) and (b, C, A) -> (b, C, R, A)."""
    return (keys.unsqueeze(1) + query.unsqueeze(2)).tanh_()


class Dropout(nn.Dropout):
    """torch's dropout, on a CPU in a third of its time: with uniform instead of Bernoulli random numbers."""

    def forward(self, input: Tensor) -> Tensor:
        """input (...) -> (...)."""
        if not input.is_cpu or not self.training or not self.p:
            return super().forward(input)
        kept = torch.rand(input.shape) >= self.p
        return input * kept.to(input.dtype).mul_(1 / (1 - self.p))  # a product is faster than masked_fill
