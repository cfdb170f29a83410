"""The image as the first input word, and stacked layers, against torch's recurrent networks on the same weights."""

import pytest
import torch
from torch import nn

from conftest import make_tiny_decoder
from modules.show_attend_tell import ShowAttendTell
from text.vocabulary import START

NETWORKS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


def make_decoder(**settings):
    """A random decoder in eval mode, its biases not zero."""
    decoder = make_tiny_decoder(ShowAttendTell, **{"attention": "none"} | settings)
    for parameter in decoder.parameters():
        parameter.data = torch.randn_like(parameter) / 2
    return decoder


def torch_network(decoder, name):
    """torch's network of the decoder's layers."""
    cells = [decoder.cell, *decoder.upper_cells]
    network = NETWORKS[name](5, 8, num_layers=len(cells), batch_first=True)
    for i, cell in enumerate(cells):
        for ours, theirs in ((cell.words.weight, "weight_ih"), (cell.hidden.weight, "weight_hh")):
            getattr(network, f"{theirs}_l{i}").data = ours.data
        getattr(network, f"bias_ih_l{i}").data = cell.words.bias.data
        getattr(network, f"bias_hh_l{i}").data.zero_()
    return network


def run_steps(decoder, regions, words):
    """The logits (B, T, V) of words (B, T), by steps."""
    keys, state = decoder.keys(regions), decoder.init_state(regions)
    logits = []
    for word in words.split(1, dim=1):
        output = decoder.step(word, regions, keys, state)
        state = output.state
        logits.append(output.logits[:, 0])
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_layers_equal_torchs_network(name, layers):
    decoder = make_decoder(cell=name, layers=layers)
    regions, words = torch.randn(2, 3, 6), torch.tensor([[START, 4, 6, 5], [START, 6, 6, 4]])
    state = [part.squeeze(1) for part in decoder.init_state(regions)]  # the top layer's first
    mean = regions.mean(1)
    torch.testing.assert_close(state, [layer(mean).tanh() for layer in decoder.init_hidden])
    hidden = torch.stack(state[:: decoder.cell.NUM_STATES][::-1])
    initial = (hidden, torch.stack(state[1::2][::-1])) if name == "lstm" else hidden
    embedded = decoder.embedding(words)
    top, _ = torch_network(decoder, name)(embedded, initial)
    expected = decoder.output((embedded + decoder.hidden_proj(top)).tanh())
    torch.testing.assert_close(run_steps(decoder, regions, words), expected)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("layers", [1, 2])
def test_image_first_equals_torchs_network_that_reads_the_image_before_the_words(name, layers):
    decoder = make_decoder(cell=name, layers=layers, image_first=True)
    regions, words = torch.randn(2, 3, 6), torch.tensor([[START, 4, 6, 5], [START, 6, 6, 4]])
    embedded = decoder.embedding(words)
    image = decoder.image_proj(regions.mean(1, keepdim=True))
    top, _ = torch_network(decoder, name)(torch.cat([image, embedded], dim=1))  # from a state of zeros
    expected = decoder.output((embedded + decoder.hidden_proj(top[:, 1:])).tanh())
    torch.testing.assert_close(run_steps(decoder, regions, words), expected)
    assert not list(decoder.init_hidden.parameters())


def test_the_attention_of_layers_is_that_of_the_top_one():
    decoder = make_decoder(attention="soft", layers=2)
    regions = torch.randn(1, 3, 6)
    keys, state = decoder.keys(regions), decoder.init_state(regions)
    _, next_state, alpha, gate = decoder.step(torch.tensor([[4]]), regions, keys, state)
    context, expected, expected_gate, _ = decoder.attention(regions, keys[0], state[0])
    torch.testing.assert_close((alpha, gate), (expected, expected_gate))
    first, second = decoder.cell, decoder.upper_cells[0]
    below = first(first.words(decoder.embedding.weight[4]).view(1, 1, -1), context, state[2:])
    torch.testing.assert_close(next_state, (*second(second.words(below[0]), None, state[:2]), *below))


def test_dropout_is_between_the_layers():
    decoder = make_decoder(layers=2).train()
    inputs = []
    decoder.upper_cells[0].words.register_forward_hook(lambda *call: inputs.append(call[1][0]))
    regions = torch.randn(1, 3, 6)
    decoder.step(torch.full((1, 200), START), regions, decoder.keys(regions), (torch.randn(1, 200, 8),) * 4)
    assert (inputs[0] == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
