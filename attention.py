"""Attention: where a decoder looks before each word.

Shapes: B images, R regions, D features of a region, C captions of an image, A units of the attention, H of the hidden
state, Z of the context.
"""

import math
from contextlib import contextmanager

import torch
from torch import nn

from layers import LinearOverTime, draw


class Attention(nn.Module):
    """What all attention shares: a weighted mean of the regions, and a gate that says how much of it to take.

    Source: "Show, Attend and Tell" (Xu et al., 2015), equations 5 and 13 and section 4.2.1. A kind of attention has
    `scores(keys, hidden)`, keys (B, R, A) and hidden (B, C, H) -> scores (B, C, R).
    """

    def __init__(self, region_size, hidden_size, attention_size):
        super().__init__()
        self.context_size = region_size  # Z
        self.keys = nn.Linear(region_size, attention_size)  # the part that no word changes: once an image
        self.query = LinearOverTime(hidden_size, attention_size)
        self.gate = nn.Linear(hidden_size, 1)

    @contextmanager
    def over_time(self):
        """As `LinearOverTime.over_time`; yields a list for what `HardAttention` chooses."""
        with self.query.over_time():
            yield []

    def forward(self, regions, keys, hidden, choices=None):
        """regions (B, R, D), keys (B, R, A), hidden (B, C, H) -> context (B, C, Z), weights (B, C, R)."""
        weights = self.scores(keys, hidden).float().softmax(dim=-1)  # (B, C, R)
        looked_at = self.choose(weights, choices).to(regions.dtype)  # (B, C, R)
        return self.gate(hidden).sigmoid() * (looked_at @ regions), weights

    def choose(self, weights, choices):
        """The shares (B, C, R) in which the context is mixed from the regions: the expectation over the weights."""
        return weights


class SoftAttention(Attention):
    """Additive attention: equation 4, whose scoring network is that of Bahdanau et al. (2015)."""

    def __init__(self, region_size, hidden_size, attention_size):
        super().__init__(region_size, hidden_size, attention_size)
        self.score = nn.Linear(attention_size, 1, bias=False)  # softmax takes no notice of a bias

    def scores(self, keys, hidden):
        energy = keys.unsqueeze(1) + self.query(hidden).unsqueeze(2)  # (B, C, R, A), the largest tensor
        if energy.device.type == "cpu":
            # tanh(x) = 2 sigmoid(2 x) - 1, in a third of the time there; of the 1, softmax takes no notice.
            return 2 * self.score(energy.mul_(2).sigmoid_()).squeeze(-1)
        return self.score(energy.tanh_()).squeeze(-1)


class DotAttention(Attention):
    """Scaled dot-product attention ("Attention Is All You Need", Vaswani et al., 2017, equation 1)."""

    def scores(self, keys, hidden):
        return self.query(hidden) @ keys.transpose(1, 2) / math.sqrt(keys.shape[-1])


class HardAttention(SoftAttention):
    """Stochastic attention ("Show, Attend and Tell", section 4.1): while it trains it looks at one region, drawn.

    Half of all looks are at the expectation instead, which steadies the gradient (the paper has all looks at half of
    the images so); looks in eval mode all are, as in the authors' code. `optimization.hard_attention_loss` trains what
    is drawn, `baseline` is the moving average that it needs.
    """

    EXPECTED = 0.5  # share of looks at the expectation

    def __init__(self, region_size, hidden_size, attention_size):
        super().__init__(region_size, hidden_size, attention_size)
        self.register_buffer("baseline", torch.zeros(()))

    def choose(self, weights, choices):
        """One region in half of the looks; appends the choice's log-probability (B, C) to choices, 0 without one."""
        if not self.training:
            return weights
        chosen = draw(weights.detach()).unsqueeze(-1)  # (B, C, 1)
        expected = torch.rand_like(weights[..., :1]) < self.EXPECTED  # (B, C, 1)
        if choices is not None:
            log_probability = weights.gather(-1, chosen).clamp_min(1e-20).log()
            choices.append(log_probability.masked_fill(expected, 0).squeeze(-1))
        return weights.where(expected, torch.zeros_like(weights).scatter(-1, chosen, 1))


class NoAttention(nn.Module):
    """No look at all: a context of width 0, so that of the image only the first state tells (Vinyals et al., 2015).

    Its weights are even, which no caption draws from: they say that every region counts alike.
    """

    def __init__(self, region_size, hidden_size, attention_size):
        super().__init__()
        self.context_size = 0

    @contextmanager
    def over_time(self):
        yield []

    def keys(self, regions):
        return regions[..., :0]

    def forward(self, regions, keys, hidden, choices=None):
        """As `Attention.forward`, with Z = 0."""
        weights = hidden.new_full((*hidden.shape[:2], regions.shape[1]), 1 / regions.shape[1], dtype=torch.float)
        return hidden[..., :0], weights


ATTENTIONS = {"soft": SoftAttention, "dot": DotAttention, "hard": HardAttention, "none": NoAttention}
