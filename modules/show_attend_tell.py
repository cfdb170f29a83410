"""The decoder of "Show, Attend and Tell": a recurrent cell with attention over the regions of an image.

Shapes: B images, R regions, D their width, C captions of an image (beams in a search), E width of a word embedding, A
of the attention, H of the hidden state, Z of the context (D, or 0 without attention), G gates of the cell, V words of
the vocabulary.
"""

import warnings

from torch import Tensor, nn

from modules.attention import ATTENTIONS
from modules.cells import CELLS
from modules.layers import init_linear
from modules.recurrent import RecurrentDecoder


class ShowAttendTell(RecurrentDecoder):
    """Recurrent decoder with attention ("Show, Attend and Tell", Xu et al., 2015, sections 3.1.2 and 4.2).

    Args:
        vocab_size, region_dim, embed_dim, attention_dim, hidden_dim: V, D, E, A and H.
        dropout: on the word embeddings and before the output layer.
        cell: a key of `modules.cells.CELLS`.
        attention: a key of `modules.attention.ATTENTIONS`.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        region_dim: int,
        embed_dim: int,
        attention_dim: int,
        hidden_dim: int,
        dropout: float,
        cell: str,
        attention: str,
    ) -> None:
        super().__init__(vocab_size=vocab_size, embed_dim=embed_dim, dropout=dropout)
        self.attention = ATTENTIONS[attention](
            region_dim=region_dim, hidden_dim=hidden_dim, attention_dim=attention_dim
        )
        context_dim = self.attention.context_dim
        self.init_hidden = nn.ModuleList(nn.Linear(region_dim, hidden_dim) for _ in range(CELLS[cell].NUM_STATES))
        self.hidden_proj = nn.Linear(hidden_dim, embed_dim)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of the empty weights for a zero-width context
            self.cell = CELLS[cell](embed_dim=embed_dim, context_dim=context_dim, hidden_dim=hidden_dim)
            self.context_proj = nn.Linear(context_dim, embed_dim, bias=False)
        self.output = nn.Linear(embed_dim, vocab_size)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Small embeddings and Glorot-initialized linear layers.

        With torch's default linear layers the attention starts, and long stays, close to uniform.
        """
        self.reset_embeddings()
        for layer in self.modules():
            if isinstance(layer, nn.Linear) and layer.weight.numel():
                init_linear(layer)
        self.cell.reset_parameters()

    def keys(self, regions: Tensor) -> Tensor:
        """The attention's projection of the regions, the same for all words: (B, R, D) -> (B, R, A)."""
        return self.attention.keys(regions)

    def init_state(self, regions: Tensor) -> tuple[Tensor, ...]:
        """The initial state, predicted from the mean region (section 3.1.2): (B, R, D) -> tuple of (B, 1, H)."""
        mean = regions.mean(dim=1, keepdim=True)  # (B, 1, D)
        return tuple(layer(mean).tanh() for layer in self.init_hidden)

    def _word_gates(self, embedded: Tensor) -> Tensor:
        """As `RecurrentDecoder._word_gates`."""
        return self.cell.words(embedded)

    def _recurrent_step(
        self,
        word_gates: Tensor,
        regions: Tensor,
        keys: Tensor,
        state: tuple[Tensor, ...],
        sampled_log_probs: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Attention (equations 4 to 6 and 13), then the cell (equations 1 to 3).

        word_gates (B, C, G H), regions (B, R, D), keys (B, R, A), state tuple of (B, C, H)
        -> context (B, C, Z), alpha (B, C, R), state.
        """
        context, alpha = self.attention(regions, keys, state[0], sampled_log_probs)
        return context, alpha, self.cell(word_gates, context, state)

    def _logits(self, embedded: Tensor, hidden: Tensor, context: Tensor) -> Tensor:
        """The deep output layer (equation 7), with tanh and dropout as in the authors' code.

        embedded (..., E), hidden (..., H), context (..., Z) -> (..., V).
        """
        output = embedded + self.hidden_proj(hidden) + self.context_proj(context)  # (..., E)
        return self.output(self.dropout(output.tanh()))
