"""Layers shared by the encoder side and the decoder: initialization, sampling, dropout, linear maps over time.

Shapes: N rows, I input and O output features of a linear layer, V categories.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def init_linear(layer: nn.Linear) -> None:
    """Initialize the weight after Glorot and Bengio (2010, equation 16) and the bias, if there is one, with zeros."""
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def sample_categorical(probabilities: Tensor) -> Tensor:
    """Sample a category index from probabilities (..., V) -> (...).

    NaNs count as 1, since `multinomial` rejects them: a diverged model then shows in its loss.
    """
    return probabilities.nan_to_num(1.0).flatten(0, -2).multinomial(1).view(probabilities.shape[:-1])


def linear_of_tanh(linear: nn.Linear, x: Tensor) -> Tensor:
    """linear(tanh(x)) for scores that go into a softmax: x (..., I) -> (..., O), overwriting x.

    On a CPU the result misses a constant, which a softmax ignores: tanh(x) = 2 sigmoid(2 x) - 1, and in bfloat16
    torch's sigmoid takes half the time of its tanh there.
    """
    if x.device.type == "cpu":
        return 2 * linear(x.mul_(2).sigmoid_())
    return linear(x.tanh_())


class Dropout(nn.Dropout):
    """torch's dropout, on a CPU with a mask of uniform instead of Bernoulli random numbers, which are faster there."""

    def forward(self, input: Tensor) -> Tensor:
        """input (...) -> (...)."""
        if input.device.type != "cpu" or not self.training or not self.p:
            return super().forward(input)
        return input.masked_fill(torch.rand(input.shape) < self.p, 0) / (1 - self.p)


class _SharedWeight(torch.autograd.Function):
    """Identity of the weight (O, I) of all calls; its backward computes the gradient over all of them in one matmul."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, calls: list[tuple[Tensor, Tensor]]) -> Tensor:
        ctx.calls = calls
        ctx.set_materialize_grads(False)
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs, gradients = (torch.cat(parts) for parts in zip(*ctx.calls, strict=True))
        ctx.calls.clear()
        return gradients.t() @ inputs, None


class _SharedMatmul(torch.autograd.Function):
    """x (N, I) @ weight (O, I).T; the weight's gradient is left to `_SharedWeight`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, calls: list[tuple[Tensor, Tensor]]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.calls = calls
        return x @ weight.t()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        if ctx.needs_input_grad[1]:  # with a frozen weight nothing would clear the list
            ctx.calls.append((x.detach(), gradient))
        return gradient @ weight, None, None


class SharedLinear(nn.Linear):
    """Bias-free linear layer shared by all time steps.

    Inside `batched_weight_grad` its weight gradient is one matmul over all steps instead of one per step. The last
    steps of a batch have few unfinished captions, for which a matmul of its own is mostly overhead.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.calls: list[tuple[Tensor, Tensor]] | None = None  # per call: input (N, I), output gradient (N, O)
        self.shared_weight: Tensor | None = None

    @contextmanager
    def batched_weight_grad(self) -> Iterator[None]:
        """Batch the weight gradient of all calls in this context, whose outputs must go backward together."""
        self.calls = []
        weight = self.weight
        if torch.is_autocast_enabled(weight.device.type):
            weight = weight.to(torch.get_autocast_dtype(weight.device.type))
        self.shared_weight = _SharedWeight.apply(weight, self.calls)
        try:
            yield
        finally:
            self.calls = self.shared_weight = None

    def forward(self, input: Tensor) -> Tensor:
        """input (..., I) -> (..., O)."""
        if self.shared_weight is None:
            return super().forward(input)
        rows = input.flatten(0, -2).to(self.shared_weight.dtype)
        return _SharedMatmul.apply(rows, self.shared_weight, self.calls).unflatten(0, input.shape[:-1])
