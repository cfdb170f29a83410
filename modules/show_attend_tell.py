"""The decoder of "Show, Attend and Tell": a recurrent cell with attention over the regions of an image.

Shapes: B images, R regions, D their width, C captions of an image (beams in a search), E width of a word embedding, A
of the attention, H of the hidden state, Z of the context (D, or 0 without attention), G gates of the cell, V words of
the vocabulary.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from torch import Tensor, nn

from modules.attention import ATTENTIONS, Attended, Attention, HardAttention, NoAttention
from modules.cells import CELLS, Cell, State
from modules.decoders import Nested
from modules.layers import masked_mean
from modules.recurrent import RecurrentDecoder

if TYPE_CHECKING:
    from models import ModelSettings


class ShowAttendTell(RecurrentDecoder):
    """Recurrent decoder with attention ("Show, Attend and Tell", Xu et al., 2015, sections 3.1.2 and 4.2).

    A state is a tuple of (B, C, H), those of the top layer first.

    Args:
        settings: cell, attention, image_first (the mean region is the first input word, as in "Show and Tell", Vinyals
            et al., 2015, section 3.1, and does not set the initial state), layers (the first reads the word and the
            context, each other one the layer below it) and the sizes.
        vocab_size, region_dim: V and D.
    """

    def __init__(self, settings: ModelSettings, *, vocab_size: int, region_dim: int) -> None:
        super().__init__(settings, vocab_size)
        embed_dim, hidden_dim, layers = settings.embed_dim, settings.hidden_dim, settings.layers
        attention, cell, top_cell = self.choose_parts(settings)
        self.attention = attention(region_dim=region_dim, hidden_dim=hidden_dim, attention_dim=settings.attention_dim)
        context_dim = self.attention.context_dim
        self.state_shape = layers * cell.NUM_STATES, hidden_dim  # tensors of a state, H
        self.init_hidden = nn.ModuleList(
            nn.Linear(region_dim, hidden_dim) for _ in range(0 if settings.image_first else self.state_shape[0])
        )
        self.image_proj = nn.Linear(region_dim, embed_dim) if settings.image_first else None
        self.hidden_proj = nn.Linear(hidden_dim, embed_dim)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of the empty weights for a zero-width context
            cells = [cell] * (layers - 1) + [top_cell]
            self.cell = cells[0](embed_dim=embed_dim, context_dim=context_dim, hidden_dim=hidden_dim)
            self.upper_cells = nn.ModuleList(
                each(embed_dim=hidden_dim, context_dim=0, hidden_dim=hidden_dim) for each in cells[1:]
            )
            self.context_proj = nn.Linear(context_dim, embed_dim, bias=False)
        self.output = nn.Linear(embed_dim, vocab_size)
        self._reset_parameters()

    def choose_parts(
        self, settings: ModelSettings
    ) -> tuple[type[Attention] | type[NoAttention], type[Cell], type[Cell]]:
        """Return the classes of the attention, of the cells, and of the cell of the top layer."""
        cell = CELLS[settings.cell]
        return ATTENTIONS[settings.attention], cell, cell

    @property
    def has_attention(self) -> bool:
        return self.attention.context_dim > 0

    @property
    def baseline(self) -> Tensor | None:
        return self.attention.baseline if isinstance(self.attention, HardAttention) else None

    def take_expectation(self) -> None:
        self.attention.eval()

    def update_baseline(self, loss: float) -> None:
        assert isinstance(self.attention, HardAttention)
        self.attention.update_baseline(loss)

    def keys(self, regions: Tensor, mask: Tensor | None = None) -> Nested:
        """regions (B, R, D), mask (B, R) -> the attention's keys (B, R, A), the mask."""
        return self.attention.keys(regions), mask

    def init_state(self, regions: Tensor, mask: Tensor | None = None) -> State:
        """Compute the state before the first word from the mean region: tuple of (B, 1, H).

        Linear layers with tanh predict it (section 3.1.2). With image_first it is the state of zeros after one time
        step, whose input word is the image and which has no context.
        """
        mean = masked_mean(regions, mask)  # (B, 1, D)
        if self.image_proj is None:
            return tuple(layer(mean).tanh() for layer in self.init_hidden)
        num_states, hidden_dim = self.state_shape
        state = (mean.new_zeros(len(mean), 1, hidden_dim),) * num_states
        return self._update_state(self._word_gates(self.image_proj(mean)), None, state)

    def _word_gates(self, embedded: Tensor) -> Tensor:
        return self.cell.words(embedded)

    def _time_step(self, word_gates: Tensor, regions: Tensor, keys: Nested, state: State) -> tuple[Attended, State]:
        """Attend with the top layer's hidden state (equations 4 to 6 and 13), then update the cells (1 to 3)."""
        region_keys, mask = keys
        attended = self.attention(regions, region_keys, state[0], mask)
        return attended, self._update_state(word_gates, attended.context, state)

    def _update_state(self, word_gates: Tensor, context: Tensor | None, state: State) -> State:
        """Update the cells from the first layer to the top one, with dropout in between as in torch's LSTM.

        word_gates (B, C, G H), context (B, C, Z), state of (B, C, H), top layer first -> the next state.
        """
        n = self.cell.NUM_STATES
        next_state = layer_state = self.cell(word_gates, context, state[-n:])
        for i, cell in enumerate(self.upper_cells, start=1):
            assert isinstance(cell, Cell)
            below = self.dropout(layer_state[0])  # (B, C, H)
            layer_state = cell(cell.words(below), below[..., :0], state[-n * (i + 1) : -n * i])
            next_state = (*layer_state, *next_state)
        return next_state

    def _logits(self, embedded: Tensor, hidden: Tensor, context: Tensor) -> Tensor:
        """Predict the next word by the deep output layer (equation 7), with the tanh and dropout of the authors' code.

        embedded (..., E), hidden (..., H), context (..., Z) -> (..., V).
        """
        output = embedded + self.hidden_proj(hidden) + self.context_proj(context)  # (..., E)
        return self.output(self.dropout(output.tanh()))
