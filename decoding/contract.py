"""The methods that decoding needs of a decoder, and operations on a decoder's state.

Shapes: B images, R regions, D their width, C captions of an image, K beams. `Nested` is a tensor or None, or a tuple of
`Nested`; the rows of all tensors are images.
"""

from typing import Protocol

import torch
from torch import Tensor

from modules.decoders import Nested, StepOutput, map_tensors

CHECK_EVERY = 4  # words after which decoding on a GPU asks which images have ended


class StepDecoder(Protocol):
    """The methods that decoding needs of a decoder; see `modules.decoders.Decoder`.

    Regions are a tensor (B, R, D), with a mask (B, R) if their number varies, or tuples of them for an ensemble. State
    tensors have any number of dimensions.
    """

    def keys(self, regions: Nested, mask: Nested = None) -> Nested: ...

    def init_state(self, regions: Nested, mask: Nested = None) -> tuple[Nested, ...]: ...

    def step(self, words: Tensor, regions: Nested, keys: Nested, state: tuple[Nested, ...]) -> StepOutput: ...


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


def checks_after(t: int, device: torch.device) -> bool:
    """Return True if a search checks for finished images after word t; rare on a GPU, where a check synchronizes."""
    return device.type == "cpu" or t % CHECK_EVERY == 0


def drop_ended(ended: Tensor, nested: Nested) -> Nested:
    """Drop the images whose captions have all ended: ended (B, C), tensors (B, ...) -> (b, ...).

    Images end at different words, so this saves a search a third of its time.
    """
    rows = (~ended).any(dim=1).nonzero().squeeze(1)
    return nested if len(rows) == len(ended) else map_tensors(lambda x: x.index_select(0, rows), nested)
