"""What cells, attention and decoders are built from: linear layers, those applied at every word, and dropout.

Shapes: N rows, I and O features of a linear layer.
"""

from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd.function import once_differentiable


def start_linear(layer):
    """Start a linear layer as Glorot and Bengio (2010) do."""
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def draw(probabilities):
    """Draw a place by probabilities (..., V) -> (...); where they are not numbers any, and the loss will tell."""
    return probabilities.nan_to_num(1.0).flatten(0, -2).multinomial(1).view(probabilities.shape[:-1])


class Dropout(nn.Dropout):
    """torch's dropout with random numbers that come faster on a CPU."""

    def forward(self, x):
        """x -> the same shape."""
        if x.device.type != "cpu" or not self.training or not self.p:
            return super().forward(x)
        return x.masked_fill(torch.rand(x.shape) < self.p, 0) / (1 - self.p)


class _WeightOverTime(torch.autograd.Function):
    """Hands out a weight for the applications at all words; backward multiplies out all of its gradient at once."""

    @staticmethod
    def forward(ctx, weight, applications):
        ctx.applications = applications
        ctx.set_materialize_grads(False)
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        rows, gradients = (torch.cat(parts) for parts in zip(*ctx.applications, strict=True))
        ctx.applications.clear()
        return gradients.t() @ rows, None


class _ApplyOnce(torch.autograd.Function):
    """rows (N, I) @ weight (O, I).T, whose part of the weight's gradient is left to _WeightOverTime."""

    @staticmethod
    def forward(ctx, rows, weight, applications):
        ctx.save_for_backward(rows, weight)
        ctx.applications = applications
        return rows @ weight.t()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        rows, weight = ctx.saved_tensors
        if ctx.needs_input_grad[1]:  # without, nobody would ever clear the list
            ctx.applications.append((rows.detach(), gradient))
        return gradient @ weight, None, None


class LinearOverTime(nn.Linear):
    """A linear layer without bias that is applied at every word.

    Within `over_time` the gradient of its weight is one product over all words. autograd alone makes a product a
    word and adds them up, which for the last words of a long caption, a few rows, is nearly all of the work.
    """

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features, bias=False)
        self.applications = None

    @contextmanager
    def over_time(self):
        """Collect the applications of one sequence, which is to be differentiated as a whole."""
        self.applications = []
        weight = self.weight
        if torch.is_autocast_enabled(weight.device.type):
            weight = weight.to(torch.get_autocast_dtype(weight.device.type))
        self.shared = _WeightOverTime.apply(weight, self.applications)
        try:
            yield
        finally:
            self.applications = self.shared = None

    def forward(self, rows):
        """rows (..., I) -> (..., O)."""
        if self.applications is None:
            return super().forward(rows)
        flat = rows.flatten(0, -2).to(self.shared.dtype)
        return _ApplyOnce.apply(flat, self.shared, self.applications).unflatten(0, rows.shape[:-1])
