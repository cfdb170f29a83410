"""The transformer decoder: teacher forcing over all words at once, and single words with a cache.

Shapes: B images, R regions, D their width, C captions of an image (beams in a search), T words of a caption, N words
of all captions of a batch without padding, t words before the one that is decoded, E width of a word embedding, H of
the decoder, n heads, d = H / n their width, V words of the vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from modules.decoders import Decoder, DecoderOutput, Nested, lay_out, sample_words
from modules.layers import Dropout, init_linears
from modules.transformer_layers import feed_forward, scaled_dot_product, sine_positions, split_heads
from utils import InputError, copy_to_device

if TYPE_CHECKING:
    from models import ModelSettings


class DecoderLayer(nn.Module):
    """Attention to the words so far, attention to the regions, and a feed-forward network.

    Each is behind a layer normalization and beside a residual connection. Source: "Attention Is All You Need" (Vaswani
    et al., 2017), section 3.1, with the normalization first ("On Layer Normalization in the Transformer Architecture",
    Xiong et al., 2020). Dropout is on the output of each sublayer (Vaswani et al., section 5.4).
    """

    def __init__(self, *, hidden_dim: int, region_dim: int, heads: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.self_norm, self.cross_norm, self.ffn_norm = (nn.LayerNorm(hidden_dim) for _ in range(3))
        self.self_query_key_value = nn.Linear(hidden_dim, 3 * hidden_dim)
        self.self_proj = nn.Linear(hidden_dim, hidden_dim)
        self.cross_query = nn.Linear(hidden_dim, hidden_dim)
        self.cross_key_value = nn.Linear(region_dim, 2 * hidden_dim)
        self.cross_proj = nn.Linear(hidden_dim, hidden_dim)
        self.ffn = feed_forward(hidden_dim, ffn_dim)
        self.dropout = Dropout(dropout)

    def keys(self, regions: Tensor, mask: Tensor | None = None) -> Nested:
        """What the words share: (B, R, D), mask (B, R)
        -> keys and values of the regions, (B, n, R, d) each, and the mask (B, 1, 1, R).
        """
        key, value = split_heads(self.cross_key_value(regions), 2, self.heads).permute(2, 0, 3, 1, 4)
        return key, value, None if mask is None else mask.view(len(mask), 1, 1, -1)

    def forward(self, x: Tensor, keys: Nested, with_alpha: bool) -> tuple[Tensor, Tensor | None]:
        """All words of all captions at once: x (B, C, T, H), keys of `keys` -> x, alpha (B, n, C T, R)."""
        projected = split_heads(self._self_projections(x), 3, self.heads)  # (B, C, T, 3, n, d)
        query, key, value = projected.permute(3, 0, 1, 4, 2, 5)  # (B, C, n, T, d) each
        attended, _ = scaled_dot_product(query, key, value, is_causal=True)
        x = self._add(x, self.self_proj, attended.transpose(2, 3).flatten(-2))
        query = split_heads(self._cross_query(x).flatten(1, 2), 1, self.heads).squeeze(2).transpose(1, 2)
        attended, alpha = scaled_dot_product(query, *keys, with_alpha=with_alpha)  # (B, n, C T, d)
        x = self._add(x, self.cross_proj, attended.transpose(1, 2).reshape(x.shape))
        return self._add_ffn(x), alpha

    def step(
        self, x: Tensor, keys: Nested, cache: tuple[Tensor, Tensor], with_alpha: bool
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]:
        """The next word of each caption, with the keys and values of the t words before it as a cache.

        x (B, C, H), keys of `keys`, cache (B, C, n, t, d) twice -> x (B, C, H), alpha (B, n, C, R), cache.
        """
        projected = split_heads(self._self_projections(x), 3, self.heads).unsqueeze(-2)  # (B, C, 3, n, 1, d)
        query, *new = projected.unbind(2)  # (B, C, n, 1, d) each
        key, value = (torch.cat([old.to(part.dtype), part], dim=3) for old, part in zip(cache, new, strict=True))
        attended, _ = scaled_dot_product(query, key, value)  # (B, C, n, 1, d)
        x = self._add(x, self.self_proj, attended.reshape(x.shape))
        query = split_heads(self._cross_query(x), 1, self.heads).squeeze(2).transpose(1, 2)  # (B, n, C, d)
        attended, alpha = scaled_dot_product(query, *keys, with_alpha=with_alpha)
        x = self._add(x, self.cross_proj, attended.transpose(1, 2).flatten(-2))
        return self._add_ffn(x), alpha, (key, value)

    def _self_projections(self, x: Tensor) -> Tensor:
        """Queries, keys and values of the words: (..., H) -> (..., 3 H)."""
        return self.self_query_key_value(self.self_norm(x))

    def _cross_query(self, x: Tensor) -> Tensor:
        """The words' queries to the regions: (..., H) -> (..., H)."""
        return self.cross_query(self.cross_norm(x))

    def _add(self, x: Tensor, proj: nn.Linear, attended: Tensor) -> Tensor:
        """The residual connection of an attention: x and attended (..., H) -> (..., H)."""
        return x + self.dropout(proj(attended))

    def _add_ffn(self, x: Tensor) -> Tensor:
        """The feed-forward network with its residual connection: (..., H) -> (..., H)."""
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class TransformerDecoder(Decoder):
    """A transformer decoder (Vaswani et al., 2017): word embeddings with sine positions, layers, normalization, output.

    `choose_alpha` says which attention weights it returns: of the last layer, averaged over its heads, by default.

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
        sizes = {"hidden_dim": hidden_dim, "region_dim": region_dim, "heads": heads, "ffn_dim": settings.ffn_dim}
        self.hidden_dim, self.heads = hidden_dim, heads
        self.embedding_proj = nn.Linear(embed_dim, hidden_dim) if embed_dim != hidden_dim else nn.Identity()
        self.layers = nn.ModuleList(
            DecoderLayer(**sizes, dropout=settings.dropout) for _ in range(settings.decoder_layers)
        )
        self.norm = nn.LayerNorm(hidden_dim)
        self.output = nn.Linear(hidden_dim, vocab_size)
        self.choose_alpha()
        self.reset_embeddings()
        init_linears(self)  # as in torch.nn.Transformer

    def choose_alpha(self, layer: int = 0, head: int = 0) -> None:
        """Choose the attention weights that are returned: layer and head from 1; 0: the last layer, the heads' mean.

        Raises InputError for a layer or head that does not exist.
        """
        layers = len(self.layers)
        for name, value, count in (("layer", layer, layers), ("head", head, self.heads)):
            if not 0 <= value <= count:
                raise InputError(f"--alpha_{name} {value}: the decoder has {count}: give 1 to {count}, or 0")
        self.alpha_layer, self.alpha_head = (layer or layers) - 1, head

    def all_alpha(self, regions: Tensor, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """As `Decoder.all_alpha`: regions (B, R, D), inputs (B, T) word ids -> (B, L, n, T, R)."""
        x, alphas = self._embed(inputs.unsqueeze(1), torch.arange(inputs.shape[1], device=inputs.device)), []
        for layer, keys in zip(self.layers, self.keys(regions, mask), strict=True):
            x, alpha = layer(x, keys, True)
            alphas.append(alpha)
        return torch.stack(alphas, dim=1)

    def keys(self, regions: Tensor, mask: Tensor | None = None) -> Nested:
        """What the words share: (B, R, D), mask (B, R) -> of each layer what `DecoderLayer.keys` returns."""
        return tuple(layer.keys(regions, mask) for layer in self.layers if isinstance(layer, DecoderLayer))

    def init_state(self, regions: Tensor, mask: Tensor | None = None) -> tuple[Nested, ...]:
        """The cache of no words: (B, R, D) -> per layer keys and values (B, 1, n, 0, d)."""
        empty = regions.new_empty(len(regions), 1, self.heads, 0, self.hidden_dim // self.heads)
        return tuple((empty, empty) for _ in self.layers)

    def step(
        self, words: Tensor, regions: Tensor, keys: Nested, state: tuple[Nested, ...]
    ) -> tuple[Tensor, Tensor, tuple[Nested, ...]]:
        """As `Decoder.step`; the state holds per layer the keys and values (B, C, n, t, d) of the words so far."""
        positions = torch.full((1,), state[0][0].shape[3], device=words.device)
        x, alpha, caches = self._embed(words, positions), None, []
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            x, layer_alpha, cache = layer.step(x, keys[i], state[i], i == self.alpha_layer)
            alpha = alpha if layer_alpha is None else layer_alpha
            caches.append(cache)
        assert alpha is not None
        return self.output(self.norm(x)), self._select_alpha(alpha), tuple(caches)

    def forward(
        self, regions: Tensor, words: Tensor, lengths: Tensor, sampling_prob: float = 0.0, mask: Tensor | None = None
    ) -> DecoderOutput:
        """Teacher forcing, as `Decoder.forward`, in one pass over all words of all captions.

        Scheduled sampling takes a pass before it, whose samples replace input words ("Scheduled Sampling for
        Transformers", Mihaylova and Martins, 2019).
        """
        layout = lay_out(words, lengths, regions.device)
        T, B, C = layout.shape
        inputs, keys = copy_to_device(words[..., :T], regions.device), self.keys(regions, mask)
        if sampling_prob:
            inputs = self._mix_sampled(inputs, keys, sampling_prob)
        hidden, alpha = self._run_layers(inputs, keys)
        rows = layout.positions % (B * C) * T + layout.positions // (B * C)  # (N,) indices into B C T
        logits = self.output(hidden.flatten(0, 2).index_select(0, rows))
        return DecoderOutput(logits, layout.targets, layout.unpack(alpha.flatten(0, 2).index_select(0, rows)))

    def _run_layers(self, inputs: Tensor, keys: Nested) -> tuple[Tensor, Tensor]:
        """inputs (B, C, T) word ids, keys of `keys` -> hidden (B, C, T, H), alpha (B, C, T, R).

        Padding comes after all words of a caption, so the causal mask hides it from them.
        """
        x, alpha = self._embed(inputs, torch.arange(inputs.shape[2], device=inputs.device)), None
        for i, layer in enumerate(self.layers):
            x, layer_alpha = layer(x, keys[i], i == self.alpha_layer)
            alpha = alpha if layer_alpha is None else layer_alpha
        assert alpha is not None
        return self.norm(x), self._select_alpha(alpha).unflatten(1, inputs.shape[1:])

    def _embed(self, words: Tensor, positions: Tensor) -> Tensor:
        """Embed words (...), scaled as in section 3.4, and add their positions, broadcast to them -> (..., H)."""
        embedded = self.embedding_proj(self.embedding(words) * math.sqrt(self.embedding.embedding_dim))
        return self.dropout(embedded + sine_positions(positions, self.hidden_dim))

    def _select_alpha(self, alpha: Tensor) -> Tensor:
        """The attention weights of the head chosen, or the mean: (B, n, Q, R) -> (B, Q, R)."""
        return alpha[:, self.alpha_head - 1] if self.alpha_head else alpha.mean(dim=1)

    @torch.no_grad()
    def _mix_sampled(self, inputs: Tensor, keys: Nested, sampling_prob: float) -> Tensor:
        """Replace input words (B, C, T) but the first, with probability sampling_prob, by samples from the model."""
        sampled = self._sample_words(self._run_layers(inputs, keys)[0][:, :, :-1])  # (B, C, T - 1)
        use_sampled = torch.rand(sampled.shape, device=sampled.device) < sampling_prob
        return torch.cat([inputs[..., :1], sampled.where(use_sampled, inputs[..., 1:])], dim=2)

    def _sample_words(self, hidden: Tensor) -> Tensor:
        """Sample the next words: hidden (..., H) -> word ids (...)."""
        return sample_words(self.output(hidden))
