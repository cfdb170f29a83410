"""Graph attention over the regions of a photo: each region hears from its neighbours and from those that look alike.

Shapes: B images, R regions, D features of a region as the decoder sees it, F features of the encoder, N neighbours of
a region, itself included, G heads.
"""

import torch
from torch import nn
from torch.nn import functional

from layers import Dropout, start_linear


def grid_neighbours(side):
    """The edges of a grid: each region's own place and the up to eight around it, (R, 9), -1 beyond the border."""
    place = torch.arange(side * side)
    rows, columns = place // side, place % side
    steps = torch.tensor([(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)])
    rows, columns = rows.unsqueeze(1) + steps[:, 0], columns.unsqueeze(1) + steps[:, 1]  # (R, 9)
    inside = (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)
    return (rows * side + columns).where(inside, -1)


def region_graph(features, number):
    """The graph of each photo: grid neighbours, and as many others as `number` whose features are most similar.

    features (B, R, F) of a square grid -> neighbours (B, R, N), N = 9 + number, -1 where there is none. Similarity is
    the cosine between features. No region is named twice by another.
    """
    B, R, _ = features.shape
    on_grid = grid_neighbours(round(R**0.5)).to(features.device)
    number = min(number, R - 1)
    if not number:
        return on_grid.expand(B, -1, -1)
    with torch.autocast(features.device.type, enabled=False):  # bfloat16 could not tell who is most similar
        directions = functional.normalize(features.detach().float(), dim=-1)
        similarity = directions @ directions.transpose(1, 2)  # (B, R, R)
    # Those on the grid are neighbours already; one column more takes the -1 that stands for none.
    taken = torch.zeros(R, R + 1, dtype=torch.bool, device=features.device).scatter(1, on_grid % (R + 1), True)
    similarity = similarity.masked_fill(taken[:, :R], -2)  # below any cosine
    best = similarity.topk(number)
    alike = best.indices.masked_fill(best.values < -1.5, -1)  # a small grid has no others left
    return torch.cat([on_grid.expand(B, -1, -1), alike], dim=-1)


class GraphLayer(nn.Module):
    """Multi-head graph attention, with a residual connection and normalisation.

    Source: GATv2, "How Attentive are Graph Attention Networks?" (Brody et al., 2022), equations 3, 4 and 7.
    """

    def __init__(self, region_size, heads, dropout):
        super().__init__()
        self.receive = nn.Linear(region_size, region_size)
        self.send = nn.Linear(region_size, region_size)
        self.score = nn.Parameter(torch.empty(heads, region_size // heads))
        self.norm = nn.LayerNorm(region_size)
        self.dropout = Dropout(dropout)
        start_linear(self.receive)
        start_linear(self.send)
        nn.init.xavier_uniform_(self.score)

    def forward(self, regions, neighbours):
        """regions (B, R, D), neighbours (B, R, N) -> regions (B, R, D), weights of the edges (B, R, N, G)."""
        B, R, _ = neighbours.shape
        places = neighbours.clamp_min(0) + R * torch.arange(B, device=neighbours.device).view(-1, 1, 1)
        # embedding gathers rows, and its gradient adds them up faster than that of an index.
        sent = functional.embedding(places, self.send(regions).flatten(0, 1))  # (B, R, N, D)
        sent = sent.unflatten(-1, self.score.shape)  # (B, R, N, G, D / G)
        received = self.receive(regions).unflatten(-1, self.score.shape).unsqueeze(2)  # (B, R, 1, G, D / G)
        scores = (functional.leaky_relu(received + sent, 0.2) * self.score).sum(dim=-1)  # (B, R, N, G)
        weights = scores.float().masked_fill(neighbours.unsqueeze(-1) < 0, float("-inf")).softmax(dim=2)
        message = (weights.to(sent.dtype).unsqueeze(-1) * sent).sum(dim=2).flatten(-2)  # (B, R, D)
        return self.norm(regions + self.dropout(message)), weights


class RegionGraph(nn.Module):
    """Graph layers over the regions of a photo; none leaves them as they are."""

    def __init__(self, region_size, layers, neighbours, heads, dropout):
        super().__init__()
        self.layers = nn.ModuleList(GraphLayer(region_size, heads, dropout) for _ in range(layers))
        self.neighbours = neighbours

    def forward(self, regions, features):
        """Let regions hear from each other.

        regions (B, R, D), features (B, R, F) of the encoder, which tell who looks alike -> regions (B, R, D),
        neighbours (B, R, N), None without layers, and each layer's weights of the edges (B, R, N), the heads' mean.
        """
        if not self.layers:
            return regions, None, []
        neighbours, traced = region_graph(features, self.neighbours), []
        for layer in self.layers:
            regions, weights = layer(regions, neighbours)
            traced.append(weights.mean(dim=-1))
        return regions, neighbours, traced


def edges_that_mattered(look, neighbours, layers):
    """How much each edge told the decoder at one word: {(sender, receiver): share}, the largest first.

    look (R) is where the decoder looked; neighbours (R, N) and layers, a list of (R, N), are those of one photo as
    `RegionGraph` returns them. From the last layer to the first, a region's share is handed on to those it heard from.
    """
    edges = {}
    receivers = torch.arange(len(look)).unsqueeze(1).expand_as(neighbours)
    present = (neighbours >= 0) & (neighbours != receivers)
    for weights in reversed(layers):
        shares = look.unsqueeze(1) * weights  # (R, N)
        for sender, receiver, share in zip(
            neighbours[present].tolist(), receivers[present].tolist(), shares[present].tolist(), strict=True
        ):
            edges[sender, receiver] = edges.get((sender, receiver), 0.0) + share
        look = torch.zeros_like(look).index_add(0, neighbours.clamp_min(0).flatten(), shares.flatten())
    return dict(sorted(edges.items(), key=lambda edge: -edge[1]))
