"""Attention over the regions of an image, computed before each word.

Shapes: B images, R regions, D their width, C captions of an image, A width of the attention, H of the hidden state,
Z of the context.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from modules import cpu
from modules.layers import mask_scores


class Attended(NamedTuple):
    """Result of attending to the regions at one word of each caption."""

    context: Tensor  # (B, C, Z)
    alpha: Tensor  # (B, C, R) attention weights, exactly 0 for masked regions
    gate: Tensor | None = None  # (B, C) weight of the image from 0 to 1; None: there is no such number
    log_probs: Tensor | None = None  # (B, C) of regions sampled in training, 0 where none was; None: no sampling


class Attention(nn.Module):
    """Gated attention: the context is a weighted mean of the regions, scaled by a gate.

    Source: "Show, Attend and Tell" (Xu et al., 2015), equations 5 and 13 and section 4.2.1. A subclass implements
    `scores`.

    Args:
        region_dim, hidden_dim, attention_dim: D, H and A.
        gated: scale the context by a gate.
    """

    def __init__(self, *, region_dim: int, hidden_dim: int, attention_dim: int, gated: bool = True) -> None:
        super().__init__()
        self.context_dim = region_dim  # Z
        self.keys = nn.Linear(region_dim, attention_dim)  # independent of the words: once per image
        self.query = nn.Linear(hidden_dim, attention_dim, bias=False)
        self.gate = nn.Linear(hidden_dim, 1) if gated else None

    def forward(self, regions: Tensor, keys: Tensor, hidden: Tensor, mask: Tensor | None = None) -> Attended:
        """Attend to regions (B, R, D) with keys (B, R, A), hidden states (B, C, H) and a mask (B, R)."""
        alpha = mask_scores(self.scores(keys, hidden), mask).softmax(dim=-1)  # (B, C, R)
        weights, log_probs = self.mix(alpha)
        gate = None if self.gate is None else self.gate(hidden).sigmoid()  # (B, C, 1)
        context = weights.to(regions.dtype) @ regions  # (B, C, D)
        if gate is None:
            return Attended(context, alpha, None, log_probs)
        return Attended(gate * context, alpha, gate.squeeze(-1), log_probs)

    def scores(self, keys: Tensor, hidden: Tensor) -> Tensor:
        """Compute unnormalized scores: keys (B, R, A), hidden (B, C, H) -> (B, C, R)."""
        raise NotImplementedError

    def mix(self, alpha: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the weights (B, C, R) of the regions in the context, and `Attended.log_probs`.

        The weights are alpha (B, C, R) itself here: the context is an expectation.
        """
        return alpha, None


class SoftAttention(Attention):
    """Additive attention: "Show, Attend and Tell", equation 4, with the scoring network of Bahdanau et al. (2015)."""

    def __init__(self, *, region_dim: int, hidden_dim: int, attention_dim: int, gated: bool = True) -> None:
        super().__init__(region_dim=region_dim, hidden_dim=hidden_dim, attention_dim=attention_dim, gated=gated)
        self.score = nn.Linear(attention_dim, 1, bias=False)  # softmax ignores a bias

    def scores(self, keys: Tensor, hidden: Tensor) -> Tensor:
        """Score each region: w . tanh(W_a a_i + W_h h)."""
        if cpu.applies_to(keys):
            return cpu.additive_scores(keys, self.query(hidden), self.score.weight[0])
        # (B, 1, R, A) + (B, C, 1, A) -> (B, C, R, A) -> (B, C, R)
        return self.score((keys.unsqueeze(1) + self.query(hidden).unsqueeze(2)).tanh_()).squeeze(-1)


class DotAttention(Attention):
    """Scaled dot-product attention ("Attention Is All You Need", Vaswani et al., 2017, equation 1)."""

    def scores(self, keys: Tensor, hidden: Tensor) -> Tensor:
        """Score each region: (W_h h) . (W_a a_i) / sqrt(A)."""
        return self.query(hidden) @ keys.transpose(1, 2) / math.sqrt(keys.shape[-1])


class HardAttention(SoftAttention):
    """Stochastic "hard" attention ("Show, Attend and Tell", section 4.1): training samples one region per word.

    With probability SOFT_PROB a step takes the expectation instead, which reduces the variance of the gradient; the
    paper decides this once per image. In eval mode every step takes the expectation, as in the authors' code.
    `training.losses.hard_attention_loss` trains the sampling, with the moving average `baseline` of the loss.
    """

    SOFT_PROB = 0.5

    baseline: Tensor  # (), 0 before the first update

    def __init__(self, *, region_dim: int, hidden_dim: int, attention_dim: int) -> None:
        super().__init__(region_dim=region_dim, hidden_dim=hidden_dim, attention_dim=attention_dim)
        self.register_buffer("baseline", torch.zeros(()))

    def mix(self, alpha: Tensor) -> tuple[Tensor, Tensor | None]:
        """Sample one region per caption in training, or take the expectation with probability SOFT_PROB."""
        if not self.training:
            return alpha, None
        sampled = cpu.sample_categorical(alpha.detach()).unsqueeze(-1)  # (B, C, 1)
        soft = torch.rand_like(alpha[..., :1]) < self.SOFT_PROB  # (B, C, 1)
        log_probs = alpha.gather(-1, sampled).clamp_min(1e-20).log().masked_fill(soft, 0).squeeze(-1)
        return alpha.where(soft, torch.zeros_like(alpha).scatter(-1, sampled, 1)), log_probs

    def update_baseline(self, loss: Tensor | float) -> None:
        """Update the baseline with the mean loss () per word of a step: moving average of decay 0.9 (section 4.1)."""
        self.baseline.copy_(torch.where(self.baseline == 0, loss, 0.9 * self.baseline + 0.1 * loss))


class NoAttention(nn.Module):
    """No attention: an empty context and uniform weights. The image only sets the initial state.

    With `image_first` it makes the decoder of "Show and Tell" (Vinyals et al., 2015).
    """

    def __init__(self, *, region_dim: int, hidden_dim: int, attention_dim: int) -> None:
        super().__init__()
        self.context_dim = 0

    def keys(self, regions: Tensor) -> Tensor:
        """regions (B, R, D) -> keys (B, R, 0)."""
        return regions[..., :0]

    def forward(self, regions: Tensor, keys: Tensor, hidden: Tensor, mask: Tensor | None = None) -> Attended:
        """Return a context of width 0 and equal weights for all regions; arguments as in `Attention.forward`."""
        scores = hidden.new_zeros((*hidden.shape[:2], regions.shape[1]))
        return Attended(hidden[..., :0], mask_scores(scores, mask).softmax(dim=-1))


ATTENTIONS = {
    "soft": SoftAttention,
    "dot": DotAttention,
    "hard": HardAttention,
    "none": NoAttention,
}
