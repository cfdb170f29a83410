"""Decoders with a recurrent state: teacher forcing and single steps, whatever the cells and the attention are.

Shapes: B images, R regions, D their width, C captions of an image (beams in a search), T words of a caption, E width
of a word embedding, H of the hidden state, Z of the context, G gates of the cell that reads the words, V words of the
vocabulary. b x c are the captions that are active at a time step.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from modules.cells import Cell
from modules.decoders import Decoder, DecoderOutput, Layout, Nested, caption_mask, lay_out, map_tensors, sample_words
from modules.layers import init_linears
from utils import copy_to_device


class TimeSteps(NamedTuple):
    """Where the recurrence computes a batch's words: M of active captions, time step by time step, N of them predicted.

    Captions are sorted by decreasing length within and across images, so at each time step the unfinished ones form
    the block `[:b, :c]`, up to a few finished ones.
    """

    layout: Layout
    active_shapes: list[tuple[int, int]]  # T of (b, c)
    inputs: Tensor  # (M,) word ids
    rows: Tensor  # (N,) indices into M, leaving out finished captions

    def split(self, x: Tensor) -> list[Tensor]:
        """Split (M, ...) into the time steps' T of (b c, ...)."""
        return list(x.split([b * c for b, c in self.active_shapes]))

    def select(self, outputs: list[Tensor]) -> Tensor:
        """The time steps' T of (b c, ...) -> (N, ...), without finished captions."""
        return torch.cat(outputs).index_select(0, self.rows)


def split_time_steps(words: Tensor, lengths: Tensor, device: torch.device) -> TimeSteps:
    """The time steps of captions (B, C, T + 1) of these lengths (B, C), computed on the CPU as `lay_out`."""
    mask = caption_mask(lengths)  # (T, B, C)
    active_shapes = [(int(active.any(dim=1).sum()), int(active.any(dim=0).sum())) for active in mask]
    inputs = torch.cat([words[:b, :c, t].flatten() for t, (b, c) in enumerate(active_shapes)])
    unfinished = torch.cat([mask[t, :b, :c].flatten() for t, (b, c) in enumerate(active_shapes)])  # (M,)
    rows = unfinished.nonzero().squeeze(1)
    layout = lay_out(words, lengths, device)
    return TimeSteps(layout, active_shapes, *(copy_to_device(each, device) for each in (inputs, rows)))


class _StepOutputs(NamedTuple):
    """Outputs of the recurrence, a list entry per time step."""

    embedded: list[Tensor]  # (b c, E) the input words
    hidden: list[Tensor]  # (b c, H)
    context: list[Tensor]  # (b c, Z)
    alpha: list[Tensor]  # (b c, R)


class RecurrentDecoder(Decoder):
    """A decoder that attends to the regions and updates its hidden state at each word.

    A subclass implements `keys`, `init_state` and the three steps of a word: `_word_gates`, `_recurrent_step` and
    `_logits`. The hidden state that predicts the word is the first tensor of its state.
    """

    def _reset_parameters(self) -> None:
        """Small embeddings, Glorot-initialized linear layers, and what the cells need.

        With torch's default linear layers the attention starts, and long stays, close to uniform.
        """
        self.reset_embeddings()
        init_linears(self)
        for layer in self.modules():
            if isinstance(layer, Cell):
                layer.reset_parameters()

    def _word_gates(self, embedded: Tensor) -> Tensor:
        """The words' part of the gates, which depends on no state: (..., E) -> (..., G H)."""
        raise NotImplementedError

    def _recurrent_step(
        self, word_gates: Tensor, regions: Tensor, keys: Nested, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Attention and cells at one word.

        word_gates (B, C, G H), regions (B, R, D), keys of tensors (B, ...), state tuple of (B, C, H)
        -> context (B, C, Z), alpha (B, C, R), state.
        """
        raise NotImplementedError

    def _logits(self, embedded: Tensor, hidden: Tensor, context: Tensor) -> Tensor:
        """Predict the next word: embedded (..., E), hidden (..., H), context (..., Z) -> (..., V)."""
        raise NotImplementedError

    def step(
        self, words: Tensor, regions: Tensor, keys: Nested, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Predict the next word of each of an image's C captions.

        words (B, C), regions (B, R, D), keys of tensors (B, ...), state tuple of (B, C, H)
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
        if self.training or not words.is_cpu or torch.compiler.is_exporting():
            embedded = self.dropout(self.embedding(words))
            return embedded, self._word_gates(embedded)
        distinct, indices = words.unique(return_inverse=True)
        embedded = self.embedding(distinct)
        return functional.embedding(indices, embedded), functional.embedding(indices, self._word_gates(embedded))

    def forward(
        self, regions: Tensor, words: Tensor, lengths: Tensor, sampling_prob: float = 0.0, mask: Tensor | None = None
    ) -> DecoderOutput:
        """Teacher forcing, as `Decoder.forward`.

        Only the active captions of each time step are computed, and only unfinished captions' words are predicted.
        """
        return self._predict(regions, mask, split_time_steps(words, lengths, regions.device), sampling_prob)

    def _predict(
        self, regions: Tensor, mask: Tensor | None, time_steps: TimeSteps, sampling_prob: float
    ) -> DecoderOutput:
        """`forward`, of captions that are split into time steps: regions (B, R, D), mask (B, R)."""
        outputs = self._run_recurrence(regions, mask, time_steps, sampling_prob)
        embedded, hidden, context, alpha = map(time_steps.select, outputs)  # (N, ...)
        logits = self._logits(embedded, hidden, context)  # (N, V), in one matmul over all time steps
        return DecoderOutput(logits, time_steps.layout.targets, time_steps.layout.unpack(alpha))

    def _run_recurrence(
        self, regions: Tensor, mask: Tensor | None, time_steps: TimeSteps, sampling_prob: float
    ) -> _StepOutputs:
        """Attention and cell at all time steps: regions (B, R, D), mask (B, R), and the captions' time steps."""
        _, B, C = time_steps.layout.shape
        keys = self.keys(regions, mask)
        state = tuple(part.expand(B, C, -1) for part in self.init_state(regions, mask))
        words, (embedded, gates) = time_steps.split(time_steps.inputs), self._embed_inputs(time_steps)
        outputs = _StepOutputs(embedded, [], [], [])
        for t, (b, c) in enumerate(time_steps.active_shapes):
            if sampling_prob and t:
                sampled = self._sample_words(embedded[t - 1], outputs.hidden[-1], outputs.context[-1])
                sampled = sampled.view(time_steps.active_shapes[t - 1])[:b, :c]
                embedded[t] = self._embed_mixed(sampled, words[t].view(b, c), sampling_prob)
                gates[t] = self._word_gates(embedded[t])
            if b < len(regions):  # a slice of the last slice: its gradient has fewer zeros to fill in
                regions, keys = regions[:b], map_tensors(lambda x, b=b: x[:b], keys)
            if (b, c) != state[0].shape[:2]:
                state = tuple(part[:b, :c] for part in state)  # (b, c, H)
            context, alpha, state = self._recurrent_step(gates[t].view(b, c, -1), regions, keys, state)
            outputs.hidden.append(state[0].flatten(0, 1))
            outputs.context.append(context.flatten(0, 1))
            outputs.alpha.append(alpha.flatten(0, 1))
        return outputs

    def _embed_inputs(self, time_steps: TimeSteps) -> tuple[list[Tensor], list[Tensor]]:
        """Embed the active captions' input words and map them to gates, in one matmul over all time steps.

        Returns embeddings, T of (b c, E), and gates, T of (b c, G H).
        """
        embedded = self.dropout(self.embedding(time_steps.inputs))  # (M, E)
        return time_steps.split(embedded), time_steps.split(self._word_gates(embedded))

    def _embed_mixed(self, sampled: Tensor, true_words: Tensor, sampling_prob: float) -> Tensor:
        """Embed each sampled word (b, c) with probability sampling_prob, the true one (b, c) otherwise -> (b c, E)."""
        use_sampled = torch.rand_like(sampled, dtype=torch.float) < sampling_prob
        return self.dropout(self.embedding(sampled.where(use_sampled, true_words).flatten()))

    @torch.no_grad()
    def _sample_words(self, embedded: Tensor, hidden: Tensor, context: Tensor) -> Tensor:
        """Sample word ids (...) from `_logits`."""
        return sample_words(self._logits(embedded, hidden, context))
