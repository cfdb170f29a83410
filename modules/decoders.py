"""The contract of all decoders, and the order of words in teacher forcing.

Shapes: B images, R regions, D their width, F features of the encoder, C captions of an image (beams in a search), T
words of a caption, E width of a word embedding, V words of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from modules.cpu import Dropout, sample_categorical
from text.vocabulary import PAD, START
from utils import InputError, copy_to_device

if TYPE_CHECKING:
    from models import ModelSettings

Nested = Any  # a Tensor, None or a tuple of Nested

INIT_RANGE = 0.1  # word embeddings are initialized uniformly in [-INIT_RANGE, INIT_RANGE]


class Encoded(NamedTuple):
    """Encoded images. For an ensemble, regions, masks and features are tuples of tensors."""

    regions: Nested  # (B, R, D) for the decoder
    mask: Nested  # (B, R), False where an image has no region; None: all have R
    boxes: Tensor  # (B, R, 4) of the regions, as `modules.regions.RegionSource` returns them
    features: Nested  # (B, R, F) of the grid
    neighbors: Tensor | None  # (B, R, N) of the graph, as `modules.graph.RegionGraph` returns them
    edge_weights: list[Tensor]  # (B, R, N) of each graph layer


class StepOutput(NamedTuple):
    """Predictions for the next word of each of an image's C captions."""

    logits: Tensor  # (B, C, V)
    state: tuple[Nested, ...]  # tensors (B, C, ...)
    alpha: Tensor  # (B, C, R) attention weights
    gate: Tensor | None = None  # (B, C) weight of the image for this word, from 0 to 1; None: the decoder has no gate


class DecoderOutput(NamedTuple):
    """Predictions of teacher forcing for N words over all captions, ordered by time step."""

    logits: Tensor  # (N, V)
    targets: Tensor  # (N,)
    alpha: Tensor  # (T, B, C, R) attention weights, zero after a caption's end
    sampled_log_probs: Tensor | None = None  # (T, B, C) of hard attention's regions, 0 where none was sampled
    baseline: Tensor | None = None  # () of hard attention, for `training.losses.hard_attention_loss`
    mask: Tensor | None = None  # (B, R), False where an image has no region; None: all have R
    boxes: Tensor | None = None  # (B, R, 4) of the regions, from `models.Captioner.forward`


class Decoder(nn.Module):
    """Base class of all decoders: the word embeddings, and three methods for teacher forcing and every search.

    `keys` and `init_state` run once per image, `step` once per word.

    Args:
        settings: embed_dim is E; dropout is on the word embeddings, and where a subclass uses the layer `dropout`.
        vocab_size: V.
    """

    WARMUP_RATIO = 0.05  # train.py's default for this decoder

    def __init__(self, settings: ModelSettings, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, settings.embed_dim, padding_idx=PAD)
        self.dropout = Dropout(settings.dropout)

    def reset_embeddings(self) -> None:
        """Initialize small embeddings: torch's are ten times larger and dominate the regions for epochs."""
        nn.init.uniform_(self.embedding.weight, -INIT_RANGE, INIT_RANGE)
        self.embedding.weight.data[PAD] = 0

    def load_pretrained_embeddings(self, word_ids: Tensor, vectors: Tensor) -> None:
        """Initialize words (n,) with vectors (n, E) of root mean square 1, scaled to that of the other embeddings."""
        self.embedding.weight.data[word_ids] = vectors * INIT_RANGE / math.sqrt(3)

    def keys(self, regions: Tensor, mask: Tensor | None = None) -> Nested:
        """Compute what does not depend on the words, once per image.

        regions (B, R, D), mask (B, R), False where an image has no region; None: all have R -> tensors (B, ...).
        """
        raise NotImplementedError

    def init_state(self, regions: Tensor, mask: Tensor | None = None) -> tuple[Nested, ...]:
        """Compute the state before the first word: (B, R, D), mask (B, R) -> tensors (B, 1, ...)."""
        raise NotImplementedError

    def step(self, words: Tensor, regions: Tensor, keys: Nested, state: tuple[Nested, ...]) -> StepOutput:
        """Predict the next word of each of an image's C captions.

        words (B, C), regions (B, R, D), keys of tensors (B, ...), state of tensors (B, C, ...).
        """
        raise NotImplementedError

    def forward(
        self, regions: Tensor, words: Tensor, lengths: Tensor, sampling_prob: float = 0.0, mask: Tensor | None = None
    ) -> DecoderOutput:
        """Predict each word from the true words before it (teacher forcing).

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
    def has_attention(self) -> bool:
        """True if the decoder attends to the regions before each word."""
        return True

    def choose_alpha(self, layer: int = 0, head: int = 0) -> None:
        """Choose the layer and head whose attention weights are returned, from 1; 0 is the decoder's default.

        Raises InputError for a layer or head that does not exist.
        """
        for name, value in (("layer", layer), ("head", head)):
            if value:
                raise InputError(f"--alpha_{name} {value}: only a transformer decoder has several to choose from")

    def all_alpha(self, regions: Tensor, inputs: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """Compute the attention weights of all L layers and n heads; None for a decoder without layers and heads.

        regions (B, R, D), inputs (B, T) word ids from <start> on, mask (B, R) -> (B, L, n, T, R).
        """
        return None

    @property
    def baseline(self) -> Tensor | None:
        """Baseline () of attention that samples regions, to be updated after each step; None for other decoders."""
        return None

    def take_expectation(self) -> None:
        """Let attention that samples regions in training take its expectation, until `train` is called again."""

    def update_baseline(self, loss: float) -> None:
        """Update the baseline of attention that samples regions with the mean loss per word of a step."""
        raise NotImplementedError


def sample_words(logits: Tensor) -> Tensor:
    """Sample input words from the softmax of logits (..., V) without <pad> and <start> -> word ids (...)."""
    logits = logits.float()
    for word_id in (PAD, START):
        logits[..., word_id] = -math.inf
    return sample_categorical(logits.softmax(dim=-1))


def caption_mask(lengths: Tensor) -> Tensor:
    """Mark the words to predict, in the order of `DecoderOutput`: lengths (B, C) -> (T, B, C)."""
    return torch.arange(int(lengths.max())).view(-1, 1, 1) < lengths


class PredictedWords(NamedTuple):
    """The N words that teacher forcing predicts, ordered by time step, and their places in (T, B, C)."""

    shape: tuple[int, ...]  # (T, B, C)
    targets: Tensor  # (N,) word ids
    positions: Tensor  # (N,) indices into T B C

    @classmethod
    def of(cls, words: Tensor, lengths: Tensor, device: torch.device) -> PredictedWords:
        """Select the words of captions (B, C, T + 1) of these lengths (B, C).

        They depend on the captions alone and are computed on the CPU, so that no shape is read from a GPU.
        """
        mask = caption_mask(lengths)  # (T, B, C)
        targets = words[:, :, 1 : len(mask) + 1].permute(2, 0, 1)[mask]
        positions = mask.flatten().nonzero().squeeze(1)
        return cls(tuple(mask.shape), copy_to_device(targets, device), copy_to_device(positions, device))

    def unpack(self, x: Tensor) -> Tensor:
        """Put (N, ...) in its places: (T, B, C, ...), zero after a caption's end."""
        unpacked = x.new_zeros(math.prod(self.shape), *x.shape[1:]).index_copy(0, self.positions, x)
        return unpacked.unflatten(0, self.shape)


def map_tensors(function: Callable[[Tensor], Tensor], nested: Nested) -> Nested:
    """Apply a function to every tensor."""
    if nested is None:
        return None
    if isinstance(nested, Tensor):
        return function(nested)
    return tuple(map_tensors(function, part) for part in nested)


def first_tensor(nested: Nested) -> Tensor:
    """Return the first of nested tensors, which tells the number of images and the device of all."""
    return nested if isinstance(nested, Tensor) else first_tensor(nested[0])
