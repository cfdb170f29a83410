"""Decoders with a recurrent state: teacher forcing and single steps for any cells and attention.

Shapes: B images, R regions, D their width, C captions of an image (beams in a search), T words of a caption, E width
of a word embedding, H of the hidden state, Z of the context, G gates of the cell that reads the words, V words of the
vocabulary. b x c are the captions that are active at a time step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from modules import cpu
from modules.attention import Attended
from modules.cells import Cell, State
from modules.decoders import (
    Decoder,
    DecoderOutput,
    Nested,
    PredictedWords,
    StepOutput,
    caption_mask,
    map_tensors,
    sample_words,
)
from modules.layers import init_linears
from utils import copy_to_device


class ActiveCaptions(NamedTuple):
    """The captions that the recurrence computes at each time step: M input words in all, N of them predict a word.

    Captions are sorted by decreasing length within and across images. So at each time step the unfinished ones are in
    the block `[:b, :c]`, which may hold a few finished ones.
    """

    shapes: list[tuple[int, int]]  # T of (b, c)
    inputs: Tensor  # (M,) word ids, ordered by time step
    unfinished: Tensor  # (N,) indices into M

    @classmethod
    def of(cls, words: Tensor, lengths: Tensor, device: torch.device) -> ActiveCaptions:
        """Find the active captions of words (B, C, T + 1) and lengths (B, C), on the CPU like `PredictedWords.of`."""
        mask = caption_mask(lengths)  # (T, B, C)
        shapes = [(int(active.any(dim=1).sum()), int(active.any(dim=0).sum())) for active in mask]
        inputs = torch.cat([words[:b, :c, t].flatten() for t, (b, c) in enumerate(shapes)])
        unfinished = torch.cat([mask[t, :b, :c].flatten() for t, (b, c) in enumerate(shapes)])  # (M,)
        indices = unfinished.nonzero().squeeze(1)
        return cls(shapes, copy_to_device(inputs, device), copy_to_device(indices, device))

    def split(self, x: Tensor) -> list[Tensor]:
        """Split (M, ...) into the time steps' T of (b c, ...)."""
        return list(x.split([b * c for b, c in self.shapes]))

    def select(self, outputs: list[Tensor]) -> Tensor:
        """Join the time steps' T of (b c, ...) without finished captions: (N, ...)."""
        return torch.cat(outputs).index_select(0, self.unfinished)


class RecurrentDecoder(Decoder):
    """A decoder that attends to the regions and updates its hidden state at each word.

    A subclass implements `keys`, `init_state` and the three parts of a step: `_word_gates`, `_time_step` and
    `_logits`. The hidden state that predicts the word is the first tensor of its state.
    """

    def _reset_parameters(self) -> None:
        """Initialize small embeddings, linear layers after Glorot, and the cells.

        With torch's default linear layers the attention starts near uniform and stays there for many steps.
        """
        self.reset_embeddings()
        init_linears(self)
        for layer in self.modules():
            if isinstance(layer, Cell):
                layer.reset_parameters()

    def _word_gates(self, embedded: Tensor) -> Tensor:
        """Compute the words' part of the gates, which depends on no state: (..., E) -> (..., G H)."""
        raise NotImplementedError

    def _time_step(self, word_gates: Tensor, regions: Tensor, keys: Nested, state: State) -> tuple[Attended, State]:
        """Attend to the regions and update the state, in the order of the decoder.

        word_gates (B, C, G H), regions (B, R, D), keys as `keys` returns them, state of (B, C, H)
        -> attention's result, next state.
        """
        raise NotImplementedError

    def _logits(self, embedded: Tensor, hidden: Tensor, context: Tensor) -> Tensor:
        """Predict the next word: embedded (..., E), hidden (..., H), context (..., Z) -> (..., V)."""
        raise NotImplementedError

    def step(self, words: Tensor, regions: Tensor, keys: Nested, state: State) -> StepOutput:
        if cpu.applies_to(words) and not self.training:
            embedded, word_gates = cpu.embed_distinct_words(words, self.embedding, self._word_gates)
        else:
            embedded = self.dropout(self.embedding(words))  # (B, C, E)
            word_gates = self._word_gates(embedded)  # (B, C, G H)
        attended, state = self._time_step(word_gates, regions, keys, state)
        logits = self._logits(embedded, state[0], attended.context)
        return StepOutput(logits, state, attended.alpha, attended.gate)

    def forward(
        self, regions: Tensor, words: Tensor, lengths: Tensor, sampling_prob: float = 0.0, mask: Tensor | None = None
    ) -> DecoderOutput:
        """Predict each word from the true words before it, computing only active captions; see `Decoder.forward`."""
        B, C = lengths.shape
        predicted = PredictedWords.of(words, lengths, regions.device)
        active = ActiveCaptions.of(words, lengths, regions.device)
        keys = self.keys(regions, mask)
        state = tuple(part.expand(B, C, -1) for part in self.init_state(regions, mask))
        embedded = self.dropout(self.embedding(active.inputs))  # (M, E)
        # From here on lists have an entry (b c, ...) per time step; the words' gates are one matmul over all of them.
        inputs, embedded, word_gates = map(active.split, (active.inputs, embedded, self._word_gates(embedded)))
        hidden, contexts, alphas, log_probs = [], [], [], []
        for t, (b, c) in enumerate(active.shapes):
            if sampling_prob and t:
                sampled = self._sample_words(embedded[t - 1], hidden[-1], contexts[-1])
                sampled = sampled.view(active.shapes[t - 1])[:b, :c].flatten()
                use_sampled = torch.rand_like(sampled, dtype=torch.float) < sampling_prob
                embedded[t] = self.dropout(self.embedding(sampled.where(use_sampled, inputs[t])))
                word_gates[t] = self._word_gates(embedded[t])
            regions, keys = first_images((regions, keys), b)
            if (b, c) != state[0].shape[:2]:
                state = tuple(part[:b, :c] for part in state)
            attended, state = self._time_step(word_gates[t].view(b, c, -1), regions, keys, state)
            hidden.append(state[0].flatten(0, 1))
            contexts.append(attended.context.flatten(0, 1))
            alphas.append(attended.alpha.flatten(0, 1))
            if attended.log_probs is not None:
                log_probs.append(attended.log_probs.flatten())
        logits = self._logits(*map(active.select, (embedded, hidden, contexts)))  # (N, V)
        output = DecoderOutput(logits, predicted.targets, predicted.unpack(active.select(alphas)))
        if not log_probs:
            return output
        return output._replace(sampled_log_probs=predicted.unpack(active.select(log_probs)), baseline=self.baseline)

    @torch.no_grad()
    def _sample_words(self, embedded: Tensor, hidden: Tensor, context: Tensor) -> Tensor:
        """Sample word ids (...) from `_logits`."""
        return sample_words(self._logits(embedded, hidden, context))


def first_images(nested: Nested, count: int) -> Nested:
    """Keep the first images of tensors (B, ...); a slice of all images would cost time in the backward pass."""
    return map_tensors(lambda x: x if len(x) == count else x[:count], nested)
