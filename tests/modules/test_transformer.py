"""Encoder layers and the decoder against torch's layers; positions and geometry against their equations."""

import itertools
import math

import pytest
import torch
from test_decoders import CAPTIONS
from torch import nn
from torch.nn import functional

from conftest import random_batch, step_by_step
from decoding.contract import expand
from models import ModelSettings
from modules.regions import pairwise_geometry
from modules.transformer import (
    RegionEncoder,
    TransformerDecoder,
    fused_attention,
    grid_positions,
    scaled_dot_product,
    sine_positions,
)
from utils import InputError


def make_decoder(region_dim=6, **changes):
    """A random decoder with dropout 0, whose predictions are far from uniform."""
    torch.manual_seed(3)
    sizes = {"embed_dim": 5, "hidden_dim": 8, "heads": 2, "ffn_dim": 12, "decoder_layers": 2, "dropout": 0.0}
    decoder = TransformerDecoder(ModelSettings(**sizes | changes), vocab_size=7, region_dim=region_dim).eval()
    for parameter in decoder.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return decoder


@pytest.fixture
def decoder():
    return make_decoder()


@pytest.fixture
def batch():
    """Random regions (B, 4, 6) with CAPTIONS."""
    return random_batch(CAPTIONS)


def copy_to_torch(layer, torch_layer):
    """Give a torch.nn.TransformerDecoderLayer the weights of a DecoderLayer."""
    cross_weight = torch.cat([layer.cross_query.weight, layer.cross_key_value.weight])
    cross_bias = torch.cat([layer.cross_query.bias, layer.cross_key_value.bias])
    for attention, weight, bias, proj in (
        (torch_layer.self_attn, layer.self_query_key_value.weight, layer.self_query_key_value.bias, layer.self_proj),
        (torch_layer.multihead_attn, cross_weight, cross_bias, layer.cross_proj),
    ):
        attention.in_proj_weight.data, attention.in_proj_bias.data = weight.data, bias.data
        attention.out_proj.load_state_dict(proj.state_dict())
    pairs = {
        torch_layer.norm1: layer.self_norm,
        torch_layer.norm2: layer.cross_norm,
        torch_layer.norm3: layer.ffn_norm,
        torch_layer.linear1: layer.ffn[0],
        torch_layer.linear2: layer.ffn[2],
    }
    for target, source in pairs.items():
        target.load_state_dict(source.state_dict())


def test_the_decoder_equals_torch_layers_with_its_weights(batch):
    decoder, regions = make_decoder(region_dim=8), torch.randn(3, 4, 8)
    logits = decoder(regions, batch.words, batch.lengths).logits
    layers = []
    for layer in decoder.layers:
        layers.append(nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=True))
        copy_to_torch(layer, layers[-1])
    exists = torch.arange(5).view(-1, 1, 1) < batch.lengths  # (T, B, C)
    rows = exists.flatten().cumsum(0).view(exists.shape) - 1  # of the logits
    for b, c in itertools.product(range(3), range(3)):
        if length := int(batch.lengths[b, c]):
            embedded = decoder.embedding(batch.words[b, c, :length]) * math.sqrt(5)
            x = (decoder.embedding_proj(embedded) + sine_positions(torch.arange(length), 8)).unsqueeze(0)
            causal = nn.Transformer.generate_square_subsequent_mask(length)
            for layer in layers:
                x = layer(x, regions[b : b + 1], tgt_mask=causal, tgt_is_causal=True)
            expected = decoder.output(decoder.norm(x))[0]
            torch.testing.assert_close(logits[rows[:length, b, c]], expected, atol=1e-5, rtol=1e-4)


def test_alpha_is_that_of_torch_attention():
    decoder = make_decoder(region_dim=8, decoder_layers=1)
    layer, reference = decoder.layers[0], nn.TransformerDecoderLayer(8, 2, 12, 0.0, batch_first=True, norm_first=True)
    copy_to_torch(layer, reference)
    x, regions = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    keys = layer.keys(regions)
    cache = torch.empty(2, 3, 2, 0, 4)
    _, _, alpha = layer(x.unsqueeze(2), keys, (cache, cache), True)
    attended = layer.self_proj(layer.self_query_key_value(layer.self_norm(x))[..., 16:])  # of one word: its value
    query = layer.cross_norm(x + attended)
    _, expected = reference.multihead_attn(query, regions, regions, average_attn_weights=False)
    torch.testing.assert_close(alpha, expected)


def test_a_sample_stands_where_the_word_that_it_predicts_stood(decoder, batch):
    sampled = []

    def note(*arguments, original=decoder._sample_words):
        sampled.append(original(*arguments))
        return sampled[0]

    decoder._sample_words = note
    torch.manual_seed(0)
    logits = decoder(batch.inputs, batch.words, batch.lengths, sampling_prob=1.0).logits
    fed_back = batch.words.clone()
    fed_back[:, :, 1:-1] = sampled[0]
    torch.testing.assert_close(logits, decoder(batch.inputs, fed_back, batch.lengths).logits)


def test_layer_and_head_of_alpha_are_chosen(decoder, batch):
    inputs = batch.inputs, batch.words, batch.lengths
    default = decoder(*inputs).alpha
    heads = []
    for head in (1, 2):
        decoder.choose_alpha(layer=2, head=head)
        heads.append(decoder(*inputs).alpha)
        _, alpha = step_by_step(decoder, batch.inputs[:1], batch.words[0, 0, 1:].tolist())
        torch.testing.assert_close(heads[-1][:, 0, 0], alpha)
    torch.testing.assert_close((heads[0] + heads[1]) / 2, default)
    assert (heads[0] - heads[1]).abs().max() > 1e-3
    logits = decoder(*inputs).logits
    decoder.choose_alpha(layer=1)
    outputs = decoder(*inputs)
    assert (outputs.alpha - default).abs().max() > 1e-3
    torch.testing.assert_close(outputs.logits, logits)


@pytest.mark.parametrize("choice", [{"layer": 3}, {"head": 3}, {"layer": -1}])
def test_a_layer_or_head_that_does_not_exist_is_an_error(decoder, choice):
    ((name, value),) = choice.items()
    with pytest.raises(InputError, match=f"--alpha_{name} {value}: the decoder has 2"):
        decoder.choose_alpha(**choice)


@pytest.mark.parametrize("is_causal", [True, False])
def test_attention_is_that_of_torch(is_causal):
    query, key, value = torch.randn(3, 2, 4, 5, 6)
    expected = functional.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
    attended, alpha = scaled_dot_product(query, key, value, is_causal=is_causal, with_alpha=True)
    torch.testing.assert_close(attended, expected)
    torch.testing.assert_close(alpha @ value, expected)
    assert scaled_dot_product(query, key, value, is_causal=is_causal)[1] is None


def test_the_fused_attention_has_four_dimensions_as_its_kernels_on_a_gpu_need(monkeypatch):
    torch_attention, calls = functional.scaled_dot_product_attention, []

    def record(query, key, value, mask, *, is_causal):
        calls.append((query.shape, key.shape, value.shape))
        return torch_attention(query, key, value, mask, is_causal=is_causal)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", record)
    query, key, value = torch.randn(3, 2, 3, 4, 5, 6)
    expected, _ = scaled_dot_product(query, key, value, is_causal=True)
    torch.testing.assert_close(fused_attention(query, key, value, is_causal=True), expected)
    query, key, value = torch.randn(3, 2, 4, 5, 6)
    for mask in (torch.tensor([[[[True, False, True, True, True]]]] * 2), torch.randn(2, 4, 5, 5)):
        expected, _ = scaled_dot_product(query, key, value, mask)
        torch.testing.assert_close(fused_attention(query, key, value, mask), expected)
    decoder = make_decoder().to("meta")  # whose attention is fused as on a GPU
    regions, words = torch.empty(3, 4, 6, device="meta"), torch.empty(3, 2, 5, dtype=torch.long, device="meta")
    keys = decoder.keys(regions)
    assert decoder._run_layers(words, keys, [1])[0].shape == (3, 2, 5, 8)
    decoder.step(words[..., 0], regions, keys, expand(decoder.init_state(regions), 2))
    assert len(calls) == 3 + 2 * (2 + 1)  # in a pass and a step: both self-attentions, and a cross-attention
    assert all(len(shape) == 4 for shapes in calls for shape in shapes)


@pytest.mark.parametrize("width", [8, 5])
def test_positions_are_sines_and_cosines(width):
    half = (width + 1) // 2
    for position in (0, 1, 50):
        expected = [f(position / 10_000 ** (i / half)) for f in (math.sin, math.cos) for i in range(half)][:width]
        assert sine_positions(torch.tensor(position), width).tolist() == pytest.approx(expected, abs=1e-5)


def make_encoder(layers=2, positions="none", heads=2, geometry=False, region_dim=8, num_cells=9):
    """A random encoder, in eval mode, in which torch's layers take a fused path."""
    torch.manual_seed(1)
    sizes = {"encoder_layers": layers, "heads": heads, "ffn_dim": 12, "dropout": 0.0}
    settings = ModelSettings(encoder_positions=positions, geometry=geometry, **sizes)
    encoder = RegionEncoder(settings, region_dim=region_dim, num_cells=num_cells).eval()
    for parameter in encoder.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return encoder


def torch_layer(layer):
    """torch's layer with the weights of ours."""
    reference = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=True)
    reference.self_attn.in_proj_weight.data = layer.query_key_value.weight.data
    reference.self_attn.in_proj_bias.data = layer.query_key_value.bias.data
    for target, source in (
        (reference.self_attn.out_proj, layer.attention_proj),
        (reference.norm1, layer.attention_norm),
        (reference.norm2, layer.ffn_norm),
        (reference.linear1, layer.ffn[0]),
        (reference.linear2, layer.ffn[2]),
    ):
        target.load_state_dict(source.state_dict())
    return reference


@pytest.mark.parametrize("positions", ["none", "learned", "sine"])
def test_the_encoder_equals_torch_layers_with_its_weights(positions):
    """Of nine cells, which have positions, and two objects."""
    encoder, regions = make_encoder(positions=positions), torch.randn(3, 11, 8)
    expected = regions.clone()
    if positions == "learned":
        expected[:, :9] += encoder.learned_positions
    if positions == "sine":
        expected[:, :9] += grid_positions(3, 8)
    for layer in encoder.layers:
        expected = torch_layer(layer)(expected)
    torch.testing.assert_close(encoder(regions), encoder.norm(expected), atol=1e-5, rtol=1e-4)
    assert make_encoder(positions=positions, num_cells=0).learned_positions is None


def test_without_layers_it_is_the_identity_and_has_no_weights():
    encoder, regions = make_encoder(layers=0, heads=5), torch.randn(3, 9, 8)
    assert encoder(regions) is regions and not encoder.state_dict()


def test_grid_positions_are_sines_and_cosines_of_row_and_column():
    codes = grid_positions(3, 8)
    for region in range(9):
        row, column = divmod(region, 3)
        expected = [f(p / 10_000 ** (i / 2)) for p in (row, column) for f in (math.sin, math.cos) for i in range(2)]
        torch.testing.assert_close(codes[region], torch.tensor(expected))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "--heads 3: does not divide the 8 features"),
        ({"positions": "sine", "region_dim": 6}, "--encoder_positions sine: .* 9 regions of 6: give learned or none"),
        ({"positions": "sine", "num_cells": 8}, "--encoder_positions sine: .* 8 regions of 8"),
    ],
)
def test_what_does_not_fit_the_regions_is_an_error(changes, message):
    with pytest.raises(InputError, match=message):
        make_encoder(**changes)


def random_boxes(B, R):
    return torch.rand(B, R, 2, 2).sort(dim=2).values.flatten(2)


def test_geometry_multiplies_the_weights_of_attention():
    """Herdade et al., 2019, equation 6: omega_G exp(omega_A) / sum of them, for each head."""
    encoder, regions, boxes = make_encoder(layers=1, geometry=True), torch.randn(2, 5, 8), random_boxes(2, 5)
    mask = torch.tensor([[True] * 5, [True] * 4 + [False]])
    layer, geometry = encoder.layers[0], pairwise_geometry(boxes)
    query, key, value = layer.query_key_value(layer.attention_norm(regions)).view(2, 5, 3, 2, 4).unbind(2)
    attended = torch.zeros(2, 5, 2, 4)
    for b, m, n in itertools.product(range(2), range(5), range(2)):
        weights = torch.zeros(5)
        for k in range(5):
            if mask[b, k]:
                omega = (layer.geometry.weight[n] @ geometry[b, m, k] + layer.geometry.bias[n]).clamp_min(1e-6)
                weights[k] = omega * (query[b, m, n] @ key[b, k, n] / 2).exp()
        attended[b, m, n] = (weights / weights.sum()) @ value[b, :, n]
    expected = regions + layer.attention_proj(attended.flatten(2))
    expected = encoder.norm(expected + layer.ffn(layer.ffn_norm(expected)))
    torch.testing.assert_close(encoder(regions, boxes, mask)[mask], expected[mask], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("geometry", [False, True])
def test_a_masked_region_changes_no_other(geometry):
    encoder, regions, boxes = make_encoder(geometry=geometry), torch.randn(2, 5, 8), random_boxes(2, 5)
    longer = torch.cat([regions, torch.randn(2, 3, 8)], dim=1)
    padded = torch.cat([boxes, torch.zeros(2, 3, 4)], dim=1)
    mask = torch.arange(8).expand(2, -1) < 5
    torch.testing.assert_close(encoder(longer, padded, mask)[:, :5], encoder(regions, boxes))
