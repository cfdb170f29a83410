"""Graph layers over the regions of an image, on edges to grid neighbors, similar regions, or related or all regions.

Shapes: B images, R regions, D their width in the decoder, F in the encoder, N neighbors of a region, itself included,
G heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from modules.cpu import Dropout
from modules.layers import init_linear
from modules.regions import NO_RELATION, RELATIONS, has_area, reverse_relations, spatial_relations
from utils import InputError, copy_to_device

if TYPE_CHECKING:
    from models import ModelSettings

GRAPH_EDGES = ("grid", "similar", "spatial", "all")


class Edges(NamedTuple):
    """The neighbors of each region of each image."""

    neighbors: Tensor  # (B, R, N) indices of regions, -1 where there is none
    relations: Tensor | None  # (B, R, N) indices into `modules.regions.RELATIONS`; None: not labeled


def grid_neighbors(side: int) -> Tensor:
    """Return the 3 x 3 neighborhood of each region of a grid, itself included: indices (R, 9), -1 outside the grid."""
    index = torch.arange(side * side)
    rows, columns = index // side, index % side
    offsets = torch.tensor([(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)])
    rows, columns = rows.unsqueeze(1) + offsets[:, 0], columns.unsqueeze(1) + offsets[:, 1]  # (R, 9)
    inside = (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)
    return (rows * side + columns).where(inside, -1)


def build_edges(kind: str, features: Tensor, boxes: Tensor, knn: int) -> Edges:
    """Build the graph of each image. Every region is a neighbor of itself.

    Args:
        kind: one of GRAPH_EDGES. "grid": the cells around a cell of a square grid, and the `knn` others with the most
            similar features. "similar": only these `knn`. "spatial": regions with a spatial relation, and the relation.
            "all": all regions.
        features: (B, R, F), compared by their cosines.
        boxes: (B, R, 4); padding, without area, has no other neighbors.
        knn: number of similar neighbors.
    """
    if kind == "grid":
        return Edges(similar_neighbors(features, has_area(boxes), knn, on_grid=True), None)
    if kind == "similar":
        return Edges(similar_neighbors(features, has_area(boxes), knn, on_grid=False), None)
    R = boxes.shape[1]
    itself, exists = torch.eye(R, dtype=torch.bool, device=boxes.device), has_area(boxes)
    relations = spatial_relations(boxes) if kind == "spatial" else None
    is_edge = exists.unsqueeze(1) & exists.unsqueeze(2) if relations is None else relations != NO_RELATION
    return Edges(torch.arange(R, device=boxes.device).where(is_edge | itself, -1), relations)


def similar_neighbors(features: Tensor, exists: Tensor, knn: int, on_grid: bool) -> Tensor:
    """Find each region's most similar `knn` others, after itself or, if `on_grid`, after the cells around it.

    features (B, R, F), exists (B, R) -> neighbors (B, R, N), -1 where there is none; none is listed twice.
    """
    B, R, _ = features.shape
    first = grid_neighbors(round(R**0.5)) if on_grid else torch.arange(R).unsqueeze(1)  # (R, 9) or (R, 1)
    excluded = first.where(first >= 0, R)  # an additional column R takes the index -1
    first, excluded = (copy_to_device(x, features.device) for x in (first, excluded))
    k = torch.sym_min(knn, R - 1)  # min() would make R a constant in an export
    if not k:
        return first.expand(B, -1, -1)
    with torch.autocast(features.device.type, enabled=False):  # bfloat16 is too coarse to rank the similarities
        directions = functional.normalize(features.detach().float(), dim=-1)
        similarity = directions @ directions.transpose(1, 2)  # (B, R, R)
    # Exclude the first neighbors.
    is_neighbor = torch.zeros(R, R + 1, dtype=torch.bool, device=features.device)
    is_neighbor = is_neighbor.scatter(1, excluded, True)
    similarity = similarity.masked_fill(is_neighbor[:, :R] | ~(exists.unsqueeze(1) & exists.unsqueeze(2)), -2)
    nearest = similarity.topk(k)  # -2 is below any cosine
    similar = nearest.indices.masked_fill(nearest.values < -1.5, -1)  # there may be fewer than knn others
    return torch.cat([first.expand(B, -1, -1), similar], dim=-1)


def gather_neighbors(x: Tensor, neighbors: Tensor) -> Tensor:
    """Gather x (B, R, ...) of each region's neighbors (B, R, N), region 0's for -1 -> (B, R, N, ...)."""
    B, R, _ = neighbors.shape
    rows = neighbors.clamp_min(0) + R * torch.arange(B, device=neighbors.device).view(-1, 1, 1)
    # embedding() gathers rows like indexing, with a faster backward pass.
    return functional.embedding(rows, x.flatten(0, 1))


class GraphLayer(nn.Module):
    """Multi-head graph attention with a residual connection and layer normalization.

    Source: GATv2, "How Attentive are Graph Attention Networks?" (Brody et al., 2022), equations 3, 4 and 7. If edges
    have relations, their embedding is added to the neighbor's projection in score and message.
    """

    def __init__(self, settings: ModelSettings, region_dim: int) -> None:
        super().__init__()
        self.target_proj = nn.Linear(region_dim, region_dim)
        self.source_proj = nn.Linear(region_dim, region_dim)
        self.score = nn.Parameter(torch.empty(settings.graph_heads, region_dim // settings.graph_heads))
        self.relation = nn.Embedding(len(RELATIONS), region_dim) if settings.graph_edges == "spatial" else None
        self.norm = nn.LayerNorm(region_dim)
        self.dropout = Dropout(settings.dropout)
        init_linear(self.target_proj)
        init_linear(self.source_proj)
        nn.init.xavier_uniform_(self.score)
        if self.relation is not None:
            nn.init.xavier_uniform_(self.relation.weight)

    def forward(self, regions: Tensor, edges: Edges) -> tuple[Tensor, Tensor]:
        """regions (B, R, D) -> regions (B, R, D), edge weights (B, R, N), averaged over the heads."""
        neighbors, relations = edges
        source = gather_neighbors(self.source_proj(regions), neighbors)  # (B, R, N, D)
        if self.relation is not None and relations is not None:
            source = source + self.relation(relations).to(source.dtype)
        source = source.unflatten(-1, self.score.shape)  # (B, R, N, G, D / G)
        target = self.target_proj(regions).unflatten(-1, self.score.shape).unsqueeze(2)  # (B, R, 1, G, D / G)
        scores = (functional.leaky_relu(target + source, 0.2) * self.score).sum(dim=-1)  # (B, R, N, G)
        weights = scores.float().masked_fill(neighbors.unsqueeze(-1) < 0, float("-inf")).softmax(dim=2)
        message = (weights.to(source.dtype).unsqueeze(-1) * source).sum(dim=2).flatten(-2)  # (B, R, D)
        return self.norm(regions + self.dropout(message)), weights.mean(dim=-1)


class GatedGraphLayer(nn.Module):
    """A gated graph convolution with a residual connection.

    Source: GCN-LSTM (Yao et al., 2018), equations 3 and 4. An edge has two directions, which have their own matrix and
    gate. Biases also depend on the relation r:

        v_i' = v_i + ReLU(sum over j and directions d of sigmoid(u_d . v_j + c_r) (W_d v_j + b_r)).

    In the direction to the neighbor, r is the relation of i to j, in the other direction that of j to i.
    """

    DIRECTIONS = 3  # itself, from the region to the neighbor, from the neighbor to the region

    def __init__(self, settings: ModelSettings, region_dim: int) -> None:
        super().__init__()
        self.message = nn.Linear(region_dim, self.DIRECTIONS * region_dim, bias=False)
        self.gate = nn.Linear(region_dim, self.DIRECTIONS, bias=False)
        labels = len(RELATIONS) if settings.graph_edges == "spatial" else 1  # of edges without relations: NO_RELATION
        self.message_bias = nn.Embedding(labels, region_dim)
        self.gate_bias = nn.Embedding(labels, 1)
        self.dropout = Dropout(settings.dropout)
        init_linear(self.message)
        init_linear(self.gate)
        nn.init.zeros_(self.message_bias.weight)
        nn.init.zeros_(self.gate_bias.weight)

    def forward(self, regions: Tensor, edges: Edges) -> tuple[Tensor, Tensor]:
        """regions (B, R, D) -> regions (B, R, D), edge weights (B, R, N): the shares of the edges in the gates."""
        neighbors, relations = edges
        R, D = regions.shape[1:]
        if relations is None:
            relations = torch.zeros_like(neighbors)
        itself = neighbors == torch.arange(R, device=neighbors.device).unsqueeze(1)  # (B, R, N)
        gates = gather_neighbors(self.gate(regions), neighbors)  # (B, R, N, 3)
        labels = torch.stack([relations, relations, reverse_relations(relations)], dim=-1)  # (B, R, N, 3)
        is_sent = torch.stack([itself, ~itself, ~itself], dim=-1) & (neighbors >= 0).unsqueeze(-1)
        gates = (gates + self.gate_bias(labels).squeeze(-1)).sigmoid() * is_sent
        # What the neighbors send is linear: the gates of all edges, times all regions and all biases.
        sent = self.message(regions).unflatten(-1, (self.DIRECTIONS, D))  # (B, R, 3, D)
        message = torch.zeros_like(regions)
        for d in range(self.DIRECTIONS):
            to_regions = gates.new_zeros(*regions.shape[:2], R).scatter_add(2, neighbors.clamp_min(0), gates[..., d])
            to_biases = gates.new_zeros(*regions.shape[:2], len(self.message_bias.weight))
            to_biases = to_biases.scatter_add(2, labels[..., d], gates[..., d])
            message = message + to_regions @ sent[:, :, d] + to_biases @ self.message_bias.weight
        shares = gates.float().sum(dim=-1)  # (B, R, N)
        return regions + self.dropout(message.relu()), shares / shares.sum(dim=-1, keepdim=True).clamp_min(1e-9)


GRAPH_LAYERS = {"gat": GraphLayer, "gcn": GatedGraphLayer}


class RegionGraph(nn.Module):
    """A stack of graph layers on the graph of each image; with 0 layers, the identity.

    Args:
        settings: graph_layers, graph_layer, graph_edges, graph_knn, graph_heads and dropout.
        region_dim: D; for graph attention a multiple of graph_heads.

    Raises InputError for heads that do not divide region_dim.
    """

    def __init__(self, settings: ModelSettings, *, region_dim: int) -> None:
        super().__init__()
        heads, layer = settings.graph_heads, GRAPH_LAYERS[settings.graph_layer]
        if settings.graph_layers and layer is GraphLayer and region_dim % heads:
            raise InputError(f"--graph_heads {heads}: does not divide the {region_dim} features of a region")
        self.layers = nn.ModuleList(layer(settings, region_dim) for _ in range(settings.graph_layers))
        self.edges, self.knn = settings.graph_edges, settings.graph_knn

    def forward(self, regions: Tensor, features: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Update regions (B, R, D) by message passing on the graph of features (B, R, F) and boxes (B, R, 4).

        Returns regions (B, R, D), neighbors (B, R, N) or None without layers, and each layer's edge weights (B, R, N).
        """
        if not self.layers:
            return regions, None, []
        edges = build_edges(self.edges, features, boxes, self.knn)
        edge_weights = []
        for layer in self.layers:
            regions, weights = layer(regions, edges)
            edge_weights.append(weights)
        return regions, edges.neighbors, edge_weights


def edge_attribution(alpha: Tensor, neighbors: Tensor, edge_weights: list[Tensor]) -> dict[tuple[int, int], float]:
    """Compute each edge's contribution to the decoder's attention for a word, largest first: {(source, target): share}.

    The attention is propagated back from the last graph layer: a target passes its share to its neighbors in
    proportion to the edge weights, as in attention rollout (Abnar and Zuidema, 2020). Self-loops are left out.

    Args:
        alpha: (R,) the decoder's attention weights for the word.
        neighbors, edge_weights: of the image, (R, N), from `RegionGraph.forward`; edge weights for each layer.
    """
    contributions: dict[tuple[int, int], float] = {}
    targets = torch.arange(len(alpha)).unsqueeze(1).expand_as(neighbors)
    is_edge = (neighbors >= 0) & (neighbors != targets)
    edges = list(zip(neighbors[is_edge].tolist(), targets[is_edge].tolist(), strict=True))
    for weights in reversed(edge_weights):
        shares = alpha.unsqueeze(1) * weights  # (R, N)
        for edge, share in zip(edges, shares[is_edge].tolist(), strict=True):
            contributions[edge] = contributions.get(edge, 0.0) + share
        alpha = torch.zeros_like(alpha).index_add(0, neighbors.clamp_min(0).flatten(), shares.flatten())
    return dict(sorted(contributions.items(), key=lambda item: -item[1]))
