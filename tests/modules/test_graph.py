"""Graph layers against a computation by hand, and the graphs they run on."""

import math

import pytest
import torch

from modules.graph import GraphLayer, RegionGraph, build_graph, edge_attribution, grid_neighbors

CHAIN = [(1.0, 0.0), (0.0, 1.0), (-1.0, 1.0)]  # features of three regions
CHAIN_NEIGHBORS = torch.tensor([[[0, 1, -1], [0, 1, 2], [1, 2, -1]]])


def chain_layer():
    """A graph layer with one head and round weights for regions of width 2."""
    layer = GraphLayer(region_dim=2, heads=1, dropout=0.0)
    layer.source_proj.weight.data = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    layer.target_proj.weight.data = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    layer.score.data = torch.tensor([[1.0, -1.0]])
    return layer


def chain_by_hand():
    """The regions after `chain_layer`, and each region's edge weights."""
    regions, edge_weights = [], []
    for target, sources in enumerate([(0, 1), (0, 1, 2), (1, 2)]):
        x, y = CHAIN[target]
        projected = [(CHAIN[source][0], 2 * CHAIN[source][1]) for source in sources]
        leaky = [[value if value > 0 else 0.2 * value for value in (y + a, x + b)] for a, b in projected]
        powers = [math.exp(first - second) for first, second in leaky]
        weights = [power / sum(powers) for power in powers]
        a, b = (old + sum(w * p[i] for w, p in zip(weights, projected, strict=True)) for i, old in enumerate((x, y)))
        mean, deviation = (a + b) / 2, math.sqrt(((a - b) / 2) ** 2 + 1e-5)
        regions.append([(a - mean) / deviation, (b - mean) / deviation])
        edge_weights.append(weights)
    return torch.tensor([regions]), edge_weights


def test_a_layer_equals_a_computation_by_hand_on_three_nodes():
    regions, _ = chain_layer()(torch.tensor([CHAIN]), CHAIN_NEIGHBORS)
    torch.testing.assert_close(regions, chain_by_hand()[0])


def test_edge_weights_equal_a_computation_by_hand_on_three_nodes():
    _, edge_weights = chain_layer()(torch.tensor([CHAIN]), CHAIN_NEIGHBORS)
    for target, expected in enumerate(chain_by_hand()[1]):
        assert edge_weights[0, target, : len(expected), 0].tolist() == pytest.approx(expected)
    assert edge_weights[0, 0, 2, 0] == edge_weights[0, 2, 2, 0] == 0


@pytest.mark.parametrize("heads", [1, 4])
def test_a_permutation_of_the_regions_permutes_the_output(heads):
    torch.manual_seed(0)
    layer, regions = GraphLayer(region_dim=8, heads=heads, dropout=0.0), torch.randn(2, 9, 8)
    neighbors = build_graph(regions, 2)
    order = torch.randperm(9)
    new_index = torch.cat([order.argsort(), torch.tensor([-1])])  # the last entry maps -1 to -1
    permuted, _ = layer(regions[:, order], new_index[neighbors[:, order]])
    torch.testing.assert_close(permuted, layer(regions, neighbors)[0][:, order])


def test_images_of_a_batch_are_independent():
    torch.manual_seed(0)
    graph = RegionGraph(region_dim=8, layers=2, knn=3, heads=2, dropout=0.0)
    features = torch.randn(3, 16, 8)
    together = graph(features, features)[0]
    for b in range(3):
        torch.testing.assert_close(graph(features[b : b + 1], features[b : b + 1])[0], together[b : b + 1])


def test_zero_layers_are_the_identity():
    regions = torch.randn(2, 9, 8)
    graph = RegionGraph(region_dim=8, layers=0, knn=4, heads=4, dropout=0.5)
    assert graph(regions, regions)[0] is regions and not list(graph.parameters())


def test_grid_neighbors_surround_a_region():
    neighbors = [{index for index in row if index >= 0} for row in grid_neighbors(3).tolist()]
    assert neighbors[0] == {0, 1, 3, 4} and neighbors[4] == set(range(9)) and neighbors[5] == {1, 2, 4, 5, 7, 8}


@pytest.mark.parametrize(("side", "knn"), [(4, 3), (2, 5), (7, 0)])
def test_the_graph_adds_the_most_similar_regions_and_repeats_none(side, knn):
    torch.manual_seed(0)
    features = torch.randn(2, side * side, 6)
    graph = build_graph(features, knn)
    cosine = torch.nn.functional.cosine_similarity(features.unsqueeze(1), features.unsqueeze(2), dim=-1)
    on_grid = grid_neighbors(side).tolist()
    for b in range(2):
        for region, row in enumerate(graph[b].tolist()):
            neighbors = [index for index in row if index >= 0]
            assert len(neighbors) == len(set(neighbors)) and region in neighbors
            similar = set(neighbors) - set(on_grid[region])
            others = set(range(side * side)) - set(on_grid[region])
            assert similar == set(sorted(others, key=lambda other: -cosine[b, region, other])[:knn])


def test_the_graph_is_the_same_in_mixed_precision():
    features = torch.rand(2, 49, 256)  # as similar as features behind a ReLU are
    with torch.autocast("cpu", torch.bfloat16):
        mixed = build_graph(features, 4)
    assert torch.equal(mixed, build_graph(features, 4))


def test_edge_attribution_propagates_alpha_back_through_the_layers():
    neighbors = torch.tensor([[0, 1], [1, 2], [2, -1]])
    first, last = torch.tensor([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]]), torch.tensor([[0.2, 0.8], [1.0, 0.0], [1, 0.0]])
    edges = edge_attribution(torch.tensor([1.0, 0.0, 0.0]), neighbors, [first, last])
    # Last layer: edge 1 -> 0 with 0.8. Before it the attention is 0.2 on region 0 and 0.8 on region 1.
    assert edges == {
        (1, 0): pytest.approx(0.8 + 0.2 * 0.5),
        (2, 1): pytest.approx(0.8 * 0.75),
    }
    assert list(edges) == [(1, 0), (2, 1)]
