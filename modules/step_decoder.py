"""Tensors of a decoder, alone or nested in tuples, whose rows are images."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

Nested = Any  # a Tensor or a tuple of Nested


def map_tensors(function: Callable[[Tensor], Tensor], nested: Nested) -> Nested:
    """Apply a function to every tensor."""
    if isinstance(nested, Tensor):
        return function(nested)
    return tuple(map_tensors(function, part) for part in nested)
