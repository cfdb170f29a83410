"""Graph attention over the regions of an image: edges to grid neighbors and to the regions with similar features.

Shapes: B images, R regions, D their width in the decoder, F in the encoder, N neighbors of a region, itself included,
G heads.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from modules.layers import Dropout, init_linear
from utils import copy_to_device


def grid_neighbors(side: int) -> Tensor:
    """The 3 x 3 neighborhood of each region of a grid, itself included: indices (R, 9), -1 outside the grid."""
    index = torch.arange(side * side)
    rows, columns = index // side, index % side
    offsets = torch.tensor([(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)])
    rows, columns = rows.unsqueeze(1) + offsets[:, 0], columns.unsqueeze(1) + offsets[:, 1]  # (R, 9)
    inside = (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)
    return (rows * side + columns).where(inside, -1)


def build_graph(features: Tensor, knn: int) -> Tensor:
    """The graph of each image: grid neighbors and, of the other regions, the `knn` with the most similar features.

    features (B, R, F) of a square grid -> neighbors (B, R, N), N = 9 + knn, -1 where there is none. Similarity is the
    cosine of the features. No neighbor of a region is listed twice.
    """
    B, R, _ = features.shape
    on_grid = copy_to_device(grid_neighbors(round(R**0.5)), features.device)
    knn = min(knn, R - 1)
    if not knn:
        return on_grid.expand(B, -1, -1)
    with torch.autocast(features.device.type, enabled=False):  # bfloat16 is too coarse to rank the similarities
        directions = functional.normalize(features.detach().float(), dim=-1)
        similarity = directions @ directions.transpose(1, 2)  # (B, R, R)
    # Exclude the grid neighbors; an additional column takes the index -1.
    is_neighbor = torch.zeros(R, R + 1, dtype=torch.bool, device=features.device).scatter(1, on_grid % (R + 1), True)
    similarity = similarity.masked_fill(is_neighbor[:, :R], -2)  # below any cosine
    nearest = similarity.topk(knn)
    similar = nearest.indices.masked_fill(nearest.values < -1.5, -1)  # a small grid may have fewer than knn others
    return torch.cat([on_grid.expand(B, -1, -1), similar], dim=-1)


class GraphLayer(nn.Module):
    """Multi-head graph attention with a residual connection and layer normalization.

    Source: GATv2, "How Attentive are Graph Attention Networks?" (Brody et al., 2022), equations 3, 4 and 7.
    """

    def __init__(self, *, region_dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.target_proj = nn.Linear(region_dim, region_dim)
        self.source_proj = nn.Linear(region_dim, region_dim)
        self.score = nn.Parameter(torch.empty(heads, region_dim // heads))
        self.norm = nn.LayerNorm(region_dim)
        self.dropout = Dropout(dropout)
        init_linear(self.target_proj)
        init_linear(self.source_proj)
        nn.init.xavier_uniform_(self.score)

    def forward(self, regions: Tensor, neighbors: Tensor) -> tuple[Tensor, Tensor]:
        """regions (B, R, D), neighbors (B, R, N) -> regions (B, R, D), edge weights (B, R, N, G)."""
        B, R, _ = neighbors.shape
        rows = neighbors.clamp_min(0) + R * torch.arange(B, device=neighbors.device).view(-1, 1, 1)
        # embedding() gathers rows like indexing, with a faster backward pass.
        source = functional.embedding(rows, self.source_proj(regions).flatten(0, 1))  # (B, R, N, D)
        source = source.unflatten(-1, self.score.shape)  # (B, R, N, G, D / G)
        target = self.target_proj(regions).unflatten(-1, self.score.shape).unsqueeze(2)  # (B, R, 1, G, D / G)
        scores = (functional.leaky_relu(target + source, 0.2) * self.score).sum(dim=-1)  # (B, R, N, G)
        weights = scores.float().masked_fill(neighbors.unsqueeze(-1) < 0, float("-inf")).softmax(dim=2)
        message = (weights.to(source.dtype).unsqueeze(-1) * source).sum(dim=2).flatten(-2)  # (B, R, D)
        return self.norm(regions + self.dropout(message)), weights


class RegionGraph(nn.Module):
    """A stack of graph layers on the graph of each image; the identity for 0 layers.

    Args:
        region_dim: D, a multiple of heads.
        layers: number of graph layers.
        knn: neighbors of a region by similarity, besides those on the grid.
        heads: G.
        dropout: on the message of each layer.
    """

    def __init__(self, *, region_dim: int, layers: int, knn: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            GraphLayer(region_dim=region_dim, heads=heads, dropout=dropout) for _ in range(layers)
        )
        self.knn = knn

    def forward(self, regions: Tensor, features: Tensor) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Update the regions by message passing.

        regions (B, R, D), features (B, R, F) of the encoder, which define the graph -> regions (B, R, D), neighbors
        (B, R, N), None without layers, and for each layer the edge weights (B, R, N), averaged over the heads.
        """
        if not self.layers:
            return regions, None, []
        neighbors = build_graph(features, self.knn)
        edge_weights = []
        for layer in self.layers:
            regions, weights = layer(regions, neighbors)
            edge_weights.append(weights.mean(dim=-1))
        return regions, neighbors, edge_weights


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
