"""The Up-Down decoder against its equations, with two of torch's LSTM cells."""

import pytest
import torch

from conftest import make_tiny_decoder, torch_cell
from modules.decoders import map_tensors
from modules.up_down import UpDownDecoder


@pytest.fixture
def decoder():
    """A random decoder in eval mode, its biases not zero and its gates far from one half."""
    decoder = make_tiny_decoder(UpDownDecoder)
    for parameter in decoder.parameters():
        parameter.data = torch.randn_like(parameter)
    return decoder


def test_up_down_equals_two_lstm_cells(decoder):
    torch.manual_seed(1)
    regions, words = torch.randn(2, 3, 6), torch.tensor([[1, 4, 6, 5], [1, 6, 2, 4]])
    cell_1, cell_2, attention = decoder.attention_lstm, decoder.language_lstm, decoder.attention
    inputs_1 = cell_1.context.weight, decoder.mean_region.weight, cell_1.words.weight
    lstm_1 = torch_cell(cell_1, torch.nn.LSTMCell, *inputs_1)
    lstm_2 = torch_cell(cell_2, torch.nn.LSTMCell, cell_2.words.weight, cell_2.context.weight)
    keys, state = decoder.keys(regions), decoder.init_state(regions)
    for b in range(2):
        h1, c1, h2, c2 = (torch.zeros(8) for _ in range(4))
        image_keys, image_state = map_tensors(lambda x, b=b: x[b : b + 1], (keys, state))
        for word in words[b]:
            x1 = torch.cat([h2, regions[b].mean(0), decoder.embedding.weight[word]])  # equation 2
            h1, c1 = lstm_1(x1, (h1, c1))
            query = attention.query.weight @ h1
            scores = [attention.score.weight[0] @ (attention.keys(v) + query).tanh() for v in regions[b]]  # equation 3
            alpha = torch.stack(scores).softmax(0)  # equation 4
            attended = sum(weight * v for weight, v in zip(alpha, regions[b], strict=True))  # equation 5
            h2, c2 = lstm_2(torch.cat([attended, h1]), (h2, c2))  # equation 6
            expected = decoder.output.weight @ h2 + decoder.output.bias  # equation 7
            step = decoder.step(word.view(1, 1), regions[b : b + 1], image_keys, image_state)
            image_state = step.state
            torch.testing.assert_close(step.logits[0, 0], expected)
            torch.testing.assert_close(step.alpha[0, 0], alpha)
            assert step.gate is None
    assert alpha.max() < 0.999  # or the scores would not matter
