"""The transformer: encoder layers over the regions of an image, and a decoder.

Source: "Attention Is All You Need" (Vaswani et al., 2017).

Shapes: B images, R regions, D their width, C captions of an image (beams in a search), T words of a caption, N words
of all captions of a batch without padding, t words before the one that is decoded, E width of a word embedding, H of
the decoder, n heads, d = H / n their width, Q queries, K keys, V words of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Container
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from modules.cpu import Dropout
from modules.decoders import Decoder, DecoderOutput, Nested, PredictedWords, StepOutput, sample_words
from modules.layers import init_linears
from modules.regions import GEOMETRY_FEATURES, pairwise_geometry
from utils import InputError, copy_to_device

if TYPE_CHECKING:
    from models import ModelSettings

POSITIONS = ("none", "learned", "sine")
SMALLEST_WEIGHT = 1e-6  # of geometry, so that its logarithm is finite
INIT_STD = 0.02  # of learned positions, as in ViT (Dosovitskiy et al., 2021)


def feed_forward(width: int, ffn_dim: int) -> nn.Sequential:
    """Build the feed-forward network of a layer (section 3.3), with the paper's ReLU: GELU is slower on a CPU."""
    return nn.Sequential(nn.Linear(width, ffn_dim), nn.ReLU(inplace=True), nn.Linear(ffn_dim, width))


def split_heads(x: Tensor, parts: int, heads: int) -> Tensor:
    """Split projections, such as queries, keys and values, into heads: (..., parts n d) -> (..., parts, n, d)."""
    return x.unflatten(-1, (parts, heads, x.shape[-1] // (parts * heads)))


def scaled_dot_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    with_alpha: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute scaled dot-product attention (equation 1), and its weights alpha if `with_alpha`.

    On a CPU in bfloat16 torch's fused attention takes seven times as long, because of its gradient.

    Args:
        query: (..., n, Q, d).
        key, value: (..., n, K, d).
        mask: boolean (..., 1, 1, K), False for keys that no query sees, or numbers (..., n, Q, K) added to the scores.
        is_causal: no query sees a later key; Q = K.

    Returns:
        Attended values (..., n, Q, d) and alpha (..., n, Q, K) or None.
    """
    if not (with_alpha or query.is_cpu):
        return fused_attention(query, key, value, mask, is_causal=is_causal), None
    scores = (query @ key.transpose(-1, -2)).float() / math.sqrt(query.shape[-1])
    if is_causal:
        scores = scores + torch.full(scores.shape[-2:], -math.inf, device=scores.device).triu(diagonal=1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    alpha = scores.softmax(dim=-1)
    return alpha.to(value.dtype) @ value, alpha if with_alpha else None


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, is_causal: bool = False
) -> Tensor:
    """Compute `scaled_dot_product` without alpha by torch's fused kernels, which take only four dimensions."""
    leading = query.shape[:-3]
    query, key, value = (x.flatten(0, -4) for x in (query, key, value))
    if mask is not None:
        mask = mask.flatten(0, -4)
        mask = mask if mask.dtype == torch.bool else mask.to(query.dtype)
    attended = functional.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal)
    return attended.unflatten(0, leading)


def sine_positions(positions: Tensor, width: int) -> Tensor:
    """Encode positions (...) as sines and cosines (..., width) of geometrically rising wavelengths.

    Source: Vaswani et al., 2017, section 3.5, with all sines before all cosines. There is no largest position.
    """
    half = (width + 1) // 2
    frequencies = torch.exp(torch.arange(half, device=positions.device) * (-math.log(10_000) / half))
    angles = positions.unsqueeze(-1) * frequencies  # (..., half)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[..., :width]


def grid_positions(side: int, width: int, device: torch.device | None = None) -> Tensor:
    """Encode the rows and columns of a square grid: (R, width), half of it for each, width a multiple of 4.

    Source: "End-to-End Object Detection with Transformers" (DETR, Carion et al., 2020), appendix A.4, with unit steps
    between rows and columns.
    """
    codes = sine_positions(torch.arange(side, device=device), width // 2)  # (side, width / 2)
    rows, columns = codes.unsqueeze(1).expand(-1, side, -1), codes.unsqueeze(0).expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


class EncoderLayer(nn.Module):
    """Self-attention of the regions and a feed-forward network (section 3.1).

    Each of these sublayers follows a layer normalization and has a residual connection ("On Layer Normalization in the
    Transformer Architecture", Xiong et al., 2020), so they train without a long warmup. Dropout is on its output
    (section 5.4). With the setting geometry the weights also depend on the relative position and size of the regions
    ("Image Captioning: Transforming Objects into Words", Herdade et al., 2019, equations 6 to 8).
    """

    def __init__(self, settings: ModelSettings, width: int) -> None:
        super().__init__()
        self.heads = settings.heads
        self.attention_norm, self.ffn_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_proj = nn.Linear(width, width)
        self.ffn = feed_forward(width, settings.ffn_dim)
        self.geometry = nn.Linear(GEOMETRY_FEATURES, settings.heads) if settings.geometry else None
        self.dropout = Dropout(settings.dropout)

    def forward(self, regions: Tensor, mask: Tensor | None = None, geometry: Tensor | None = None) -> Tensor:
        """regions (B, R, D), mask (B, 1, 1, R), geometry (B, R, R, GEOMETRY_FEATURES) -> (B, R, D)."""
        if self.geometry is not None and geometry is not None:
            bias = self.geometry(geometry).relu().float().clamp_min(SMALLEST_WEIGHT).log().permute(0, 3, 1, 2)
            mask = bias if mask is None else bias.masked_fill(~mask, -math.inf)  # (B, n, R, R)
        projected = split_heads(self.query_key_value(self.attention_norm(regions)), 3, self.heads)  # (B, R, 3, n, d)
        query, key, value = projected.permute(2, 0, 3, 1, 4)  # (B, n, R, d) each
        attended = scaled_dot_product(query, key, value, mask)[0].transpose(1, 2).flatten(-2)  # (B, R, D)
        regions = regions + self.dropout(self.attention_proj(attended))
        return regions + self.dropout(self.ffn(self.ffn_norm(regions)))


class RegionEncoder(nn.Module):
    """A stack of encoder layers over the regions, after adding positions; with 0 layers, the identity.

    Args:
        settings: encoder_layers, encoder_positions, heads, ffn_dim, geometry and dropout.
        region_dim: D, a multiple of heads and, for sine positions, of 4.
        num_cells: number of regions that are cells of a grid; they come first and get positions.

    Raises InputError for heads or positions that do not fit the regions.
    """

    def __init__(self, settings: ModelSettings, *, region_dim: int, num_cells: int) -> None:
        super().__init__()
        layers, heads, positions = settings.encoder_layers, settings.heads, settings.encoder_positions
        if layers and region_dim % heads:
            raise InputError(f"--heads {heads}: does not divide the {region_dim} features of a region")
        if layers and num_cells and positions == "sine" and (region_dim % 4 or round(num_cells**0.5) ** 2 != num_cells):
            raise InputError(
                f"--encoder_positions sine: requires a square grid and a multiple of 4 features, not {num_cells} "
                f"regions of {region_dim}: give learned or none"
            )
        self.layers = nn.ModuleList(EncoderLayer(settings, region_dim) for _ in range(layers))
        self.geometry, self.num_cells = settings.geometry, num_cells
        self.positions, self.learned_positions = positions if num_cells else "none", None
        if layers:
            self.norm = nn.LayerNorm(region_dim)
            init_linears(self)
            if self.positions == "learned":
                self.learned_positions = nn.Parameter(torch.empty(num_cells, region_dim))
                nn.init.normal_(self.learned_positions, std=INIT_STD)

    def forward(self, regions: Tensor, boxes: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """regions (B, R, D), boxes (B, R, 4) for geometry, mask (B, R), False for padding -> (B, R, D)."""
        if not self.layers:
            return regions
        if self.positions != "none":
            codes = self.learned_positions
            if codes is None:
                codes = grid_positions(round(self.num_cells**0.5), regions.shape[2], regions.device)
            regions = regions + functional.pad(codes, (0, 0, 0, regions.shape[1] - self.num_cells))
        if mask is not None:
            mask = mask.view(len(mask), 1, 1, -1)
        geometry = pairwise_geometry(boxes) if self.geometry and boxes is not None else None
        for layer in self.layers:
            regions = layer(regions, mask, geometry)
        return self.norm(regions)


class DecoderLayer(nn.Module):
    """Attention to the words so far, attention to the regions, and a feed-forward network (section 3.1).

    Normalization, residual connections and dropout are those of `EncoderLayer`.
    """

    def __init__(self, settings: ModelSettings, region_dim: int) -> None:
        super().__init__()
        hidden_dim, self.heads = settings.hidden_dim, settings.heads
        self.self_norm, self.cross_norm, self.ffn_norm = (nn.LayerNorm(hidden_dim) for _ in range(3))
        self.self_query_key_value = nn.Linear(hidden_dim, 3 * hidden_dim)
        self.self_proj = nn.Linear(hidden_dim, hidden_dim)
        self.cross_query = nn.Linear(hidden_dim, hidden_dim)
        self.cross_key_value = nn.Linear(region_dim, 2 * hidden_dim)
        self.cross_proj = nn.Linear(hidden_dim, hidden_dim)
        self.ffn = feed_forward(hidden_dim, settings.ffn_dim)
        self.dropout = Dropout(settings.dropout)

    def keys(self, regions: Tensor, mask: Tensor | None = None) -> Nested:
        """regions (B, R, D), mask (B, R) -> their keys and values (B, n, R, d), the mask (B, 1, 1, R)."""
        key, value = split_heads(self.cross_key_value(regions), 2, self.heads).permute(2, 0, 3, 1, 4)
        return key, value, None if mask is None else mask.view(len(mask), 1, 1, -1)

    def forward(
        self, x: Tensor, keys: Nested, cache: tuple[Tensor, Tensor] | None, with_alpha: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
        """Compute all T words of each caption at once or, with a cache of the t words before it, the next one.

        x (B, C, T, H), keys of `keys`, cache: keys and values (B, C, n, t, d) -> x, cache of t + T words,
        alpha (B, n, C T, R) or None.
        """
        projected = split_heads(self.self_query_key_value(self.self_norm(x)), 3, self.heads)  # (B, C, T, 3, n, d)
        query, key, value = projected.permute(3, 0, 1, 4, 2, 5)  # (B, C, n, T, d) each
        if cache is not None:
            key, value = (torch.cat([old.to(new.dtype), new], 3) for old, new in zip(cache, (key, value), strict=True))
        attended, _ = scaled_dot_product(query, key, value, is_causal=cache is None)
        x = x + self.dropout(self.self_proj(attended.transpose(2, 3).flatten(-2)))
        query = split_heads(self.cross_query(self.cross_norm(x)).flatten(1, 2), 1, self.heads).squeeze(2)
        attended, alpha = scaled_dot_product(query.transpose(1, 2), *keys, with_alpha=with_alpha)  # (B, n, C T, d)
        x = x + self.dropout(self.cross_proj(attended.transpose(1, 2).reshape(x.shape)))
        return x + self.dropout(self.ffn(self.ffn_norm(x))), (key, value), alpha


class TransformerDecoder(Decoder):
    """A transformer decoder: word embeddings with sine positions, layers, a normalization and an output layer.

    It returns the attention weights of the last layer, averaged over its heads, unless `choose_alpha` changes that.

    Args:
        settings: embed_dim and hidden_dim are E and H, a multiple of heads; ffn_dim is that of each of the
            decoder_layers; dropout is on the sum of embeddings and positions, and on the output of each sublayer
            (section 5.4).
        vocab_size, region_dim: V and D.

    Raises InputError for heads that do not divide hidden_dim.
    """

    WARMUP_RATIO = 0.1

    def __init__(self, settings: ModelSettings, *, vocab_size: int, region_dim: int) -> None:
        super().__init__(settings, vocab_size)
        embed_dim, hidden_dim, heads = settings.embed_dim, settings.hidden_dim, settings.heads
        if hidden_dim % heads:
            raise InputError(f"--heads {heads}: does not divide --hidden_dim {hidden_dim}")
        self.hidden_dim, self.heads = hidden_dim, heads
        self.embedding_proj = nn.Linear(embed_dim, hidden_dim) if embed_dim != hidden_dim else nn.Identity()
        self.layers = nn.ModuleList(DecoderLayer(settings, region_dim) for _ in range(settings.decoder_layers))
        self.norm = nn.LayerNorm(hidden_dim)
        self.output = nn.Linear(hidden_dim, vocab_size)
        self.choose_alpha()
        self.reset_embeddings()
        init_linears(self)  # as in torch.nn.Transformer

    def choose_alpha(self, layer: int = 0, head: int = 0) -> None:
        """Choose a layer and head from 1 as in `Decoder.choose_alpha`; 0: the last layer, the mean of the heads."""
        layers = len(self.layers)
        for name, value, count in (("layer", layer, layers), ("head", head, self.heads)):
            if not 0 <= value <= count:
                raise InputError(f"--alpha_{name} {value}: the decoder has {count}: give 1 to {count}, or 0")
        self.alpha_layer, self.alpha_head = (layer or layers) - 1, head

    def all_alpha(self, regions: Tensor, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        keys = self.keys(regions, mask)
        *_, alphas = self._run_layers(inputs.unsqueeze(1), keys, range(len(self.layers)))
        return torch.stack(alphas, dim=1)

    def keys(self, regions: Tensor, mask: Tensor | None = None) -> Nested:
        """Compute `DecoderLayer.keys` of each layer: regions (B, R, D), mask (B, R)."""
        return tuple(layer.keys(regions, mask) for layer in self.layers if isinstance(layer, DecoderLayer))

    def init_state(self, regions: Tensor, mask: Tensor | None = None) -> tuple[Nested, ...]:
        """Return an empty cache: keys and values (B, 1, n, 0, d) of each layer."""
        empty = regions.new_empty(len(regions), 1, self.heads, 0, self.hidden_dim // self.heads)
        return tuple((empty, empty) for _ in self.layers)

    def step(self, words: Tensor, regions: Tensor, keys: Nested, state: tuple[Nested, ...]) -> StepOutput:
        """Predict the next words; the state holds each layer's keys and values (B, C, n, t, d) of the words so far."""
        hidden, caches, alphas = self._run_layers(words.unsqueeze(2), keys, [self.alpha_layer], state)
        return StepOutput(self.output(hidden.squeeze(2)), caches, self._select_alpha(alphas))

    def forward(
        self, regions: Tensor, words: Tensor, lengths: Tensor, sampling_prob: float = 0.0, mask: Tensor | None = None
    ) -> DecoderOutput:
        """Predict each word from the true words before it, all words in one pass; see `Decoder.forward`.

        Scheduled sampling takes a pass before it, whose samples replace input words ("Scheduled Sampling for
        Transformers", Mihaylova and Martins, 2019).
        """
        predicted = PredictedWords.of(words, lengths, regions.device)
        T, B, C = predicted.shape
        inputs, keys = copy_to_device(words[..., :T], regions.device), self.keys(regions, mask)
        if sampling_prob:
            inputs = self._mix_sampled(inputs, keys, sampling_prob)
        hidden, _, alphas = self._run_layers(inputs, keys, [self.alpha_layer])
        alpha = self._select_alpha(alphas).flatten(0, 1)  # (B C T, R)
        rows = predicted.positions % (B * C) * T + predicted.positions // (B * C)  # (N,) indices into B C T
        logits = self.output(hidden.flatten(0, 2).index_select(0, rows))
        return DecoderOutput(logits, predicted.targets, predicted.unpack(alpha.index_select(0, rows)))

    def _run_layers(
        self, words: Tensor, keys: Nested, alpha_layers: Container[int], state: tuple[Nested, ...] | None = None
    ) -> tuple[Tensor, tuple[Nested, ...], list[Tensor]]:
        """Run the layers on words (B, C, T) or, with a state, on one word more per caption (B, C, 1).

        Returns hidden (B, C, T, H), the next state, and alpha (B, n, C T, R) of the layers `alpha_layers`. Padding
        comes after all words of a caption, so the causal mask hides it from them.
        """
        caches = state or [None] * len(self.layers)
        t = 0 if state is None else state[0][0].shape[3]  # words before these
        x = self.embedding_proj(self.embedding(words) * math.sqrt(self.embedding.embedding_dim))  # section 3.4
        x = self.dropout(x + sine_positions(t + torch.arange(words.shape[2], device=words.device), self.hidden_dim))
        next_state, alphas = [], []
        for i, layer in enumerate(self.layers):
            x, cache, alpha = layer(x, keys[i], caches[i], i in alpha_layers)
            next_state.append(cache)
            if alpha is not None:
                alphas.append(alpha)
        return self.norm(x), tuple(next_state), alphas

    def _select_alpha(self, alphas: list[Tensor]) -> Tensor:
        """Select the head of `choose_alpha`, or average them: (B, n, Q, R) of one layer -> (B, Q, R)."""
        return alphas[0][:, self.alpha_head - 1] if self.alpha_head else alphas[0].mean(dim=1)

    @torch.no_grad()
    def _mix_sampled(self, inputs: Tensor, keys: Nested, sampling_prob: float) -> Tensor:
        """Replace input words (B, C, T) but the first, with probability sampling_prob, by samples from the model."""
        sampled = self._sample_words(self._run_layers(inputs, keys, [])[0][:, :, :-1])  # (B, C, T - 1)
        use_sampled = torch.rand(sampled.shape, device=sampled.device) < sampling_prob
        return torch.cat([inputs[..., :1], sampled.where(use_sampled, inputs[..., 1:])], dim=2)

    def _sample_words(self, hidden: Tensor) -> Tensor:
        """Sample the next words: hidden (..., H) -> word ids (...)."""
        return sample_words(self.output(hidden))
