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

INIT_RANGE = 0.1  # word embeddings are initialized uniformly in [-INIT_RANGE, INIT_RANGE]


class DecoderOutput(NamedTuple):
    """Predictions of teacher forcing: N words over all captions, time step by time step."""

    logits: Tensor  # (N, V)
    targets: Tensor  # (N,)
    alpha: Tensor  # (T, B, C, R) attention weights, zero after a caption's end
    sampled_log_probs: Tensor | None = None  # (T, B, C) of hard attention's regions, 0 where none was sampled
    baseline: Tensor | None = None  # () of hard attention, for `training.losses.hard_attention_loss`


class _StepOutputs(NamedTuple):
    """Outputs of the recurrence, a list entry per time step."""

    embedded: list[Tensor]  # (b c, E) the input words
    hidden: list[Tensor]  # (b c, H)
    context: list[Tensor]  # (b c, Z)
    alpha: list[Tensor]  # (B, C, R), zero where a caption is not active
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
        tenth of its time. A GPU would have to wait for the host.
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
            words: (B, C, T + 1), <start> ... <end> and padding, sorted as in `datasets.Batch`.
            lengths: (B, C) on the CPU, words to predict.
            sampling_prob: probability that an input word is sampled from the model instead of the true one (scheduled
                sampling, Bengio et al., 2015).
        """
        mask = torch.arange(int(lengths.max())).view(-1, 1, 1) < lengths  # (T, B, C)
        active_shapes = [(int(active.any(dim=1).sum()), int(active.any(dim=0).sum())) for active in mask]
        steps = self._run_recurrence(regions, words, active_shapes, sampling_prob)
        logits = self._predict(steps, mask, active_shapes)  # (N, V)
        mask = mask.to(words.device)
        targets = words[:, :, 1 : len(mask) + 1].permute(2, 0, 1)[mask]  # (N,)
        alpha = torch.stack(steps.alpha) * mask.unsqueeze(-1)
        if not (steps.sampled_log_probs and isinstance(self.attention, HardAttention)):
            return DecoderOutput(logits, targets, alpha)
        padded = [_pad_captions(log_probs.unsqueeze(-1), lengths) for log_probs in steps.sampled_log_probs]
        sampled_log_probs = torch.stack(padded).squeeze(-1) * mask
        return DecoderOutput(logits, targets, alpha, sampled_log_probs, self.attention.baseline)

    def _run_recurrence(
        self, regions: Tensor, words: Tensor, active_shapes: list[tuple[int, int]], sampling_prob: float
    ) -> _StepOutputs:
        """Attention and cell at all time steps: regions (B, R, D), words (B, C, T + 1), active shapes T of (b, c)."""
        B, C, _ = words.shape
        keys = self.keys(regions)
        state = tuple(part.expand(B, C, -1) for part in self.init_state(regions))
        embedded, gates = self._embed_inputs(words, active_shapes)
        steps = _StepOutputs(embedded, [], [], [], [])
        for t, (b, c) in enumerate(active_shapes):
            if sampling_prob and t:
                sampled = self._sample_words(embedded[t - 1], steps.hidden[-1], steps.context[-1])
                sampled = sampled.view(active_shapes[t - 1])[:b, :c]
                embedded[t] = self._embed_mixed(sampled, words[:b, :c, t], sampling_prob)
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
            steps.alpha.append(_pad_captions(alpha, words))
        return steps

    def _embed_inputs(self, words: Tensor, active_shapes: list[tuple[int, int]]) -> tuple[list[Tensor], list[Tensor]]:
        """Embed the active captions' input words and map them to gates, in one matmul over all time steps.

        words (B, C, T + 1) -> embeddings, T of (b c, E), and gates, T of (b c, G H).
        """
        inputs = torch.cat([words[:b, :c, t].flatten() for t, (b, c) in enumerate(active_shapes)])
        sizes = [b * c for b, c in active_shapes]
        embedded = self.dropout(self.embedding(inputs))
        gates = self.cell.words(embedded)
        return list(embedded.split(sizes)), list(gates.split(sizes))

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

    def _predict(self, steps: _StepOutputs, mask: Tensor, active_shapes: list[tuple[int, int]]) -> Tensor:
        """Logits (N, V) of the unfinished captions, whose mask is (T, B, C), in one matmul over all time steps."""
        unfinished = torch.cat([mask[t, :b, :c].flatten() for t, (b, c) in enumerate(active_shapes)])  # all b c
        rows = unfinished.nonzero().squeeze(1).to(steps.hidden[0].device)  # (N,)
        hidden, context = torch.cat(steps.hidden)[rows], torch.cat(steps.context)[rows]
        return self._logits(torch.cat(steps.embedded)[rows], hidden, context)

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
        logits[..., [PAD, START]] = -math.inf
        return sample_categorical(logits.softmax(dim=-1))


def _pad_captions(x: Tensor, like: Tensor) -> Tensor:
    """Pad the active captions' values (b, c, R) with zeros to (B, C, R), the first two axes of `like`."""
    return functional.pad(x, (0, 0, 0, like.shape[1] - x.shape[1], 0, like.shape[0] - x.shape[0]))
