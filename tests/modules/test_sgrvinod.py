"""The decoder of sgrvinod's tutorial: its equations on its own weights, and its dropout."""

import pytest
import torch
from torch.nn import functional

from conftest import make_tiny_decoder, random_batch, torch_cell
from modules.sgrvinod import SgrvinodDecoder
from text.vocabulary import END, START


@pytest.fixture
def decoder():
    """A random decoder of 7 words in eval mode, biases too."""
    decoder = make_tiny_decoder(SgrvinodDecoder)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter)
    return decoder


def logits_by_formula(decoder, regions, words):
    """Logits (T, V) after each word of a caption, for regions (R, D), with torch's own LSTM."""
    cell, attention, mean = decoder.cell, decoder.attention, regions.mean(0)
    lstm = torch_cell(cell, torch.nn.LSTMCell, cell.words.weight, cell.context.weight)
    hidden, memory = (functional.linear(mean, x.weight, x.bias) for x in (decoder.init_hidden, decoder.init_cell))
    logits = []
    for word in words:
        query = attention.query(hidden)
        scores = [attention.score.weight[0] @ functional.relu(attention.keys(a) + query) for a in regions]
        context = torch.stack(scores).softmax(0) @ regions * attention.gate(hidden).sigmoid()
        hidden, memory = lstm(torch.cat([decoder.embedding.weight[word], context]), (hidden, memory))
        logits.append(decoder.output.weight @ hidden + decoder.output.bias)
    return torch.stack(logits)


@torch.no_grad()
def test_teacher_forcing_follows_the_equations(decoder):
    captions = [[[START, 4, 5, 6, 4, END], [START, 6, END]], [[START, 5, 4, END]]]
    batch = random_batch(captions)
    output = decoder(batch.inputs, batch.words, batch.lengths)
    expected = 0.0
    for regions, caption in [(batch.inputs[i], caption) for i in range(2) for caption in captions[i]]:
        logits = logits_by_formula(decoder, regions, caption[:-1])
        expected += logits.log_softmax(1).gather(1, torch.tensor(caption[1:]).unsqueeze(1)).sum()
    log_probs = output.logits.log_softmax(1).gather(1, output.targets.unsqueeze(1)).sum()
    torch.testing.assert_close(log_probs, expected)


@torch.no_grad()
def test_dropout_is_on_the_hidden_state_alone_and_no_gate_is_shown(decoder):
    decoder.output.weight.copy_(torch.eye(8)[:7])  # so that the logits are the hidden state
    regions, words = torch.randn(1, 3, 6), torch.full((1, 1000), START)
    keys, state = decoder.keys(regions), tuple(x.expand(1, 1000, -1) for x in decoder.init_state(regions))
    expected = decoder.step(words, regions, keys, state)
    found = decoder.train().step(words, regions, keys, state)
    torch.testing.assert_close(found.state, expected.state)
    expected_hidden, hidden = expected.logits - decoder.output.bias, found.logits - decoder.output.bias
    kept = hidden.abs() > 1e-6
    assert kept.float().mean() == pytest.approx(0.5, abs=0.03)
    torch.testing.assert_close(hidden[kept], 2 * expected_hidden[kept], rtol=1e-4, atol=1e-5)
    assert expected.gate is None and decoder.has_attention
