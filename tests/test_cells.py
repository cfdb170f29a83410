"""The recurrent cells against torch's own."""

import pytest
import torch

from cells import CELLS


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_is_torchs(name):
    torch.manual_seed(0)
    cell = CELLS[name](5, 6, 8)
    reference = {"lstm": torch.nn.LSTMCell, "gru": torch.nn.GRUCell, "rnn": torch.nn.RNNCell}[name](11, 8)
    reference.load_state_dict(
        {
            "weight_ih": torch.cat([cell.words.weight, cell.context.weight], dim=1),
            "weight_hh": cell.hidden.weight,
            "bias_ih": cell.words.bias,
            "bias_hh": torch.zeros(8 * cell.GATES),
        }
    )
    words, context = torch.randn(3, 5), torch.randn(3, 6)
    state = tuple(torch.randn(3, 8) for _ in range(cell.STATES))
    expected = reference(torch.cat([words, context], dim=1), state if cell.STATES > 1 else state[0])
    found = cell(cell.words(words), context, state)
    torch.testing.assert_close(found, expected if cell.STATES > 1 else (expected,))


@pytest.mark.parametrize("name", CELLS)
def test_a_state_neither_grows_nor_fades_at_first(name):
    cell = CELLS[name](5, 6, 8)
    cell.start()
    for gate in cell.hidden.weight.chunk(cell.GATES):
        torch.testing.assert_close(gate @ gate.t(), torch.eye(8))
    if name == "lstm":
        assert cell.words.bias.chunk(4)[1].tolist() == [1] * 8
