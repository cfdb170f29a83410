"""Graph layers against their equations, and the graphs they run on."""

import pytest
import torch

from models import ModelSettings
from modules.graph import (
    GRAPH_LAYERS,
    GatedGraphLayer,
    RegionGraph,
    build_edges,
    edge_attribution,
    grid_neighbors,
)
from modules.regions import grid_boxes, reverse_relations


def some_boxes(B, R, seed=0):
    """Random boxes (B, R, 4)."""
    corners = torch.rand(B, R, 2, 2, generator=torch.Generator().manual_seed(seed)).sort(dim=2).values
    return corners.flatten(2)


def make_graph(layers=2, layer="gat", edges="grid", heads=2):
    """A random graph for regions of width 8."""
    torch.manual_seed(0)
    sizes = {"graph_layers": layers, "graph_knn": 3, "graph_heads": heads, "dropout": 0.0}
    # Regions of objects have no grid.
    settings = ModelSettings(
        graph_layer=layer, regions="grid" if edges == "grid" else "objects", graph_edges=edges, **sizes
    )
    graph = RegionGraph(settings, region_dim=8)
    for parameter in graph.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return graph


@pytest.mark.parametrize("layer", GRAPH_LAYERS)
@pytest.mark.parametrize("edges", ["similar", "spatial", "all"])
@pytest.mark.parametrize("heads", [1, 4])
def test_a_permutation_of_the_regions_permutes_the_output(layer, edges, heads):
    graph, regions, boxes = make_graph(layer=layer, edges=edges, heads=heads), torch.randn(2, 9, 8), some_boxes(2, 9)
    order = torch.randperm(9)
    permuted = graph(regions[:, order], regions[:, order], boxes[:, order])[0]
    torch.testing.assert_close(permuted, graph(regions, regions, boxes)[0][:, order])


@pytest.mark.parametrize("layer", GRAPH_LAYERS)
@pytest.mark.parametrize("edges", ["grid", "similar", "spatial", "all"])
def test_images_of_a_batch_are_independent_and_padding_does_not_matter(layer, edges):
    graph, features = make_graph(layer=layer, edges=edges), torch.randn(3, 16, 8)
    boxes = grid_boxes(4).expand(3, -1, -1) if edges == "grid" else some_boxes(3, 16)
    together = graph(features, features, boxes)[0]
    for b in range(3):
        one, box = features[b : b + 1], boxes[b : b + 1]
        torch.testing.assert_close(graph(one, one, box)[0], together[b : b + 1])
        if edges != "grid":
            longer, padded = torch.cat([one, torch.randn(1, 2, 8)], 1), torch.cat([box, torch.zeros(1, 2, 4)], 1)
            torch.testing.assert_close(graph(longer, longer, padded)[0][:, :16], together[b : b + 1])


def test_zero_layers_are_the_identity():
    regions = torch.randn(2, 9, 8)
    graph = make_graph(layers=0)
    assert graph(regions, regions, grid_boxes(3).expand(2, -1, -1))[0] is regions and not list(graph.parameters())


@pytest.mark.parametrize("relations", [False, True])
def test_a_gated_layer_equals_its_equation(relations):
    layer = make_graph(layer="gcn", edges="spatial" if relations else "all").layers[0]
    assert isinstance(layer, GatedGraphLayer)
    regions, boxes = torch.randn(1, 5, 8), some_boxes(1, 5, seed=3)
    edges = build_edges("spatial" if relations else "all", regions, boxes, 0)
    output, shares = layer(regions, edges)
    itself, out, into = layer.message.weight.view(3, 8, 8)
    gate_itself, gate_out, gate_into = layer.gate.weight
    for i in range(5):
        message, gates = torch.zeros(8), torch.zeros(5)
        for j in range(5):
            if edges.neighbors[0, i, j] < 0:
                continue
            label = int(edges.relations[0, i, j]) if relations else 0
            back = int(reverse_relations(torch.tensor(label)))
            parts = [(itself, gate_itself, 0)] if i == j else [(out, gate_out, label), (into, gate_into, back)]
            for matrix, direction, r in parts:
                gate = torch.sigmoid(direction @ regions[0, j] + layer.gate_bias.weight[r, 0])
                message += gate * (matrix @ regions[0, j] + layer.message_bias.weight[r])
                gates[j] += gate
        torch.testing.assert_close(output[0, i], regions[0, i] + message.clamp_min(0))
        torch.testing.assert_close(shares[0, i], gates / gates.sum())
    if relations:
        assert (edges.neighbors[0] >= 0).sum() > 10 and len(edges.relations.unique()) > 4


@pytest.mark.parametrize("kind", ["all", "spatial", "similar"])
def test_attention_over_the_graph_equals_its_equations(kind):
    layer = make_graph(edges=kind).layers[0]
    regions, boxes = torch.randn(1, 5, 8), some_boxes(1, 5, seed=3)
    edges = build_edges(kind, regions, boxes, 2)
    output, edge_weights = layer(regions, edges)
    for i in range(5):
        present = edges.neighbors[0, i] >= 0
        neighbors = edges.neighbors[0, i, present]
        sent = regions[0, neighbors] @ layer.source_proj.weight.T + layer.source_proj.bias
        if kind == "spatial":
            sent = sent + layer.relation.weight[edges.relations[0, i, present]]
        target = layer.target_proj.weight @ regions[0, i] + layer.target_proj.bias
        scores = torch.nn.functional.leaky_relu(target + sent, 0.2).view(-1, 2, 4).mul(layer.score).sum(-1)
        weights = scores.softmax(0)  # (N, G)
        message = (weights.unsqueeze(-1) * sent.view(-1, 2, 4)).sum(0).flatten()
        torch.testing.assert_close(output[0, i], layer.norm(regions[0, i] + message))
        torch.testing.assert_close(edge_weights[0, i, present], weights.mean(1))
        assert (edge_weights[0, i, ~present] == 0).all()


def test_grid_neighbors_surround_a_region():
    neighbors = [{index for index in row if index >= 0} for row in grid_neighbors(3).tolist()]
    assert neighbors[0] == {0, 1, 3, 4} and neighbors[4] == set(range(9)) and neighbors[5] == {1, 2, 4, 5, 7, 8}


@pytest.mark.parametrize(("side", "knn"), [(4, 3), (2, 5), (7, 0)])
def test_the_graph_adds_the_most_similar_regions_and_repeats_none(side, knn):
    torch.manual_seed(0)
    features = torch.randn(2, side * side, 6)
    graph = build_edges("grid", features, grid_boxes(side).expand(2, -1, -1), knn).neighbors
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
    boxes = grid_boxes(7).expand(2, -1, -1)
    features = torch.rand(2, 49, 256)  # as similar as features behind a ReLU are
    with torch.autocast("cpu", torch.bfloat16):
        mixed = build_edges("grid", features, boxes, 4).neighbors
    assert torch.equal(mixed, build_edges("grid", features, boxes, 4).neighbors)


def test_edge_attribution_propagates_alpha_back_through_the_layers():
    neighbors = torch.tensor([[0, 1], [1, 2], [2, -1]])
    first, last = torch.tensor([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]]), torch.tensor([[0.2, 0.8], [1.0, 0.0], [1, 0.0]])
    edges = edge_attribution(torch.tensor([1.0, 0.0, 0.0]), neighbors, [first, last])
    # Last layer: edge 1 -> 0 with 0.8. Before it the attention is 0.2 on region 0 and 0.8 on region 1.
    assert edges == {(1, 0): pytest.approx(0.8 + 0.2 * 0.5), (2, 1): pytest.approx(0.8 * 0.75)}
    assert list(edges) == [(1, 0), (2, 1)]
