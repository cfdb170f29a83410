"""The decoder: a recurrent network with attention over the regions of an image.

Shapes: B images, R regions, D their width, C captions of an image (beams in a search), T words of a caption, E width
of a word embedding, A of the attention, H of the hidden state, Z of the context (D, or 0 without attention), G gates
of the cell, V words of the vocabulary. b x c are the captions that are active at a time step.
"""

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from modules.attention import ATTENTIONS, HardAttention
from modules.cells import CELLS
from modules.layers import Dropout, init_linear, sample_categorical
from text.vocabulary import PAD, START
from utils import copy_to_device

INIT_RANGE = 0.1  # word embeddings are initialized uniformly in [-INIT_RANGE, INIT_RANGE]


class DecoderOutput(NamedTuple):
    """Predictions of teacher forcing: N words over all captions, time step by time step."""

    logits: Tensor  # (N, V)
    targets: Tensor  # (N,)
    alpha: Tensor  # (T, B, C, R) attention weights, zero after a caption's end
    sampled_log_probs: Tensor | None = None  # (T, B, C) of hard attention's regions, 0 where none was sampled
    baseline: Tensor | None = None  # () of hard attention, for `training.losses.hard_attention_loss`


class _Layout(NamedTuple):
    """Where a batch's words are computed: M of active captions, time step by time step, N of them predicted."""

    shape: tuple[int, ...]  # (T, B, C)
    active_shapes: list[tuple[int, int]]  # T of (b, c)
    inputs: Tensor  # (M,) word ids
    targets: Tensor  # (N,) word ids
    rows: Tensor  # (N,) indices into M, leaving out finished captions
    positions: Tensor  # (N,) indices into T B C

    def split(self, x: Tensor) -> list[Tensor]:
        """Split (M, ...) into the time steps' T of (b c, ...)."""
        return list(x.split([b * c for b, c in self.active_shapes]))

    def select(self, outputs: list[Tensor]) -> Tensor:
        """The time steps' T of (b c, ...) -> (N, ...), without finished captions."""
        return torch.cat(outputs).index_select(0, self.rows)

    def unpack(self, x: Tensor) -> Tensor:
        """(N, ...) -> (T, B, C, ...), zero after a caption's end."""
        unpacked = x.new_zeros(math.prod(self.shape), *x.shape[1:]).index_copy(0, self.positions, x)
        return unpacked.unflatten(0, self.shape)


class _StepOutputs(NamedTuple):
    """Outputs of the recurrence, a list entry per time step."""

    embedded: list[Tensor]  # (b c, E) the input words
    hidden: list[Tensor]  # (b c, H)
    context: list[Tensor]  # (b c, Z)
    alpha: list[Tensor]  # (b c, R)
    sampled_log_probs: list[Tensor]  # (b, c), none unless hard attention samples


class Decoder(nn.Module):
    """Recurrent decoder with attention ("Show, Attend and Tell", Xu et al., 2015, sections 3.1.2 and 4.2).

    `keys` and `init_state` run once per image, `step` once per word; teacher forcing and every search use these three.

    Args:
        vocab_size, region_dim, embed_dim, attention_dim, hidden_dim: V, D, E, A and H.
        dropout: on the word embeddings and before the output layer.
        cell: a key of `modules.cells.CELLS`.
        attention: a key of `modules.attention.ATTENTIONS`.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        region_dim: int,
        embed_dim: int,
        attention_dim: int,
        hidden_dim: int,
        dropout: float,
        cell: str,
        attention: str,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim, padding_idx=PAD)
        self.attention = ATTENTIONS[attention](
            region_dim=region_dim, hidden_dim=hidden_dim, attention_dim=attention_dim
        )
        context_dim = self.attention.context_dim
        self.init_hidden = nn.ModuleList(nn.Linear(region_dim, hidden_dim) for _ in range(CELLS[cell].NUM_STATES))
        self.hidden_proj = nn.Linear(hidden_dim, embed_dim)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of the empty weights for a zero-width context
            self.cell = CELLS[cell](embed_dim=embed_dim, context_dim=context_dim, hidden_dim=hidden_dim)
            self.context_proj = nn.Linear(context_dim, embed_dim, bias=False)
        self.output = nn.Linear(embed_dim, vocab_size)
        self.dropout = Dropout(dropout)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Small embeddings and Glorot-initialized linear layers.

        torch's default embeddings are ten times larger and dominate the regions for epochs; with its default linear
        layers the attention starts, and long stays, close to uniform.
        """
        nn.init.uniform_(self.embedding.weight, -INIT_RANGE, INIT_RANGE)
        self.embedding.weight.data[PAD] = 0
        for layer in self.modules():
            if isinstance(layer, nn.Linear) and layer.weight.numel():
                init_linear(layer)
        self.cell.reset_parameters()

    @property
    def has_attention(self) -> bool:
        """Whether the decoder attends to the regions before each word."""
        return self.attention.context_dim > 0

    def load_pretrained_embeddings(self, word_ids: Tensor, vectors: Tensor) -> None:
        """Initialize words (n,) with vectors (n, E) of root mean square 1, scaled to that of the other embeddings."""
        self.embedding.weight.data[word_ids] = vectors * INIT_RANGE / math.sqrt(3)

    def keys(self, regions: Tensor) -> Tensor:
        """The attention's projection of the regions, the same for all words: (B, R, D) -> (B, R, A)."""
        return self.attention.keys(regions)

    def init_state(self, regions: Tensor) -> tuple[Tensor, ...]:
        """The initial state, predicted from the mean region (section 3.1.2): (B, R, D) -> tuple of (B, 1, H)."""
        mean = regions.mean(dim=1, keepdim=True)  # (B, 1, D)
        return tuple(layer(mean).tanh() for layer in self.init_hidden)

    def step(
        self, words: Tensor, regions: Tensor, keys: Tensor, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Predict the next word of each of an image's C captions.

        words (B, C), regions (B, R, D), keys (B, R, A), state tuple of (B, C, H)
        -> logits (B, C, V), alpha (B, C, R), state.
        """
        embedded, word_gates = self._embed_words(words)  # (B, C, E), (B, C, G H)
        context, alpha, state = self._recurrent_step(word_gates, regions, keys, state)
        return self._logits(embedded, state[0], context), alpha, state

    def _embed_words(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (..., E) and gates (..., G H) of input words (...).

        The captions of a search share most of their words: on a CPU each is computed once, which saves a search a
        tenth of its time. On a GPU the host would have to wait for their number.
        """
        if self.training or not words.is_cpu:
            embedded = self.dropout(self.embedding(words))
            return embedded, self.cell.words(embedded)
        distinct, indices = words.unique(return_inverse=True)
        embedded = self.embedding(distinct)
        return functional.embedding(indices, embedded), functional.embedding(indices, self.cell.words(embedded))

    def forward(self, regions: Tensor, words: Tensor, lengths: Tensor, sampling_prob: float = 0.0) -> DecoderOutput:
        """Teacher forcing: predict each word from the true words before it.

        Captions are sorted by decreasing length within and across images, so at each time step the unfinished ones
        form the block `[:b, :c]`, up to a few finished ones. Only this block is computed, and only unfinished
        captions' words are predicted.

        Args:
            regions: (B, R, D).
            words: (B, C, T + 1) on the CPU, <start> ... <end> and padding, sorted as in `datasets.Batch`.
            lengths: (B, C) on the CPU, words to predict.
            sampling_prob: probability that an input word is sampled from the model instead of the true one (scheduled
                sampling, Bengio et al., 2015).
        """
        layout = _lay_out(words, lengths, regions.device)
        steps = self._run_recurrence(regions, layout, sampling_prob)
        embedded, hidden, context, alpha = map(layout.select, steps[:4])  # (N, ...)
        logits = self._logits(embedded, hidden, context)  # (N, V), in one matmul over all time steps
        output = DecoderOutput(logits, layout.targets, layout.unpack(alpha))
        if not (steps.sampled_log_probs and isinstance(self.attention, HardAttention)):
            return output
        sampled_log_probs = layout.select([log_probs.flatten() for log_probs in steps.sampled_log_probs])
        return output._replace(sampled_log_probs=layout.unpack(sampled_log_probs), baseline=self.attention.baseline)

    def _run_recurrence(self, regions: Tensor, layout: _Layout, sampling_prob: float) -> _StepOutputs:
        """Attention and cell at all time steps: regions (B, R, D), and the captions' layout."""
        _, B, C = layout.shape
        keys = self.keys(regions)
        state = tuple(part.expand(B, C, -1) for part in self.init_state(regions))
        words, (embedded, gates) = layout.split(layout.inputs), self._embed_inputs(layout)
        steps = _StepOutputs(embedded, [], [], [], [])
        for t, (b, c) in enumerate(layout.active_shapes):
            if sampling_prob and t:
                sampled = self._sample_words(embedded[t - 1], steps.hidden[-1], steps.context[-1])
                sampled = sampled.view(layout.active_shapes[t - 1])[:b, :c]
                embedded[t] = self._embed_mixed(sampled, words[t].view(b, c), sampling_prob)
                gates[t] = self.cell.words(embedded[t])
            if b < len(regions):  # a slice of the last slice: its gradient has fewer zeros to fill in
                regions, keys = regions[:b], keys[:b]
            if (b, c) != state[0].shape[:2]:
                state = tuple(part[:b, :c] for part in state)  # (b, c, H)
            context, alpha, state = self._recurrent_step(
                gates[t].view(b, c, -1), regions, keys, state, steps.sampled_log_probs
            )
            steps.hidden.append(state[0].flatten(0, 1))
            steps.context.append(context.flatten(0, 1))
            steps.alpha.append(alpha.flatten(0, 1))
        return steps

    def _embed_inputs(self, layout: _Layout) -> tuple[list[Tensor], list[Tensor]]:
        """Embed the active captions' input words and map them to gates, in one matmul over all time steps.

        Returns embeddings, T of (b c, E), and gates, T of (b c, G H).
        """
        embedded = self.dropout(self.embedding(layout.inputs))  # (M, E)
        return layout.split(embedded), layout.split(self.cell.words(embedded))

    def _embed_mixed(self, sampled: Tensor, true_words: Tensor, sampling_prob: float) -> Tensor:
        """Embed each sampled word (b, c) with probability sampling_prob, the true one (b, c) otherwise -> (b c, E)."""
        use_sampled = torch.rand_like(sampled, dtype=torch.float) < sampling_prob
        return self.dropout(self.embedding(sampled.where(use_sampled, true_words).flatten()))

    def _recurrent_step(
        self,
        word_gates: Tensor,
        regions: Tensor,
        keys: Tensor,
        state: tuple[Tensor, ...],
        sampled_log_probs: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Attention (equations 4 to 6 and 13), then the cell (equations 1 to 3).

        word_gates (B, C, G H), regions (B, R, D), keys (B, R, A), state tuple of (B, C, H)
        -> context (B, C, Z), alpha (B, C, R), state.
        """
        context, alpha = self.attention(regions, keys, state[0], sampled_log_probs)
        return context, alpha, self.cell(word_gates, context, state)

    def _logits(self, embedded: Tensor, hidden: Tensor, context: Tensor) -> Tensor:
        """The deep output layer (equation 7), with tanh and dropout as in the authors' code.

        embedded (..., E), hidden (..., H), context (..., Z) -> (..., V).
        """
        output = embedded + self.hidden_proj(hidden) + self.context_proj(context)  # (..., E)
        return self.output(self.dropout(output.tanh()))

    @torch.no_grad()
    def _sample_words(self, embedded: Tensor, hidden: Tensor, context: Tensor) -> Tensor:
        """Sample word ids (...) from the softmax of `_logits` without <pad> and <start>."""
        logits = self._logits(embedded, hidden, context).float()
        for word_id in (PAD, START):
            logits[..., word_id] = -math.inf
        return sample_categorical(logits.softmax(dim=-1))


def caption_mask(lengths: Tensor) -> Tensor:
    """Which words exist, in whose order teacher forcing has its N words: (B, C) -> (T, B, C)."""
    return torch.arange(int(lengths.max())).view(-1, 1, 1) < lengths


def _lay_out(words: Tensor, lengths: Tensor, device: torch.device) -> _Layout:
    """The layout of captions (B, C, T + 1) of these lengths (B, C).

    It depends on the captions alone, so it is computed on the CPU: no shape is read from a GPU.
    """
    mask = caption_mask(lengths)  # (T, B, C)
    active_shapes = [(int(active.any(dim=1).sum()), int(active.any(dim=0).sum())) for active in mask]
    inputs = torch.cat([words[:b, :c, t].flatten() for t, (b, c) in enumerate(active_shapes)])
    targets = words[:, :, 1 : len(mask) + 1].permute(2, 0, 1)[mask]
    unfinished = torch.cat([mask[t, :b, :c].flatten() for t, (b, c) in enumerate(active_shapes)])  # (M,)
    indices = (unfinished.nonzero().squeeze(1), mask.flatten().nonzero().squeeze(1))
    shape = (len(mask), *lengths.shape)
    return _Layout(shape, active_shapes, *(copy_to_device(each, device) for each in (inputs, targets, *indices)))
