"""The adaptive decoder against the equations of "Knowing When to Look"."""

import pytest
import torch

from conftest import make_tiny_decoder
from modules.adaptive import AdaptiveDecoder
from text.vocabulary import START


@pytest.fixture
def decoder():
    """A random decoder in eval mode, its biases not zero."""
    decoder = make_tiny_decoder(AdaptiveDecoder)
    for parameter in decoder.parameters():
        parameter.data = torch.randn_like(parameter)
    return decoder


def attend_by_equations(attention, regions, hidden, sentinel):
    """Context, alpha and beta of one image at one word: regions (R, D), hidden and sentinel (H,)."""
    query, sentinel = attention.query.weight @ hidden, attention.sentinel_proj(sentinel).relu()
    z = torch.stack([attention.score.weight[0] @ (attention.keys(v) + query).tanh() for v in regions])  # equation 6
    alpha = z.softmax(0)  # equation 7
    c = alpha @ regions  # equation 8
    z_sentinel = attention.score.weight[0] @ (attention.sentinel_key(sentinel) + query).tanh()
    beta = torch.cat([z, z_sentinel.view(1)]).softmax(0)[-1]  # equation 12
    return beta * sentinel + (1 - beta) * c, alpha, beta  # equation 11


def test_the_decoder_equals_an_lstm_cell_with_a_sentinel_and_returns_its_gate(decoder):
    torch.manual_seed(1)
    regions = torch.randn(1, 3, 6)
    cell, mean = decoder.cell, regions[0].mean(0)
    lstm = torch.nn.LSTMCell(11, 8)
    weight_ih = torch.cat([cell.words.weight, cell.context.weight], dim=1)
    lstm.weight_ih.data, lstm.weight_hh.data = weight_ih[:32].data, cell.hidden.weight[:32].data
    lstm.bias_ih.data, lstm.bias_hh.data = cell.words.bias[:32].data, torch.zeros(32)
    keys, state = decoder.keys(regions), decoder.init_state(regions)
    h, m = (part[0, 0] for part in state)
    for word in (START, 4, 6, 5):
        x = torch.cat([decoder.embedding.weight[word], mean])
        sentinel_gate = (weight_ih[32:] @ x + cell.words.bias[32:] + cell.hidden.weight[32:] @ h).sigmoid()  # 9
        h, m = lstm(x, (h, m))
        sentinel = sentinel_gate * m.tanh()  # equation 10
        context, expected_alpha, beta = attend_by_equations(decoder.attention, regions[0], h, sentinel)
        logits, state, alpha, gate = decoder.step(torch.tensor([[word]]), regions, keys, state)
        torch.testing.assert_close(alpha[0, 0], expected_alpha)
        torch.testing.assert_close(logits[0, 0], decoder._logits(decoder.embedding.weight[word], h, context))
        torch.testing.assert_close(gate[0, 0], 1 - beta)
        assert [part.shape for part in state] == [(1, 1, 8), (1, 1, 8)]


def test_a_sentinel_far_above_or_below_the_regions_gives_finite_gradients(decoder):
    regions = torch.randn(1, 3, 6)
    for scale in (1e4, -1e4):
        decoder.attention.score.weight.data.fill_(scale)
        output = decoder.step(torch.tensor([[4]]), regions, decoder.keys(regions), decoder.init_state(regions))
        output.logits.sum().backward()
        assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in decoder.parameters())
