"""Graph layers over the regions of an image, on edges to grid neighbors, similar regions, or related or all regions.

Shapes: B images, R regions, D their width in the decoder, F in the encoder, N neighbors of a region, itself included,
G heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from modules.layers import Dropout, init_linear
from modules.regions import has_area
from modules.relations import NO_RELATION, RELATIONS, reverse_relations, spatial_relations
from utils import InputError, copy_to_device

if TYPE_CHECKING:
    from models import ModelSettings

GRAPH_EDGES = ("grid", "similar", "spatial", "all")


class Edges(NamedTuple):
    """The neighbors of each region of each image."""

    neighbors: Tensor  # (B, R, N) indices of regions, -1 where there is none
    relations: Tensor | None  # (B, R, N) to them, indices into `modules.relations.RELATIONS`; None: not labeled


def grid_neighbors(side: int) -> Tensor:
    """The 3 x 3 neighborhood of each region of a grid, itself included: indices (R, 9), -1 outside the grid."""
    index = torch.arange(side * side)
    rows, columns = index // side, index % side
    offsets = torch.tensor([(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)])
    rows, columns = rows.unsqueeze(1) + offsets[:, 0], columns.unsqueeze(1) + offsets[:, 1]  # (R, 9)
    inside = (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)
    return (rows * side + columns).where(inside, -1)


def build_edges(kind: str, features: Tensor, boxes: Tensor, knn: int) -> Edges:
    """The graph of each image.

    Each region is a neighbor of its own. "grid": those around a cell, and `knn` others with the most similar features.
    "similar": the latter alone. "spatial": the regions to which it has a spatial relation, with the relation. "all":
    all regions.

    Args:
        kind: one of GRAPH_EDGES; "grid" is for the cells of a square grid.
        features: (B, R, F), compared by their cosines.
        boxes: (B, R, 4); those without area are no regions, and neighbors of none but themselves.
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
    """Each region itself or, `on_grid`, the cells around it; of the others the `knn` with the most similar features.

    features (B, R, F), exists (B, R) -> neighbors (B, R, N), -1 where there is none; none is listed twice.
    """
    B, R, _ = features.shape
    first = grid_neighbors(round(R**0.5)) if on_grid else torch.arange(R).unsqueeze(1)  # (R, 9) or (R, 1)
    excluded = first.where(first >= 0, R)  # an additional column R takes the index -1
    first, excluded = (copy_to_device(x, features.device) for x in (first, excluded))
    k = torch.sym_min(knn, R - 1)  # min would fix R where it is exported
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
    """What each region's neighbors have: x (B, R, ...), neighbors (B, R, N) -> (B, R, N, ...), region 0's for -1."""
    B, R, _ = neighbors.shape
    rows = neighbors.clamp_min(0) + R * torch.arange(B, device=neighbors.device).view(-1, 1, 1)
    # embedding() gathers rows like indexing, with a faster backward pass.
    return functional.embedding(rows, x.flatten(0, 1))


class GraphLayer(nn.Module):
    """Multi-head graph attention with a residual connection and layer normalization.

    Source: GATv2, "How Attentive are Graph Attention Networks?" (Brody et al., 2022), equations 3, 4 and 7. The
    embedding of an edge's relation, where edges have some, is added to what the neighbor sends, in score and message.
    """

    def __init__(self, *, region_dim: int, heads: int, relations: bool, dropout: float) -> None:
        super().__init__()
        self.target_proj = nn.Linear(region_dim, region_dim)
        self.source_proj = nn.Linear(region_dim, region_dim)
        self.score = nn.Parameter(torch.empty(heads, region_dim // heads))
        self.relation = nn.Embedding(len(RELATIONS), region_dim) if relations else None
        self.norm = nn.LayerNorm(region_dim)
        self.dropout = Dropout(dropout)
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

    Source: GCN-LSTM (Yao et al., 2018), equations 3 and 4. An edge has two directions, and its matrix and gate depend
    on them; biases depend on the relation of the sender to the receiver, too:

        v_i' = v_i + ReLU(sum over j and directions d of sigmoid(u_d . v_j + c_r) (W_d v_j + b_r)),

    where r is the relation of i to j in the direction to the neighbor, and that of j to i in the other one.
    """

    DIRECTIONS = 3  # itself, from the region to the neighbor, from the neighbor to the region

    def __init__(self, *, region_dim: int, relations: bool, dropout: float) -> None:
        super().__init__()
        self.message = nn.Linear(region_dim, self.DIRECTIONS * region_dim, bias=False)
        self.gate = nn.Linear(region_dim, self.DIRECTIONS, bias=False)
        labels = len(RELATIONS) if relations else 1  # NO_RELATION is that of a region to itself, or of all edges
        self.message_bias = nn.Embedding(labels, region_dim)
        self.gate_bias = nn.Embedding(labels, 1)
        self.dropout = Dropout(dropout)
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
    """A stack of graph layers on the graph of each image; the identity for 0 layers.

    Args:
        settings: graph_layers, graph_layer, graph_edges, graph_knn, graph_heads and dropout.
        region_dim: D; for graph attention a multiple of graph_heads.

    Raises InputError for heads that do not divide region_dim.
    """

    def __init__(self, settings: ModelSettings, *, region_dim: int) -> None:
        super().__init__()
        layer, edges, heads = settings.graph_layer, settings.graph_edges, settings.graph_heads
        if settings.graph_layers and layer == "gat" and region_dim % heads:
            raise InputError(f"--graph_heads {heads}: does not divide the {region_dim} features of a region")
        sizes: dict[str, Any] = {
            "region_dim": region_dim,
            "dropout": settings.dropout,
            "relations": edges == "spatial",
        }
        if layer == "gat":
            sizes["heads"] = heads
        self.layers = nn.ModuleList(GRAPH_LAYERS[layer](**sizes) for _ in range(settings.graph_layers))
        self.edges, self.knn = edges, settings.graph_knn

    def forward(self, regions: Tensor, features: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Update the regions by message passing.

        regions (B, R, D), features (B, R, F) and boxes (B, R, 4), which define the graph -> regions (B, R, D),
        neighbors (B, R, N), None without layers, and for each layer the edge weights (B, R, N).
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
    """Contribution of each edge to the decoder's attention for one word, largest first: {(source, target): share}.

    The attention is propagated back from the last graph layer: a target passes its share to its neighbors in
    proportion to the edge weights, as in attention rollout (Abnar and Zuidema, 2020). Self-loops are left out.

    Args:
        alpha: (R,) the decoder's attention weights for the word.
        neighbors: (R, N) of the image, from `RegionGraph.forward`.
        edge_weights: for each layer (R, N) of the image, from there too.
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
