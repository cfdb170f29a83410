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
