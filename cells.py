"""Recurrent cells: what a decoder remembers from word to word.

Shapes: E units of a word's embedding, Z of the context, H of the hidden state.
"""

from contextlib import contextmanager

import torch
from torch import nn

from layers import LinearOverTime


class Cell(nn.Module):
    """What the three cells share: the gates' parts that come from the word, from the context and from the hidden state.

    The words' part, `words`, depends on no state: teacher forcing computes it for all words in one product.
    A state is a tuple of STATES tensors (..., H), the hidden state first.
    """

    GATES = STATES = 1

    def __init__(self, embedding_size, context_size, hidden_size):
        super().__init__()
        self.words = nn.Linear(embedding_size, self.GATES * hidden_size)
        self.context = LinearOverTime(context_size, self.GATES * hidden_size)
        self.hidden = LinearOverTime(hidden_size, self.GATES * hidden_size)

    def start(self):
        """Let the state turn without growing or fading at first."""
        for gate in self.hidden.weight.data.chunk(self.GATES):
            nn.init.orthogonal_(gate)

    @contextmanager
    def over_time(self):
        """As `LinearOverTime.over_time`."""
        with self.context.over_time(), self.hidden.over_time():
            yield


class RNNCell(Cell):
    """torch's RNNCell with tanh (Elman, 1990), but for its second bias."""

    def forward(self, words, context, state):
        """words (..., H) as `words` makes them, context (..., Z), state tuple of (..., H) -> state."""
        return ((words + self.context(context) + self.hidden(state[0])).tanh(),)


class GRUCell(Cell):
    """torch's GRUCell (Cho et al., 2014, equations 5 to 8, the reset after the product), but for its second bias."""

    GATES = 3

    def forward(self, words, context, state):
        """words (..., 3 H) as `words` makes them, context (..., Z), state tuple of (..., H) -> state."""
        reset, keep, new = (words + self.context(context)).chunk(3, dim=-1)
        hidden_reset, hidden_keep, hidden_new = self.hidden(state[0]).chunk(3, dim=-1)
        new = (new + (reset + hidden_reset).sigmoid() * hidden_new).tanh()
        return (torch.lerp(new, state[0].to(new.dtype), (keep + hidden_keep).sigmoid()),)


class LSTMCell(Cell):
    """torch's LSTMCell ("Show, Attend and Tell", equations 1 to 3), but for its second bias."""

    GATES, STATES = 4, 2

    def start(self):
        """As the other cells, and forget nothing at first (Jozefowicz et al., 2015)."""
        super().start()
        self.words.bias.data.chunk(4)[1].fill_(1)

    def forward(self, words, context, state):
        """words (..., 4 H) as `words` makes them, context (..., Z), state tuple of (..., H) -> state."""
        hidden, memory = state
        gates = words + self.context(context) + self.hidden(hidden)
        take, keep, new, show = gates.chunk(4, dim=-1)
        memory = keep.sigmoid() * memory + take.sigmoid() * new.tanh()
        return show.sigmoid() * memory.tanh(), memory


CELLS = {"lstm": LSTMCell, "gru": GRUCell, "rnn": RNNCell}
