"""The contract of all decoders, and how teacher forcing lays out the captions of a batch.

Shapes: B images, R regions, D their width, C captions of an image (beams in a search), T words of a caption, E width
of a word embedding, V words of the vocabulary. A mask (B, R) is False where an image has no region; None: all have R.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from modules.layers import Dropout, sample_categorical
from text.vocabulary import PAD, START
from utils import InputError, copy_to_device

if TYPE_CHECKING:
    from models import ModelSettings

Nested = Any  # a Tensor, None or a tuple of Nested

INIT_RANGE = 0.1  # word embeddings are initialized uniformly in [-INIT_RANGE, INIT_RANGE]


class DecoderOutput(NamedTuple):
    """Predictions of teacher forcing: N words over all captions, time step by time step."""

    logits: Tensor  # (N, V)
    targets: Tensor  # (N,)
    alpha: Tensor  # (T, B, C, R) attention weights, zero after a caption's end
    sampled_log_probs: Tensor | None = None  # (T, B, C) of hard attention's regions, 0 where none was sampled
    baseline: Tensor | None = None  # () of hard attention, for `training.losses.hard_attention_loss`
    mask: Tensor | None = None  # (B, R), False where an image has no region; None: all have R
    boxes: Tensor | None = None  # (B, R, 4) of the regions, from `models.Captioner.forward`


class Layout(NamedTuple):
    """The N words of a batch that are predicted, time step by time step."""

    shape: tuple[int, ...]  # (T, B, C)
    targets: Tensor  # (N,) word ids
    positions: Tensor  # (N,) indices into T B C

    def unpack(self, x: Tensor) -> Tensor:
        """(N, ...) -> (T, B, C, ...), zero after a caption's end."""
        unpacked = x.new_zeros(math.prod(self.shape), *x.shape[1:]).index_copy(0, self.positions, x)
        return unpacked.unflatten(0, self.shape)


class Decoder(nn.Module):
    """What all decoders share: the word embeddings, and three methods for teacher forcing and every search.

    `keys` and `init_state` run once per image, `step` once per word.

    Args:
        settings: embed_dim is E; dropout is on the word embeddings, and where a subclass uses the layer `dropout`.
        vocab_size: V.
    """

    WARMUP_RATIO = 0.05  # of train.py, where it is not given

    def __init__(self, settings: ModelSettings, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, settings.embed_dim, padding_idx=PAD)
        self.dropout = Dropout(settings.dropout)

    def reset_embeddings(self) -> None:
        """Small embeddings: torch's default ones are ten times larger and dominate the regions for epochs."""
        nn.init.uniform_(self.embedding.weight, -INIT_RANGE, INIT_RANGE)
        self.embedding.weight.data[PAD] = 0

    def load_pretrained_embeddings(self, word_ids: Tensor, vectors: Tensor) -> None:
        """Initialize words (n,) with vectors (n, E) of root mean square 1, scaled to that of the other embeddings."""
        self.embedding.weight.data[word_ids] = vectors * INIT_RANGE / math.sqrt(3)

    @property
    def has_attention(self) -> bool:
        """Whether the decoder attends to the regions before each word."""
        return True

    @property
    def gate(self) -> nn.Module | None:
        """The module of one output whose sigmoid, at each word, is the weight of the image; None without.

        Near 0 the decoder hardly uses the image for the word, whatever alpha is.
        """
        return None

    def choose_alpha(self, layer: int = 0, head: int = 0) -> None:
        """Choose the attention weights that are returned, where a decoder has several layers and heads; 0: its default.

        Raises InputError for a layer or head that does not exist.
        """
        for name, value in (("layer", layer), ("head", head)):
            if value:
                raise InputError(f"--alpha_{name} {value}: only a transformer decoder has several to choose from")

    def all_alpha(self, regions: Tensor, inputs: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """The attention weights of all L layers and n heads, where a decoder has several; None for all others.

        regions (B, R, D), inputs (B, T) word ids from <start> on, mask (B, R) -> (B, L, n, T, R).
        """
        return None

    def keys(self, regions: Tensor, mask: Tensor | None = None) -> Nested:
        """What does not depend on the words, once per image: (B, R, D), mask (B, R) -> tensors (B, ...)."""
        raise NotImplementedError

    def init_state(self, regions: Tensor, mask: Tensor | None = None) -> tuple[Nested, ...]:
        """The state before the first word: (B, R, D), mask (B, R) -> tensors (B, 1, ...)."""
        raise NotImplementedError

    def step(
        self, words: Tensor, regions: Tensor, keys: Nested, state: tuple[Nested, ...]
    ) -> tuple[Tensor, Tensor, tuple[Nested, ...]]:
        """Predict the next word of each of an image's C captions.

        words (B, C), regions (B, R, D), keys and state of tensors (B, ...) and (B, C, ...)
        -> logits (B, C, V), alpha (B, C, R), state.
        """
        raise NotImplementedError

    def forward(
        self, regions: Tensor, words: Tensor, lengths: Tensor, sampling_prob: float = 0.0, mask: Tensor | None = None
    ) -> DecoderOutput:
        """Teacher forcing: predict each word from the true words before it.

        Args:
            regions: (B, R, D).
            words: (B, C, T + 1) on the CPU, <start> ... <end> and padding, sorted as in `datasets.Batch`.
            lengths: (B, C) on the CPU, words to predict.
            sampling_prob: probability that an input word is sampled from the model instead of the true one (scheduled
                sampling, Bengio et al., 2015).
            mask: (B, R), False where an image has no region; None: all have R.
        """
        raise NotImplementedError

    @property
    def has_baseline(self) -> bool:
        """Whether `update_baseline` is to be called after each step."""
        return False

    def take_expectation(self) -> None:
        """Let attention that samples regions in training take its expectation, until `train` is called again."""

    def update_baseline(self, loss: float) -> None:
        """Take in the mean loss per word of a step: the baseline of attention that samples regions."""
        raise NotImplementedError


def sample_words(logits: Tensor) -> Tensor:
    """Sample input words from the softmax of logits (..., V) without <pad> and <start> -> word ids (...)."""
    logits = logits.float()
    for word_id in (PAD, START):
        logits[..., word_id] = -math.inf
    return sample_categorical(logits.softmax(dim=-1))


def caption_mask(lengths: Tensor) -> Tensor:
    """Which words exist, in whose order teacher forcing has its N words: (B, C) -> (T, B, C)."""
    return torch.arange(int(lengths.max())).view(-1, 1, 1) < lengths


def lay_out(words: Tensor, lengths: Tensor, device: torch.device) -> Layout:
    """The layout of captions (B, C, T + 1) of these lengths (B, C).

    It depends on the captions alone, so it is computed on the CPU: no shape is read from a GPU.
    """
    mask = caption_mask(lengths)  # (T, B, C)
    targets = words[:, :, 1 : len(mask) + 1].permute(2, 0, 1)[mask]
    positions = mask.flatten().nonzero().squeeze(1)
    return Layout((len(mask), *lengths.shape), *(copy_to_device(each, device) for each in (targets, positions)))


def map_tensors(function: Callable[[Tensor], Tensor], nested: Nested) -> Nested:
    """Apply a function to every tensor."""
    if nested is None:
        return None
    if isinstance(nested, Tensor):
        return function(nested)
    return tuple(map_tensors(function, part) for part in nested)


def first_tensor(nested: Nested) -> Tensor:
    """The first of nested tensors, which tells the number of images and the device of all."""
    return nested if isinstance(nested, Tensor) else first_tensor(nested[0])
