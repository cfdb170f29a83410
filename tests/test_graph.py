"""Graph layers against a computation by hand, and the graphs that they work on."""

import math

import pytest
import torch

from graph import GraphLayer, RegionGraph, edges_that_mattered, grid_neighbours, region_graph


def test_a_layer_equals_a_computation_by_hand_on_three_nodes():
    """A chain of three regions with two features, one head and round weights."""
    layer = GraphLayer(2, heads=1, dropout=0.0)
    layer.send.weight.data = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    layer.receive.weight.data = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    layer.score.data = torch.tensor([[1.0, -1.0]])
    regions = [(1.0, 0.0), (0.0, 1.0), (-1.0, 1.0)]
    hears = [(0, 1), (0, 1, 2), (1, 2)]
    expected, expected_weights = [], []
    for receiver, senders in enumerate(hears):
        x, y = regions[receiver]
        sent = [(regions[sender][0], 2 * regions[sender][1]) for sender in senders]
        leaky = [[value if value > 0 else 0.2 * value for value in (y + a, x + b)] for a, b in sent]
        powers = [math.exp(one - other) for one, other in leaky]
        shares = [power / sum(powers) for power in powers]
        a, b = (old + sum(s * m[i] for s, m in zip(shares, sent, strict=True)) for i, old in enumerate((x, y)))
        mean, deviation = (a + b) / 2, math.sqrt(((a - b) / 2) ** 2 + 1e-5)
        expected.append([(a - mean) / deviation, (b - mean) / deviation])
        expected_weights.append(shares)
    neighbours = torch.tensor([[[0, 1, -1], [0, 1, 2], [1, 2, -1]]])
    found, weights = layer(torch.tensor([regions]), neighbours)
    torch.testing.assert_close(found, torch.tensor([expected]))
    for receiver, shares in enumerate(expected_weights):
        assert weights[0, receiver, : len(shares), 0].tolist() == pytest.approx(shares)
    assert weights[0, 0, 2, 0] == weights[0, 2, 2, 0] == 0


@pytest.mark.parametrize("heads", [1, 4])
def test_a_permutation_of_the_regions_permutes_the_output(heads):
    torch.manual_seed(0)
    layer, regions = GraphLayer(8, heads, dropout=0.0), torch.randn(2, 9, 8)
    neighbours = region_graph(regions, 2)
    order = torch.randperm(9)
    places = torch.cat([order.argsort(), torch.tensor([-1])])  # where each region went; none stays none
    permuted, _ = layer(regions[:, order], places[neighbours[:, order]])
    torch.testing.assert_close(permuted, layer(regions, neighbours)[0][:, order])


def test_each_photo_of_a_batch_hears_only_itself():
    torch.manual_seed(0)
    graph, features = RegionGraph(8, 2, 3, 2, dropout=0.0), torch.randn(3, 16, 8)
    together = graph(features, features)[0]
    for b in range(3):
        torch.testing.assert_close(graph(features[b : b + 1], features[b : b + 1])[0], together[b : b + 1])


def test_zero_layers_are_the_identity():
    regions = torch.randn(2, 9, 8)
    graph = RegionGraph(8, 0, 4, 4, dropout=0.5)
    assert graph(regions, regions)[0] is regions and not list(graph.parameters())


def test_grid_neighbours_are_those_around_a_region():
    neighbours = [{place for place in row if place >= 0} for row in grid_neighbours(3).tolist()]
    assert neighbours[0] == {0, 1, 3, 4} and neighbours[4] == set(range(9)) and neighbours[5] == {1, 2, 4, 5, 7, 8}


@pytest.mark.parametrize(("side", "number"), [(4, 3), (2, 5), (7, 0)])
def test_the_graph_names_no_region_twice_and_takes_the_most_similar(side, number):
    torch.manual_seed(0)
    features = torch.randn(2, side * side, 6)
    graph = region_graph(features, number)
    cosine = torch.nn.functional.cosine_similarity(features.unsqueeze(1), features.unsqueeze(2), dim=-1)
    on_grid = grid_neighbours(side).tolist()
    for b in range(2):
        for region, row in enumerate(graph[b].tolist()):
            real = [place for place in row if place >= 0]
            assert len(real) == len(set(real)) and region in real
            alike = set(real) - set(on_grid[region])
            others = set(range(side * side)) - set(on_grid[region])
            assert alike == set(sorted(others, key=lambda other: -cosine[b, region, other])[:number])


def test_the_graph_is_the_same_in_mixed_precision():
    features = torch.rand(2, 49, 256)  # as similar as features behind a ReLU are
    with torch.autocast("cpu", torch.bfloat16):
        mixed = region_graph(features, 4)
    assert torch.equal(mixed, region_graph(features, 4))


def test_edges_that_mattered_follow_the_look_back_through_the_layers():
    neighbours = torch.tensor([[0, 1], [1, 2], [2, -1]])
    first, last = torch.tensor([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]]), torch.tensor([[0.2, 0.8], [1.0, 0.0], [1, 0.0]])
    edges = edges_that_mattered(torch.tensor([1.0, 0.0, 0.0]), neighbours, [first, last])
    # The last layer: 1 to 0 with 0.8. Looked at before it: region 0 with 0.2, region 1 with 0.8.
    assert edges == {
        (1, 0): pytest.approx(0.8 + 0.2 * 0.5),
        (2, 1): pytest.approx(0.8 * 0.75),
    }
    assert list(edges) == [(1, 0), (2, 1)]
