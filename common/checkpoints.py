"""What files of others may hold: settings, words and tensors that are no trap, and modules built without memory."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from utils import InputError, first_line, has_type


class EmptyWeights(TorchFunctionMode):
    """In this context modules get weights with a shape and no memory (device meta), and nothing is drawn at random.

    Unlike `torch.device("meta")` it leaves other tensors as they are: torchvision computes sizes with some.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch; those that allocate weights, on the device meta."""
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros, torch.ones):
            kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


@contextlib.contextmanager
def name_impossible_sizes(path: str | Path) -> Iterator[None]:
    """Any error of building a module with the sizes of a file becomes an InputError that names the file."""
    try:
        yield
    except (InputError, RuntimeError, ValueError, TypeError) as error:  # torch has all of these for impossible sizes
        raise InputError(f"{path}: {first_line(error)[:200]}") from None


def check_settings(settings: Any, names: Collection[str], path: str | Path) -> None:
    """Raise InputError where the model's settings are not a dictionary with these names."""
    if not isinstance(settings, dict):
        raise InputError(f"{path}: model_settings is {shown(settings)}, not a dictionary")
    for name in [*names, *settings]:
        if name not in settings or name not in names:
            verb = "has the unknown" if name in settings else "lacks"
            raise InputError(f"{path}: model_settings {verb} {shown(name)}")


def check_types(values: Mapping[str, Any], hints: Mapping[str, Any], path: str | Path) -> None:
    """Raise InputError where a value is not of the type that its hint says."""
    for name, value in values.items():
        hint = hints[name]
        if not has_type(value, hint):
            wanted = f"one of {' '.join(get_args(hint))}" if get_args(hint) else f"of type {hint.__name__}"
            raise InputError(f"{path}: {name} is {shown(value)}, not {wanted}")


def check_words(words: Any, path: str | Path) -> None:
    """Raise InputError where words are not a list of different words."""
    if not isinstance(words, list) or not all(type(word) is str for word in words):
        raise InputError(f"{path}: words is not a list of words")
    if len(set(words)) < len(words):
        raise InputError(f"{path}: words has a word twice")
    try:
        " ".join(words).encode()
    except UnicodeEncodeError:
        raise InputError(f"{path}: words has text that cannot be written (half of a surrogate pair)") from None


def check_weights(weights: Any, path: str | Path) -> None:
    """Raise InputError where weights are not a state dict of dense tensors."""
    if not isinstance(weights, dict) or not all(type(name) is str for name in weights):
        raise InputError(f"{path}: model is not a state dict")
    for name, weight in weights.items():
        check_dense(weight, name, path)


def check_fit(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], num_words: int, path: str | Path) -> None:
    """Raise InputError where weights are not finite, or not of the names, shapes and dtypes of the expected ones.

    `expected` is the state dict of the model that the file's settings and so many words give.
    """
    for name in [*expected, *weights]:
        if name not in expected or name not in weights:
            state = "missing" if name in expected else "not a part of the model"
            raise InputError(f"{path}: its weights do not fit its settings: {shown(name)} is {state}")
    for name, weight in weights.items():
        wanted = expected[name]
        if (weight.shape, weight.dtype) != (wanted.shape, wanted.dtype):
            raise InputError(
                f"{path}: its weights do not fit its settings and {num_words} words: {name} is {weight.dtype} "
                f"{tuple(weight.shape)}, not {wanted.dtype} {tuple(wanted.shape)}"
            )
        if weight.numel() and not all(bound.isfinite() for bound in weight.aminmax()):
            raise InputError(f"{path}: {name} has values that are not finite")


def check_dense(tensor: Any, name: str, path: str | Path) -> None:
    """Raise InputError where something is not a tensor whose elements are all there, one after another.

    Others may have more elements than the file: a single number can stand for a terabyte.
    """
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
        raise InputError(f"{path}: {name} is not a dense tensor")
    if not (tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)):
        raise InputError(f"{path}: the elements of {name} are not one after another")


def shown(value: Any) -> str:
    """A value of a file of others in an error's line, which it must not fill: the start of text or a number."""
    return repr(value)[:40] if isinstance(value, (str, int, float)) else type(value).__name__
