"""Recurrent cells.

Shapes: E width of a word embedding, Z of the context, H of the hidden state; G gates, candidate included.
"""

from torch import Tensor, lerp, nn

State = tuple[Tensor, ...]  # (..., H) each, the hidden state first


class Cell(nn.Module):
    """The linear maps of a recurrent cell: from the word, the context and the hidden state to its gates.

    The word's part, `words`, does not depend on the state, so teacher forcing computes it for all steps in one
    matmul. A state has NUM_STATES tensors.
    """

    NUM_GATES = NUM_STATES = 1

    def __init__(self, *, embed_dim: int, context_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.words = nn.Linear(embed_dim, self.NUM_GATES * hidden_dim)
        self.context = nn.Linear(context_dim, self.NUM_GATES * hidden_dim, bias=False)
        self.hidden = nn.Linear(hidden_dim, self.NUM_GATES * hidden_dim, bias=False)

    def reset_parameters(self) -> None:
        """Make the recurrent weights orthogonal, so that they keep the norm of the state (Saxe et al., 2014)."""
        for gate in self.hidden.weight.data.chunk(self.NUM_GATES):
            nn.init.orthogonal_(gate)

    def input_gates(self, word_gates: Tensor, context: Tensor | None) -> Tensor:
        """Add the context's part to that of the word: word_gates (..., G H), context (..., Z) -> (..., G H)."""
        return word_gates if context is None else word_gates + self.context(context)

    def forward(self, word_gates: Tensor, context: Tensor | None, state: State) -> State:
        """Compute one time step.

        word_gates (..., G H) from `words`, context (..., Z), state -> next state.
        The context is None if there is none, or if word_gates already include its part.
        """
        raise NotImplementedError


class RNNCell(Cell):
    """torch's RNNCell with tanh (Elman, 1990), without its second bias."""

    def forward(self, word_gates: Tensor, context: Tensor | None, state: State) -> State:
        """Compute one time step, with G = 1."""
        return ((self.input_gates(word_gates, context) + self.hidden(state[0])).tanh(),)


class GRUCell(Cell):
    """torch's GRUCell (Cho et al., 2014, equations 5 to 8, reset applied after the matmul), without its second bias."""

    NUM_GATES = 3

    def forward(self, word_gates: Tensor, context: Tensor | None, state: State) -> State:
        """Compute one time step, with G = 3: reset gate, update gate, candidate."""
        reset, update, candidate = self.input_gates(word_gates, context).chunk(3, dim=-1)
        hidden_reset, hidden_update, hidden_candidate = self.hidden(state[0]).chunk(3, dim=-1)
        candidate = (candidate + (reset + hidden_reset).sigmoid() * hidden_candidate).tanh()
        return (lerp(candidate, state[0].to(candidate.dtype), (update + hidden_update).sigmoid()),)


class LSTMCell(Cell):
    """torch's LSTMCell ("Show, Attend and Tell", Xu et al., 2015, equations 1 to 3), without its second bias."""

    NUM_GATES, NUM_STATES = 4, 2

    def reset_parameters(self) -> None:
        """Initialize the forget gate's bias with 1 (Jozefowicz et al., 2015), the rest as for other cells."""
        super().reset_parameters()
        self.words.bias.data.chunk(self.NUM_GATES)[1].fill_(1)

    def forward(self, word_gates: Tensor, context: Tensor | None, state: State) -> State:
        """Compute one time step, with G = 4: input gate, forget gate, candidate, output gate; state: hidden, cell."""
        gates = self.input_gates(word_gates, context) + self.hidden(state[0])
        return self.update(*gates.chunk(4, dim=-1), cell=state[1])

    @staticmethod
    def update(
        input_gate: Tensor, forget_gate: Tensor, candidate: Tensor, output_gate: Tensor, *, cell: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the next hidden and cell state: gates before their nonlinearity and the cell state, (..., H) each."""
        cell = forget_gate.sigmoid() * cell + input_gate.sigmoid() * candidate.tanh()
        return output_gate.sigmoid() * cell.tanh(), cell


CELLS = {"lstm": LSTMCell, "gru": GRUCell, "rnn": RNNCell}
