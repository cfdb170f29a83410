"""The decoder of sgrvinod's tutorial: its equations on its own weights, and what only it has."""

import pytest
import torch
from torch.nn import functional

from conftest import step_by_step
from datasets import Example, collate
from modules.sgrvinod import SgrvinodDecoder
from text.vocabulary import END, START


@pytest.fixture
def decoder():
    """A random decoder of 7 words in eval mode, biases too."""
    torch.manual_seed(0)
    decoder = SgrvinodDecoder(vocab_size=7, region_dim=6, embed_dim=5, attention_dim=4, hidden_dim=8, dropout=0.5)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter)
    return decoder.eval()


def logits_by_formula(decoder, regions, words):
    """Logits (T, V) after each word of a caption, for regions (R, D), with torch's own LSTM."""
    D, E, H = regions.shape[1], decoder.embedding.embedding_dim, decoder.output.in_features
    lstm = torch.nn.LSTMCell(E + D, H)
    cell, attention = decoder.cell, decoder.attention
    lstm.load_state_dict(
        {
            "weight_ih": torch.cat([cell.words.weight, cell.context.weight], dim=1),
            "weight_hh": cell.hidden.weight,
            "bias_ih": cell.words.bias,
            "bias_hh": torch.zeros(4 * H),
        }
    )
    mean = regions.mean(0)
    hidden, memory = (functional.linear(mean, x.weight, x.bias) for x in (decoder.init_hidden, decoder.init_cell))
    logits = []
    for word in words:
        scores = [
            attention.score.weight[0] @ functional.relu(attention.keys(a) + attention.query(hidden)) for a in regions
        ]
        context = torch.stack(scores).softmax(0) @ regions * attention.gate(hidden).sigmoid()
        hidden, memory = lstm(torch.cat([decoder.embedding.weight[word], context]), (hidden, memory))
        logits.append(decoder.output.weight @ hidden + decoder.output.bias)
    return torch.stack(logits)


CAPTIONS = [[[START, 4, 5, 6, 4, END], [START, 6, END]], [[START, 5, 4, END]]]


def test_teacher_forcing_and_steps_follow_the_equations(decoder):
    regions = torch.randn(2, 3, 6)
    batch = collate([Example(i, regions[i], captions) for i, captions in enumerate(CAPTIONS)])
    with torch.no_grad():
        output = decoder(batch.inputs, batch.words, batch.lengths)
        log_probs = output.logits.log_softmax(1).gather(1, output.targets.unsqueeze(1)).sum()
        expected = stepped = 0.0
        for i, captions in enumerate(CAPTIONS):
            for caption in captions:
                logits = logits_by_formula(decoder, regions[i], caption[:-1])
                expected += logits.log_softmax(1).gather(1, torch.tensor(caption[1:]).unsqueeze(1)).sum()
                stepped += step_by_step(decoder, regions[i : i + 1], caption[1:])[0]
    torch.testing.assert_close(log_probs, expected)
    assert stepped == pytest.approx(float(expected), rel=1e-5)


@torch.no_grad()
def test_dropout_is_on_the_hidden_state_alone(decoder):
    decoder.output.weight.copy_(torch.eye(8)[:7])  # so that the logits are the hidden state
    regions, words = torch.randn(1, 3, 6), torch.full((1, 1000), START)
    keys, state = decoder.keys(regions), tuple(x.expand(1, 1000, -1) for x in decoder.init_state(regions))
    expected, _, expected_state = decoder.step(words, regions, keys, state)
    logits, _, new_state = decoder.train().step(words, regions, keys, state)
    torch.testing.assert_close(new_state, expected_state)
    expected, logits = expected - decoder.output.bias, logits - decoder.output.bias
    kept = logits.abs() > 1e-6
    assert kept.float().mean() == pytest.approx(0.5, abs=0.03)
    torch.testing.assert_close(logits[kept], 2 * expected[kept], rtol=1e-4, atol=1e-5)


def test_no_gate_is_shown(decoder):
    assert decoder.gate is None and decoder.has_attention
