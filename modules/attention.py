"""Attention over the regions of an image, computed before each word.

Shapes: B images, R regions, D their width, C captions of an image, A width of the attention, H of the hidden state,
Z of the context. alpha (B, C, R) are the attention weights, exactly 0 where a mask (B, R) says that there is no region.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from modules.layers import additive_scores, mask_scores, sample_categorical


class Attention(nn.Module):
    """Gated attention: the context is a weighted mean of the regions, scaled by a gate.

    Source: "Show, Attend and Tell" (Xu et al., 2015), equations 5 and 13 and section 4.2.1. A subclass implements
    `scores`.
    """

    def __init__(self, *, region_dim: int, hidden_dim: int, attention_dim: int) -> None:
        super().__init__()
        self.context_dim = region_dim  # Z
        self.keys = nn.Linear(region_dim, attention_dim)  # independent of the words: once per image
        self.query = nn.Linear(hidden_dim, attention_dim, bias=False)
        self.gate = nn.Linear(hidden_dim, 1)

    def forward(
        self, regions: Tensor, keys: Tensor, hidden: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """regions (B, R, D), keys (B, R, A), hidden (B, C, H), mask (B, R) -> context (B, C, Z), alpha (B, C, R)."""
        alpha = mask_scores(self.scores(keys, hidden), mask).softmax(dim=-1)  # (B, C, R)
        mix = self.mix(alpha).to(regions.dtype)  # (B, C, R)
        return self.gate(hidden).sigmoid() * (mix @ regions), alpha

    def scores(self, keys: Tensor, hidden: Tensor) -> Tensor:
        """Unnormalized scores: keys (B, R, A), hidden (B, C, H) -> (B, C, R)."""
        raise NotImplementedError

    def mix(self, alpha: Tensor) -> Tensor:
        """The weights (B, C, R) of the regions in the context: alpha itself, so that the context is an expectation."""
        return alpha


class SoftAttention(Attention):
    """Additive attention: "Show, Attend and Tell", equation 4, with the scoring network of Bahdanau et al. (2015)."""

    def __init__(self, *, region_dim: int, hidden_dim: int, attention_dim: int) -> None:
        super().__init__(region_dim=region_dim, hidden_dim=hidden_dim, attention_dim=attention_dim)
        self.score = nn.Linear(attention_dim, 1, bias=False)  # softmax ignores a bias

    def scores(self, keys: Tensor, hidden: Tensor) -> Tensor:
        """As `Attention.scores`: score(tanh(keys + query(hidden)))."""
        return additive_scores(keys, self.query(hidden), self.score.weight[0])


class DotAttention(Attention):
    """Scaled dot-product attention ("Attention Is All You Need", Vaswani et al., 2017, equation 1)."""

    def scores(self, keys: Tensor, hidden: Tensor) -> Tensor:
        """As `Attention.scores`: query(hidden) . keys / sqrt(A)."""
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
        self._recorded: list[Tensor] | None = None

    def mix(self, alpha: Tensor) -> Tensor:
        """As `Attention.mix`: in training a one-hot sample (B, C, R), or alpha with probability SOFT_PROB."""
        if not self.training:
            return alpha
        sampled = sample_categorical(alpha.detach()).unsqueeze(-1)  # (B, C, 1)
        soft = torch.rand_like(alpha[..., :1]) < self.SOFT_PROB  # (B, C, 1)
        if self._recorded is not None:
            log_probs = alpha.gather(-1, sampled).clamp_min(1e-20).log()
            self._recorded.append(log_probs.masked_fill(soft, 0).squeeze(-1))
        return alpha.where(soft, torch.zeros_like(alpha).scatter(-1, sampled, 1))

    @contextlib.contextmanager
    def record_samples(self) -> Iterator[list[Tensor]]:
        """In this context the list gets the log-probabilities (B, C) of the samples of each word.

        They are 0 where the expectation is taken.
        """
        self._recorded = recorded = []
        try:
            yield recorded
        finally:
            self._recorded = None

    def update_baseline(self, loss: Tensor | float) -> None:
        """Update the baseline with the mean loss () per word of a step: moving average of decay 0.9 (section 4.1)."""
        self.baseline.copy_(torch.where(self.baseline == 0, loss, 0.9 * self.baseline + 0.1 * loss))


class NoAttention(nn.Module):
    """No attention: zero-width context and uniform placeholder weights; the image only sets the initial state.

    That is the decoder of "Show and Tell" (Vinyals et al., 2015), whose image is the LSTM's first input (image_first).
    """

    gate = None

    def __init__(self, *, region_dim: int, hidden_dim: int, attention_dim: int) -> None:
        super().__init__()
        self.context_dim = 0

    def keys(self, regions: Tensor) -> Tensor:
        """regions (B, R, D) -> keys (B, R, 0)."""
        return regions[..., :0]

    def forward(
        self, regions: Tensor, keys: Tensor, hidden: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `Attention.forward`, with Z = 0 and all weights alike."""
        scores = hidden.new_zeros((*hidden.shape[:2], regions.shape[1]))
        return hidden[..., :0], mask_scores(scores, mask).softmax(dim=-1)


class AdaptiveAttention(nn.Module):
    """Attention to the regions and to a visual sentinel, which holds what the decoder knows without looking.

    Source: "Knowing When to Look" (Lu et al., 2017), equations 6 to 8, 11 and 12. A linear layer with ReLU gives the
    sentinel the width of a region, as in the authors' code.
    """

    def __init__(self, *, region_dim: int, hidden_dim: int, attention_dim: int) -> None:
        super().__init__()
        self.context_dim = region_dim  # Z
        self.keys = nn.Linear(region_dim, attention_dim)  # independent of the words: once per image
        self.query = nn.Linear(hidden_dim, attention_dim, bias=False)
        self.sentinel_proj = nn.Linear(hidden_dim, region_dim)
        self.sentinel_key = nn.Linear(region_dim, attention_dim)
        self.score = nn.Linear(attention_dim, 1, bias=False)  # softmax ignores a bias
        self.gate = nn.Identity()  # it is given the logit of 1 - beta: see `modules.decoders.Decoder.gate`

    def forward(
        self, regions: Tensor, keys: Tensor, hidden: Tensor, sentinel: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `Attention.forward`, with the sentinel (B, C, H) -> context (B, C, D), alpha (B, C, R).

        alpha is the softmax over the regions alone (equation 7). beta, the sentinel's weight in the softmax over the
        regions and the sentinel (equation 12), needs no second one: 1 - beta = sigmoid(log sum exp(z) - z_sentinel).
        """
        query = self.query(hidden)  # (B, C, A)
        sentinel = self.sentinel_proj(sentinel).relu()  # (B, C, D)
        scores = mask_scores(additive_scores(keys, query, self.score.weight[0]), mask)  # (B, C, R), z
        sentinel_score = self.score((self.sentinel_key(sentinel) + query).tanh()).float()  # (B, C, 1)
        beta = 1 - self.gate(scores.logsumexp(dim=-1, keepdim=True) - sentinel_score).sigmoid()  # (B, C, 1)
        alpha = scores.softmax(dim=-1)
        attended = alpha.to(regions.dtype) @ regions  # (B, C, D)
        return torch.lerp(attended, sentinel.to(attended.dtype), beta.to(attended.dtype)), alpha


ATTENTIONS = {
    "soft": SoftAttention,
    "dot": DotAttention,
    "hard": HardAttention,
    "none": NoAttention,
}
