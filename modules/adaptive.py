"""The recurrent decoder with adaptive attention, which weighs the image against a visual sentinel at each word.

Shapes: B images, R regions, D their width, C captions of an image (beams in a search), A width of the attention, H of
the hidden state, G gates of the cell that reads the words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from modules.attention import AdaptiveAttention
from modules.cells import Cell, LSTMCell, SentinelLSTMCell
from modules.decoders import Nested
from modules.layers import masked_mean
from modules.show_attend_tell import ShowAttendTell

if TYPE_CHECKING:
    from models import ModelSettings


class AdaptiveDecoder(ShowAttendTell):
    """Recurrent decoder of "Knowing When to Look" (Lu et al., 2017, arXiv 1612.01887, sections 2.2 and 2.3).

    An LSTM reads the word and the mean region. Then its new hidden state attends to the regions and to its sentinel,
    with several layers that of the top one, as in the authors' code. Other than in the paper, the output layer and the
    initial state are those of `ShowAttendTell`.
    """

    attention: AdaptiveAttention

    def choose_parts(self, settings: ModelSettings) -> tuple[type[nn.Module], type[Cell], type[Cell]]:
        """Return the classes of the attention, of the cells, and of the cell of the top layer."""
        return AdaptiveAttention, LSTMCell, SentinelLSTMCell

    def keys(self, regions: Tensor, mask: Tensor | None = None) -> Nested:
        """What the words share: (B, R, D), mask (B, R)
        -> the attention's keys (B, R, A), the mean region's gates (B, 1, G H), the mask.
        """
        return self.attention.keys(regions), self.cell.context(masked_mean(regions, mask)), mask

    def init_state(self, regions: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """As `ShowAttendTell.init_state`, without the sentinel that image_first gives."""
        return super().init_state(regions, mask)[: self.state_shape[0]]

    def _recurrent_step(
        self, word_gates: Tensor, regions: Tensor, keys: Nested, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """The LSTM with its sentinel (equations 9 and 10), then attention (6 to 8, 11 and 12).

        word_gates (B, C, G H), regions (B, R, D), keys as `keys` returns them, state tuple of (B, C, H)
        -> context (B, C, D), alpha (B, C, R), state.
        """
        region_keys, mean_gates, mask = keys
        next_state = self._update_state(word_gates + mean_gates, None, state)
        hidden, sentinel = next_state[0], next_state[-1]
        context, alpha = self.attention(regions, region_keys, hidden, sentinel, mask)
        return context, alpha, next_state[:-1]

    def _update_state(
        self, word_gates: Tensor, context: Tensor | None, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """As `ShowAttendTell._update_state`, with the top cell's sentinel (B, C, H) at the end."""
        hidden, cell, sentinel, *below = super()._update_state(word_gates, context, state)
        return hidden, cell, *below, sentinel
