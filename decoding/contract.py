"""What decoding needs of a decoder, and what it does to a decoder's state.

Shapes: B images, R regions, D their width, C captions of an image, K beams, V words of the vocabulary. `Nested` stands
for a tensor, or tensors nested in tuples, whose rows are images; None stands for a tensor that there is not.
"""

from typing import Protocol

import torch
from torch import Tensor

from modules.decoders import Nested, map_tensors

CHECK_EVERY = 4  # words after which decoding on a GPU asks which images have ended


class StepDecoder(Protocol):
    """What decoding needs of a decoder; see `modules.decoders.Decoder`.

    Regions are a tensor (B, R, D), with a mask (B, R) where their number varies, or, of an ensemble, tuples of them.
    State tensors have any number of dimensions.
    """

    def keys(self, regions: Nested, mask: Nested = None) -> Nested:
        """What does not depend on the words, once per image: regions (B, R, D), mask (B, R) -> tensors (B, ...)."""
        ...

    def init_state(self, regions: Nested, mask: Nested = None) -> tuple[Nested, ...]:
        """The state before the first word: regions (B, R, D), mask (B, R) -> tensors (B, 1, ...)."""
        ...

    def step(
        self, words: Tensor, regions: Nested, keys: Nested, state: tuple[Nested, ...]
    ) -> tuple[Tensor, Tensor, tuple[Nested, ...]]:
        """words (B, C), keys (B, ...), state (B, C, ...) -> logits (B, C, V), alpha (B, C, R), state."""
        ...


def expand(nested: Nested, count: int) -> Nested:
    """Repeat the state (B, 1, ...) of an image for each of its captions: (B, count, ...)."""
    return map_tensors(lambda x: x.expand(-1, count, *x.shape[2:]).contiguous(), nested)


def reorder(nested: Nested, beam_indices: Tensor) -> Nested:
    """Select from tensors (B, C, ...) the captions that the new ones extend: beam_indices (B, K) -> (B, K, ...)."""
    B, K = beam_indices.shape
    first_rows = torch.arange(B, device=beam_indices.device).unsqueeze(1)  # in units of C

    def select(x: Tensor) -> Tensor:
        rows = (beam_indices + first_rows * x.shape[1]).flatten()
        return x.flatten(0, 1).index_select(0, rows).unflatten(0, (B, K))

    return map_tensors(select, nested)


def select_rows(nested: Nested, rows: Tensor) -> Nested:
    """Select images: tensors (B, ...), row indices (b,) -> (b, ...)."""
    return map_tensors(lambda x: x.index_select(0, rows), nested)


def checks_after(t: int, device: torch.device) -> bool:
    """Whether to ask after word t which images have ended. The host waits for a GPU's answer, so it asks rarely."""
    return device.type == "cpu" or t % CHECK_EVERY == 0


def drop_ended(ended: Tensor, nested: Nested) -> Nested:
    """Drop the images whose captions have all ended: ended (B, C), tensors (B, ...) -> (b, ...).

    Images end at different words. Without those that have ended, a search takes two thirds of the time.
    """
    rows = (~ended).any(dim=1).nonzero().squeeze(1)
    return nested if len(rows) == len(ended) else select_rows(nested, rows)
