"""Validate untrusted checkpoints: words, settings and tensors; build models without memory."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from utils import InputError, first_line, has_type


class EmptyWeights(TorchFunctionMode):
    """Within this context a module's weights have shapes but no memory (device meta), and no random numbers are drawn.

    Unlike `torch.device("meta")` it leaves other tensors alone: torchvision computes sizes with some.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch, on the device meta if it allocates weights."""
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros, torch.ones):
            kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


@contextlib.contextmanager
def name_impossible_sizes(path: str | Path) -> Iterator[None]:
    """Turn any error of building a module with the sizes in a file into an InputError that names the file."""
    try:
        yield
    except (InputError, RuntimeError, ValueError, TypeError) as error:  # torch raises all of these for impossible sizes
        raise InputError(f"{path}: {first_line(error)[:200]}") from None


def check_types(values: Mapping[str, Any], hints: Mapping[str, Any], path: str | Path) -> None:
    """Raise InputError if a value does not have the type of its hint."""
    for name, value in values.items():
        if not has_type(value, hints[name]):
            raise InputError(f"{path}: {name} is {shown(value)}, not of type {hints[name].__name__}")


def check_words(words: Any, path: str | Path) -> None:
    """Raise InputError if words are not a list of distinct strings."""
    if not isinstance(words, list) or not all(type(word) is str for word in words):
        raise InputError(f"{path}: words is not a list of words")
    if len(set(words)) < len(words):
        raise InputError(f"{path}: words has a word twice")


def check_weights(weights: Any, path: str | Path) -> None:
    """Raise InputError if weights are not a state dict of dense tensors."""
    if not isinstance(weights, dict) or not all(type(name) is str for name in weights):
        raise InputError(f"{path}: model is not a state dict")
    for name, weight in weights.items():
        check_dense(weight, name, path)


def check_fit(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], num_words: int, path: str | Path) -> None:
    """Raise InputError if weights differ from the expected ones in name, shape or dtype, or are not finite.

    `expected` is the state dict of the model that the file's settings and `num_words` words define.
    """
    for name in [*expected, *weights]:
        if name not in expected or name not in weights:
            problem = "missing" if name in expected else "not a part of the model"
            raise InputError(f"{path}: its weights do not fit its settings: {shown(name)} is {problem}")
        weight, wanted = weights[name], expected[name]
        if (weight.shape, weight.dtype) != (wanted.shape, wanted.dtype):
            raise InputError(
                f"{path}: its weights do not fit its settings and {num_words} words: {name} is {weight.dtype} "
                f"{tuple(weight.shape)}, not {wanted.dtype} {tuple(wanted.shape)}"
            )
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise InputError(f"{path}: {name} has values that are not finite")


def check_dense(tensor: Any, name: str, path: str | Path) -> None:
    """Raise InputError if a value is not a tensor that stores each of its elements, one after another.

    Other tensors may have more elements than the file has bytes: a single number can stand for a terabyte.
    """
    is_dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided
    if not is_dense or tensor.is_nested or tensor.is_meta:
        raise InputError(f"{path}: {name} is not a dense tensor")
    if not (tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)):
        raise InputError(f"{path}: the elements of {name} are not one after another")


def shown(value: Any) -> str:
    """Shorten a value from a file to 40 characters for an error message."""
    return repr(value)[:40] if isinstance(value, (str, int, float)) else type(value).__name__
