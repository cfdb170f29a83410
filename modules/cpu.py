"""Faster CPU versions of plain torch code, each with its gain. The results are equal up to rounding.

Glibc's allocator is tuned in `utils.tune_malloc`. docs/performance.md has more measurements.

Shapes: B images, R regions, C captions of an image, A width of the attention, V categories.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


def applies_to(x: Tensor) -> bool:
    """Return True for a tensor on the CPU, unless a model is being exported: an export takes the plain code."""
    return x.is_cpu and not torch.compiler.is_exporting()


def additive_scores(keys: Tensor, query: Tensor, weight: Tensor) -> Tensor:
    """Compute `modules.attention.SoftAttention.scores` in blocks of images: weight . tanh(keys + query).

    Forward and backward take 9.5 ms on one core, the plain code 22.7 ms, a compiled version 20.4 ms.

    Args:
        keys: (B, R, A).
        query: (B, C, A).
        weight: (A,).

    Returns:
        Scores (B, C, R) in float32.
    """
    with torch.autocast("cpu", enabled=False):
        return _BlockedAdditiveScores.apply(keys.float(), query.float(), weight)


class _BlockedAdditiveScores(torch.autograd.Function):
    """`additive_scores` of float32 tensors, a few images at a time.

    The sum (B, C, R, A) is the largest tensor of a training step. A block of it stays in the cache of a core, and the
    backward pass computes it again, which is faster than writing it to memory and reading it back. In float32
    tanh takes a sixth of the time that it takes in bfloat16.
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
    """Compute tanh(keys + query): (b, R, A) and (b, C, A) -> (b, C, R, A)."""
    return (keys.unsqueeze(1) + query.unsqueeze(2)).tanh_()


class Dropout(nn.Dropout):
    """torch's dropout with uniform instead of Bernoulli random numbers, in a third of the time."""

    def forward(self, input: Tensor) -> Tensor:
        """input (...) -> (...)."""
        if not (applies_to(input) and self.training and self.p):
            return super().forward(input)
        kept = torch.rand(input.shape) >= self.p
        return input * kept.to(input.dtype).mul_(1 / (1 - self.p))  # a product is faster than masked_fill


def sample_categorical(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Sample a category index from probabilities (..., V), which need not sum to one -> (...).

    Inverting the cumulative distribution takes an eighth of the time of torch's `multinomial`. NaNs count as 1, so a
    diverged model shows in its loss rather than here.
    """
    cumulative = probabilities.nan_to_num(1.0).cumsum(dim=-1)
    uniform = torch.empty_like(cumulative[..., -1:]).uniform_(generator=generator)
    threshold = uniform * cumulative[..., -1:]  # below the last, as a uniform number is below 1
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)


def embed_distinct_words(
    words: Tensor, embedding: nn.Embedding, word_gates: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Embed words (...) and map the embeddings to gates, computing each distinct word once -> (..., E), (..., G H).

    The captions of a search share most of their words, so it takes 6 to 12 % less time. A GPU would make the host wait
    for the number of distinct words.
    """
    distinct, indices = words.unique(return_inverse=True)
    embedded = embedding(distinct)
    return functional.embedding(indices, embedded), functional.embedding(indices, word_gates(embedded))
