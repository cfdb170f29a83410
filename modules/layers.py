"""Layers shared by the encoder side and the decoder: initialization, sampling, dropout.

Shapes: I input and O output features of a linear layer, V categories.
"""

import torch
from torch import Tensor, nn


def init_linear(layer: nn.Linear) -> None:
    """Initialize the weight after Glorot and Bengio (2010, equation 16) and the bias, if there is one, with zeros."""
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def sample_categorical(probabilities: Tensor) -> Tensor:
    """Sample a category index from probabilities (..., V) -> (...).

    By inversion: the first category up to which the probabilities sum to more than a uniform number. That needs one
    random number, where `multinomial` takes V. NaNs count as 1: a diverged model then shows in its loss.
    """
    cumulative = probabilities.nan_to_num(1.0).cumsum(dim=-1)
    threshold = torch.rand_like(cumulative[..., :1]) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)


def linear_of_tanh(linear: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
    """linear(tanh(x + y)) for scores that go into a softmax: x and y, which broadcast to (..., I) -> (..., O).

    In bfloat16 on a CPU torch's sigmoid takes half the time of its tanh. tanh(x) = 2 sigmoid(2 x) - 1, so the result
    misses a constant there, which a softmax ignores.
    """
    if x.is_cpu and x.dtype == torch.bfloat16:
        return 2 * linear((2 * x + 2 * y).sigmoid_())
    return linear((x + y).tanh_())


class Dropout(nn.Dropout):
    """torch's dropout, on a CPU with a mask of uniform instead of Bernoulli random numbers, which are faster there."""

    def forward(self, input: Tensor) -> Tensor:
        """input (...) -> (...)."""
        if input.device.type != "cpu" or not self.training or not self.p:
            return super().forward(input)
        return input.masked_fill(torch.rand(input.shape) < self.p, 0) / (1 - self.p)
