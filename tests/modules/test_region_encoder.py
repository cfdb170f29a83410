"""Encoder layers over regions against torch's layers; their positions against DETR's equations."""

import itertools
import math

import pytest
import torch
from torch import nn

from models import ModelSettings
from modules.regions import pairwise_geometry
from modules.transformer import EncoderLayer, RegionEncoder, grid_positions
from utils import InputError


def make_encoder(layers=2, positions="none", heads=2, geometry=False, region_dim=8, num_cells=9):
    """A random encoder, in eval mode, in which torch's layers take a fused path."""
    torch.manual_seed(1)
    sizes = {"encoder_layers": layers, "heads": heads, "ffn_dim": 12, "dropout": 0.0}
    settings = ModelSettings(encoder_positions=positions, geometry=geometry, **sizes)
    encoder = RegionEncoder(settings, region_dim=region_dim, num_cells=num_cells).eval()
    for parameter in encoder.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return encoder


def torch_layer(layer: EncoderLayer) -> nn.TransformerEncoderLayer:
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
    encoder, regions = make_encoder(positions=positions), torch.randn(3, 9, 8)
    expected = regions
    if positions == "learned":
        expected = regions + encoder.learned_positions
    if positions == "sine":
        expected = regions + grid_positions(3, 8)
    for layer in encoder.layers:
        expected = torch_layer(layer)(expected)
    torch.testing.assert_close(encoder(regions), encoder.norm(expected), atol=1e-5, rtol=1e-4)


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


@pytest.mark.parametrize("positions", ["sine", "learned"])
def test_positions_are_those_of_the_cells_before_the_objects(positions):
    regions, encoder = torch.randn(2, 11, 8), make_encoder(positions=positions, layers=1)
    codes = grid_positions(3, 8) if positions == "sine" else encoder.learned_positions
    without = make_encoder(positions="none", layers=1)
    weights = {name: weight for name, weight in encoder.state_dict().items() if name != "learned_positions"}
    without.load_state_dict(weights)
    moved = torch.cat([regions[:, :9] + codes, regions[:, 9:]], dim=1)
    torch.testing.assert_close(encoder(regions), without(moved))
    assert make_encoder(positions=positions, num_cells=0).learned_positions is None
