"""The decoder of "Knowing When to Look", which weighs the image against a visual sentinel at each word.

The sentinel is what the LSTM's memory offers for the word: if it outweighs the regions, the decoder ignores the image.

Shapes: B images, R regions, D their width, C captions of an image (beams in a search), A width of the attention, H of
the hidden state, G gates of the cell that reads the words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from modules.attention import Attended, SoftAttention
from modules.cells import Cell, LSTMCell, State
from modules.decoders import Nested
from modules.layers import mask_scores, masked_mean
from modules.show_attend_tell import ShowAttendTell

if TYPE_CHECKING:
    from models import ModelSettings


class SentinelLSTMCell(LSTMCell):
    """LSTMCell with a fifth gate, that of the visual sentinel (Lu et al., 2017, section 2.3)."""

    NUM_GATES = 5

    def forward(self, word_gates: Tensor, context: Tensor | None, state: State) -> State:
        """Compute one time step, with G = 5: the LSTM's gates, then the sentinel's.

        Returns the next hidden state, cell state m_t and sentinel, (..., H) each. The gate is
        g = sigmoid(W_x x_t + W_h h_{t-1}) (equation 9), the sentinel g * tanh(m_t) (equation 10).
        """
        gates = self.input_gates(word_gates, context) + self.hidden(state[0])
        *lstm_gates, sentinel_gate = gates.chunk(5, dim=-1)
        hidden, cell = self.update(*lstm_gates, cell=state[1])
        return hidden, cell, sentinel_gate.sigmoid() * cell.tanh()


class AdaptiveAttention(SoftAttention):
    """Attention to the regions and to a visual sentinel (Lu et al., 2017, equations 6 to 8, 11 and 12).

    A linear layer with ReLU gives the sentinel the width of a region, as in the authors' code.
    """

    def __init__(self, *, region_dim: int, hidden_dim: int, attention_dim: int) -> None:
        super().__init__(region_dim=region_dim, hidden_dim=hidden_dim, attention_dim=attention_dim, gated=False)
        self.sentinel_proj = nn.Linear(hidden_dim, region_dim)
        self.sentinel_key = nn.Linear(region_dim, attention_dim)

    def forward(
        self, regions: Tensor, keys: Tensor, hidden: Tensor, mask: Tensor | None = None, *, sentinel: Tensor
    ) -> Attended:
        """Attend as `Attention.forward` does, with the sentinel (B, C, H). The gate is 1 - beta.

        beta is the sentinel's weight in the softmax over the regions and the sentinel (equation 12). Since
        1 - beta = sigmoid(log sum exp(z) - z_sentinel), that softmax is not computed.
        """
        sentinel = self.sentinel_proj(sentinel).relu()  # (B, C, D)
        z = mask_scores(self.scores(keys, hidden), mask)  # (B, C, R), equation 6
        z_sentinel = self.score(torch.tanh(self.sentinel_key(sentinel) + self.query(hidden))).float()  # (B, C, 1)
        alpha = z.softmax(dim=-1)  # equation 7
        attended = alpha.to(regions.dtype) @ regions  # (B, C, D), equation 8
        gate = torch.sigmoid(z.logsumexp(dim=-1, keepdim=True) - z_sentinel)  # (B, C, 1)
        beta = (1 - gate).to(attended.dtype)
        context = torch.lerp(attended, sentinel.to(attended.dtype), beta)  # equation 11
        return Attended(context, alpha, gate.squeeze(-1))


class AdaptiveDecoder(ShowAttendTell):
    """Recurrent decoder of "Knowing When to Look" (Lu et al., 2017, arXiv 1612.01887, sections 2.2 and 2.3).

    An LSTM reads the word and the mean region. Then its new hidden state attends to the regions and to its sentinel.
    With several layers these are the top layer's, as in the authors' code. Unlike in the paper, the output layer and
    the initial state are those of `ShowAttendTell`.
    """

    attention: AdaptiveAttention

    def choose_parts(self, settings: ModelSettings) -> tuple[type[AdaptiveAttention], type[Cell], type[Cell]]:
        return AdaptiveAttention, LSTMCell, SentinelLSTMCell

    def keys(self, regions: Tensor, mask: Tensor | None = None) -> Nested:
        """regions (B, R, D), mask (B, R) -> attention's keys (B, R, A), mean region's gates (B, 1, G H), the mask."""
        return self.attention.keys(regions), self.cell.context(masked_mean(regions, mask)), mask

    def init_state(self, regions: Tensor, mask: Tensor | None = None) -> State:
        """Compute the initial state of `ShowAttendTell`, without the sentinel that image_first appends."""
        return super().init_state(regions, mask)[: self.state_shape[0]]

    def _time_step(self, word_gates: Tensor, regions: Tensor, keys: Nested, state: State) -> tuple[Attended, State]:
        """Update the LSTM and its sentinel (equations 9 and 10), then attend (equations 6 to 8, 11 and 12)."""
        region_keys, mean_gates, mask = keys
        *next_state, sentinel = self._update_state(word_gates + mean_gates, None, state)
        return self.attention(regions, region_keys, next_state[0], mask, sentinel=sentinel), tuple(next_state)

    def _update_state(self, word_gates: Tensor, context: Tensor | None, state: State) -> State:
        """Update the state as `ShowAttendTell` does, and append the top cell's sentinel (B, C, H)."""
        hidden, cell, sentinel, *below = super()._update_state(word_gates, context, state)
        return hidden, cell, *below, sentinel
