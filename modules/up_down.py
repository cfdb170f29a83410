"""The Up-Down decoder: one LSTM attends to the regions, another one predicts the words.

Shapes: B images, R regions, D their width, C captions of an image (beams in a search), E width of a word embedding, A
of the attention, H of the hidden states, V words of the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from modules.attention import Attended, SoftAttention
from modules.cells import LSTMCell, State
from modules.decoders import Nested
from modules.layers import masked_mean
from modules.recurrent import RecurrentDecoder

if TYPE_CHECKING:
    from models import ModelSettings


class UpDownDecoder(RecurrentDecoder):
    """Decoder of "Bottom-Up and Top-Down Attention" (Anderson et al., 2018, arXiv 1707.07998, section 3.2).

    A state is (h2, c2, h1, c1), each (B, C, H): the language LSTM's, then the attention LSTM's. All are zero before the
    first word.

    Args:
        settings: embed_dim, attention_dim and hidden_dim are E, A and H; dropout is on the word embeddings and before
            the output layer.
        vocab_size, region_dim: V and D.
    """

    def __init__(self, settings: ModelSettings, *, vocab_size: int, region_dim: int) -> None:
        super().__init__(settings, vocab_size)
        embed_dim, attention_dim, hidden_dim = settings.embed_dim, settings.attention_dim, settings.hidden_dim
        self.hidden_dim = hidden_dim
        # The attention LSTM reads the word, the mean region (by a map of its own) and h2 (as its cell's context).
        self.attention_lstm = LSTMCell(embed_dim=embed_dim, context_dim=hidden_dim, hidden_dim=hidden_dim)
        self.mean_region = nn.Linear(region_dim, 4 * hidden_dim, bias=False)
        self.attention = SoftAttention(
            region_dim=region_dim, hidden_dim=hidden_dim, attention_dim=attention_dim, gated=False
        )
        # The language LSTM reads the attended region in place of a word.
        self.language_lstm = LSTMCell(embed_dim=region_dim, context_dim=hidden_dim, hidden_dim=hidden_dim)
        self.output = nn.Linear(hidden_dim, vocab_size)
        self._reset_parameters()

    def keys(self, regions: Tensor, mask: Tensor | None = None) -> Nested:
        """regions (B, R, D), mask (B, R) -> attention's keys (B, R, A), mean region's gates (B, 1, 4 H), the mask."""
        return self.attention.keys(regions), self.mean_region(masked_mean(regions, mask)), mask

    def init_state(self, regions: Tensor, mask: Tensor | None = None) -> State:
        """Return zeros: 4 tensors (B, 1, H)."""
        return (regions.new_zeros(len(regions), 1, self.hidden_dim),) * 4

    def _word_gates(self, embedded: Tensor) -> Tensor:
        return self.attention_lstm.words(embedded)  # the language LSTM reads no word

    def _time_step(self, word_gates: Tensor, regions: Tensor, keys: Nested, state: State) -> tuple[Attended, State]:
        """Run the attention LSTM (equation 2), attend with its h1 (3 to 5), run the language LSTM (6)."""
        h2, c2, h1, c1 = state
        region_keys, mean_gates, mask = keys
        h1, c1 = self.attention_lstm(word_gates + mean_gates, h2, (h1, c1))
        attended = self.attention(regions, region_keys, h1, mask)
        h2, c2 = self.language_lstm(self.language_lstm.words(attended.context), h1, (h2, c2))
        return attended, (h2, c2, h1, c1)

    def _logits(self, embedded: Tensor, hidden: Tensor, context: Tensor) -> Tensor:
        """Predict the next word from the language LSTM's h2 (equation 7): hidden (..., H) -> (..., V)."""
        return self.output(self.dropout(hidden))
