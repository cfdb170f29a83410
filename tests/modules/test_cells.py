"""The recurrent cells against torch's."""

import pytest
import torch

from conftest import torch_cell
from modules.cells import CELLS

DIMS = {"embed_dim": 5, "context_dim": 6, "hidden_dim": 8}


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_equals_torchs(name):
    torch.manual_seed(0)
    cell = CELLS[name](**DIMS)
    kinds = {"lstm": torch.nn.LSTMCell, "gru": torch.nn.GRUCell, "rnn": torch.nn.RNNCell}
    reference = torch_cell(cell, kinds[name], cell.words.weight, cell.context.weight)
    words, context = torch.randn(3, 5), torch.randn(3, 6)
    state = tuple(torch.randn(3, 8) for _ in range(cell.NUM_STATES))
    expected = reference(torch.cat([words, context], dim=1), state if cell.NUM_STATES > 1 else state[0])
    torch.testing.assert_close(cell(cell.words(words), context, state), expected if name == "lstm" else (expected,))


@pytest.mark.parametrize("name", CELLS)
def test_recurrent_weights_start_orthogonal_and_the_forget_gate_bias_at_one(name):
    cell = CELLS[name](**DIMS)
    cell.reset_parameters()
    for gate in cell.hidden.weight.chunk(cell.NUM_GATES):
        torch.testing.assert_close(gate @ gate.t(), torch.eye(8))
    if name == "lstm":
        assert cell.words.bias.chunk(4)[1].tolist() == [1] * 8
