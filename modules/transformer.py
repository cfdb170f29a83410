"""The transformer decoder: teacher forcing over all words at once, and single words with a cache.

Shapes: B images, R regions, D their width, C captions of an image (beams in a search), T words of a caption, N words
of all captions of a batch, t words before the one that is decoded, E width of a word embedding, H of the decoder, n
heads, d = H / n their width, V words of the vocabulary.
"""

import math

import torch
from torch import Tensor, nn

from modules.decoders import Decoder, DecoderOutput, Layout, lay_out, sample_words
from modules.layers import Dropout
from modules.step_decoder import Nested
from modules.transformer_layers import attend, feed_forward, init_linears, sine_positions, split_heads
from utils import InputError


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

    def keys(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the regions, the same for all words: (B, R, D) -> (B, n, R, d) each."""
        key, value = split_heads(self.cross_key_value(regions), 2, self.heads).permute(2, 0, 3, 1, 4)
        return key, value

    def forward(
        self, x: Tensor, keys: tuple[Tensor, Tensor], layout: Layout, with_alpha: bool
    ) -> tuple[Tensor, Tensor | None]:
        """All words of all captions: x (N, H), keys of `keys` -> x (N, H), alpha (B, n, T C, R) of the padded words.

        What works on each word alone computes the N words that exist; the attention itself, which is cheap, sees the
        captions padded.
        """
        T, B, C = layout.shape
        projected = split_heads(layout.unpack(self._self_projections(x)).view(T, B * C, -1), 3, self.heads)
        query, key, value = projected.permute(2, 1, 3, 0, 4)  # (B C, n, T, d) each
        # Words of the padding come after all that exist: the causal mask hides them, too.
        attended, _ = attend(query, key, value, is_causal=True)
        x = self._add(x, self.self_proj, layout.pack(attended.permute(2, 0, 1, 3).reshape(T, B, C, -1)))
        query = split_heads(layout.unpack(self._cross_query(x)), 1, self.heads).squeeze(3)  # (T, B, C, n, d)
        query = query.permute(1, 3, 0, 2, 4).flatten(2, 3)  # (B, n, T C, d)
        attended, alpha = attend(query, *keys, with_alpha=with_alpha)
        attended = attended.unflatten(2, (T, C)).permute(2, 0, 3, 1, 4).flatten(-2)  # (T, B, C, H)
        return self._add_ffn(self._add(x, self.cross_proj, layout.pack(attended))), alpha

    def step(
        self, x: Tensor, keys: tuple[Tensor, Tensor], cache: tuple[Tensor, Tensor], with_alpha: bool
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]:
        """The next word of each caption, with the keys and values of the t words before it as a cache.

        x (B, C, H), keys of `keys`, cache (B, C, n, t, d) twice -> x (B, C, H), alpha (B, n, C, R), cache.
        """
        projected = split_heads(self._self_projections(x), 3, self.heads).unsqueeze(-2)  # (B, C, 3, n, 1, d)
        query, *new = projected.unbind(2)  # (B, C, n, 1, d) each
        key, value = (torch.cat([old.to(one.dtype), one], dim=3) for old, one in zip(cache, new, strict=True))
        attended, _ = attend(query, key, value)  # (B, C, n, 1, d)
        x = self._add(x, self.self_proj, attended.reshape(x.shape))
        query = split_heads(self._cross_query(x), 1, self.heads).squeeze(2).transpose(1, 2)  # (B, n, C, d)
        attended, alpha = attend(query, *keys, with_alpha=with_alpha)
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
    """A transformer decoder (Vaswani et al., 2017) with sine positions of the words and a layer normalization at its end.

    `choose_alpha` says which attention weights it returns: of the last layer, averaged over its heads, by default.

    Args:
        vocab_size, region_dim, embed_dim, hidden_dim: V, D, E and H, a multiple of heads.
        heads, ffn_dim: of each layer.
        decoder_layers: number of layers.
        dropout: on the sum of embeddings and positions, and on the output of each sublayer (section 5.4).

    Raises InputError for heads that do not divide hidden_dim.
    """

    WARMUP_RATIO = 0.1

    def __init__(
        self,
        *,
        vocab_size: int,
        region_dim: int,
        embed_dim: int,
        hidden_dim: int,
        heads: int,
        ffn_dim: int,
        decoder_layers: int,
        dropout: float,
    ) -> None:
        super().__init__(vocab_size=vocab_size, embed_dim=embed_dim, dropout=dropout)
        if hidden_dim % heads:
            raise InputError(f"--heads {heads}: does not divide --hidden_dim {hidden_dim}")
        sizes = {"hidden_dim": hidden_dim, "region_dim": region_dim, "heads": heads, "ffn_dim": ffn_dim}
        self.hidden_dim = hidden_dim
        self.embedding_proj = nn.Linear(embed_dim, hidden_dim) if embed_dim != hidden_dim else nn.Identity()
        self.layers = nn.ModuleList(DecoderLayer(**sizes, dropout=dropout) for _ in range(decoder_layers))
        self.norm = nn.LayerNorm(hidden_dim)
        self.output = nn.Linear(hidden_dim, vocab_size)
        self.choose_alpha()
        self.reset_embeddings()
        init_linears(self)

    def choose_alpha(self, layer: int = 0, head: int = 0) -> None:
        """Choose the attention weights that are returned: layer and head from 1; 0: the last layer, the heads' mean.

        Raises InputError for a layer or head that does not exist.
        """
        layers, heads = len(self.layers), self.layers[0].heads
        for name, value, count in (("layer", layer, layers), ("head", head, heads)):
            if not 0 <= value <= count:
                raise InputError(f"--alpha_{name} {value}: the decoder has {count}: give 1 to {count}, or 0")
        self.alpha_layer, self.alpha_head = (layer or layers) - 1, head

    def keys(self, regions: Tensor) -> Nested:
        """Keys and values of each layer's attention to the regions: (B, R, D) -> per layer (B, n, R, d) twice."""
        return tuple(layer.keys(regions) for layer in self.layers)

    def init_state(self, regions: Tensor) -> tuple[Nested, ...]:
        """The cache of no words: (B, R, D) -> per layer keys and values (B, 1, n, 0, d)."""
        heads = self.layers[0].heads
        empty = regions.new_empty(len(regions), 1, heads, 0, self.hidden_dim // heads)
        return tuple((empty, empty) for _ in self.layers)

    def step(
        self, words: Tensor, regions: Tensor, keys: Nested, state: tuple[Nested, ...]
    ) -> tuple[Tensor, Tensor, tuple[Nested, ...]]:
        """As `Decoder.step`; the state holds per layer the keys and values (B, C, n, t, d) of the words so far."""
        positions = torch.full_like(words, state[0][0].shape[3])  # (B, C)
        x, alpha, caches = self._embed(words, positions), None, []
        for i, layer in enumerate(self.layers):
            x, layer_alpha, cache = layer.step(x, keys[i], state[i], i == self.alpha_layer)
            alpha = alpha if layer_alpha is None else layer_alpha
            caches.append(cache)
        assert alpha is not None
        return self.output(self.norm(x)), self._shown(alpha), tuple(caches)

    def forward(self, regions: Tensor, words: Tensor, lengths: Tensor, sampling_prob: float = 0.0) -> DecoderOutput:
        """Teacher forcing, as `Decoder.forward`, in one pass over all words of all captions.

        Scheduled sampling takes a pass before it, whose samples replace input words ("Scheduled Sampling for
        Transformers", Mihaylova and Martins, 2019).
        """
        layout = lay_out(words, lengths, regions.device)
        inputs = layout.inputs.index_select(0, layout.rows)  # (N,)
        keys = self.keys(regions)
        if sampling_prob:
            inputs = self._mix_sampled(inputs, keys, layout, sampling_prob)
        hidden, alpha = self._run_layers(inputs, keys, layout)
        return DecoderOutput(self.output(hidden), layout.targets, alpha)

    def _run_layers(self, inputs: Tensor, keys: Nested, layout: Layout) -> tuple[Tensor, Tensor]:
        """inputs (N,) word ids, keys of `keys` -> hidden (N, H), alpha (T, B, C, R), zero after a caption's end."""
        T, B, C = layout.shape
        x, alpha = self._embed(inputs, layout.positions // (B * C)), None
        for i, layer in enumerate(self.layers):
            x, layer_alpha = layer(x, keys[i], layout, i == self.alpha_layer)
            alpha = alpha if layer_alpha is None else layer_alpha
        assert alpha is not None
        padded = self._shown(alpha).unflatten(1, (T, C)).transpose(0, 1)  # (T, B, C, R)
        return self.norm(x), layout.unpack(layout.pack(padded))

    def _embed(self, words: Tensor, positions: Tensor) -> Tensor:
        """Embed words (...), scaled as in section 3.4, and add their positions (...), from 0 -> (..., H)."""
        embedded = self.embedding_proj(self.embedding(words) * math.sqrt(self.embedding.embedding_dim))
        return self.dropout(embedded + sine_positions(positions, self.hidden_dim))

    def _shown(self, alpha: Tensor) -> Tensor:
        """The attention weights of the head chosen, or the mean: (B, n, Q, R) -> (B, Q, R)."""
        return alpha[:, self.alpha_head - 1] if self.alpha_head else alpha.mean(dim=1)

    @torch.no_grad()
    def _mix_sampled(self, inputs: Tensor, keys: Nested, layout: Layout, sampling_prob: float) -> Tensor:
        """Replace each input word (N,) but <start>, with probability sampling_prob, by a sample from the model."""
        sampled = self._sample_words(self._run_layers(inputs, keys, layout)[0])  # (N,), each the next word
        after = layout.unpack(sampled)[:-1]  # (T - 1, B, C)
        before = layout.pack(torch.cat([after.new_zeros(1, *after.shape[1:]), after]))  # (N,)
        use_sampled = torch.rand(inputs.shape, device=inputs.device) < sampling_prob
        _, B, C = layout.shape
        return before.where(use_sampled & (layout.positions >= B * C), inputs)

    def _sample_words(self, hidden: Tensor) -> Tensor:
        """Sample the next words: hidden (..., H) -> word ids (...)."""
        return sample_words(self.output(hidden))
