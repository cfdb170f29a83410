"""The decoder of sgrvinod's PyTorch tutorial on "Show, Attend and Tell", for loading its checkpoints.

Shapes: B images, R regions, D their width, C captions of an image (beams in a search), E width of a word embedding, A
of the attention, H of the hidden state, V words of the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from modules.attention import Attended, SoftAttention
from modules.cells import LSTMCell, State
from modules.cpu import Dropout
from modules.decoders import Nested
from modules.layers import masked_mean
from modules.recurrent import RecurrentDecoder

if TYPE_CHECKING:
    from models import ModelSettings


class SgrvinodAttention(SoftAttention):
    """Additive attention with ReLU in place of tanh, and a gate for each feature of the context.

    `Attended.gate` is None, since so many gates cannot be shown beside a word.
    """

    def __init__(self, *, region_dim: int, hidden_dim: int, attention_dim: int) -> None:
        super().__init__(region_dim=region_dim, hidden_dim=hidden_dim, attention_dim=attention_dim)
        self.gate = nn.Linear(hidden_dim, region_dim)

    def forward(self, regions: Tensor, keys: Tensor, hidden: Tensor, mask: Tensor | None = None) -> Attended:
        return super().forward(regions, keys, hidden, mask)._replace(gate=None)

    def scores(self, keys: Tensor, hidden: Tensor) -> Tensor:
        """Score each region: w . relu(W_a a_i + W_h h)."""
        return self.score((keys.unsqueeze(1) + self.query(hidden).unsqueeze(2)).relu()).squeeze(-1)


class SgrvinodDecoder(RecurrentDecoder):
    """LSTM with attention that predicts a word from its hidden state alone.

    Source: models.py of https://github.com/sgrvinod/a-PyTorch-Tutorial-to-Image-Captioning. It differs from "Show,
    Attend and Tell" (Xu et al., 2015) in its attention, in an initial state without tanh, and in an output layer on the
    hidden state in place of the deep one. The tutorial's second biases (of the query and of the LSTM) are left out, as
    they only add to the first. The initialization is that of `ShowAttendTell`.

    Args:
        settings: embed_dim, attention_dim and hidden_dim are E, A and H; dropout is only before the output layer.
        vocab_size, region_dim: V and D.
    """

    def __init__(self, settings: ModelSettings, *, vocab_size: int, region_dim: int) -> None:
        super().__init__(settings, vocab_size)
        embed_dim, attention_dim, hidden_dim = settings.embed_dim, settings.attention_dim, settings.hidden_dim
        self.dropout = Dropout(0.0)  # the tutorial has none on the word embeddings
        self.attention = SgrvinodAttention(region_dim=region_dim, hidden_dim=hidden_dim, attention_dim=attention_dim)
        self.init_hidden = nn.Linear(region_dim, hidden_dim)
        self.init_cell = nn.Linear(region_dim, hidden_dim)
        self.cell = LSTMCell(embed_dim=embed_dim, context_dim=region_dim, hidden_dim=hidden_dim)
        self.output_dropout = Dropout(settings.dropout)
        self.output = nn.Linear(hidden_dim, vocab_size)
        self._reset_parameters()

    def keys(self, regions: Tensor, mask: Tensor | None = None) -> Nested:
        """regions (B, R, D), mask (B, R) -> the attention's keys (B, R, A), the mask."""
        return self.attention.keys(regions), mask

    def init_state(self, regions: Tensor, mask: Tensor | None = None) -> State:
        """Map the mean region to the hidden and cell state (B, 1, H)."""
        mean = masked_mean(regions, mask)  # (B, 1, D)
        return self.init_hidden(mean), self.init_cell(mean)

    def _word_gates(self, embedded: Tensor) -> Tensor:
        return self.cell.words(embedded)

    def _time_step(self, word_gates: Tensor, regions: Tensor, keys: Nested, state: State) -> tuple[Attended, State]:
        region_keys, mask = keys
        attended = self.attention(regions, region_keys, state[0], mask)
        return attended, self.cell(word_gates, attended.context, state)

    def _logits(self, embedded: Tensor, hidden: Tensor, context: Tensor) -> Tensor:
        return self.output(self.output_dropout(hidden))
