"""A captioner as two ONNX models: the first runs once per image, the second at each word.

Shapes: B images, S pixels of a side, N boxes of an image, F features, R regions, D their width, C captions of an image,
V words of the vocabulary.
"""

import contextlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from decoding.contract import expand
from models import Captioner
from modules.decoders import Decoder, Nested, map_tensors
from text.vocabulary import START
from utils import InputError, first_line


class ImageModule(nn.Module):
    """The computation once per image: the encoder, and the decoder's keys and first state."""

    def __init__(self, captioner: Captioner) -> None:
        super().__init__()
        self.captioner = captioner

    def forward(self, inputs: Tensor, boxes: Tensor | None = None) -> tuple[Tensor, ...]:
        """Compute regions (B, R, D), tensors of keys (B, ...) and of the state before the first word (B, 1, ...).

        inputs and boxes: as `random_inputs` returns them.
        """
        regions, keys, state = self.encode(inputs, boxes)
        return regions, *flatten(keys), *flatten(state)

    def encode(self, inputs: Tensor, boxes: Tensor | None = None) -> tuple[Tensor, Nested, Nested]:
        """Compute what `forward` does, with keys and state nested as in the decoder."""
        encoded = self.captioner.encode(inputs, boxes)
        regions, mask, decoder = encoded.regions, encoded.mask, self.captioner.decoder
        return regions, decoder.keys(regions, mask), decoder.init_state(regions, mask)


class StepModule(nn.Module):
    """The decoder's step at each word. Takes keys and state as flat lists; those given show how to nest them."""

    def __init__(self, decoder: Decoder, keys: Nested, state: Nested) -> None:
        super().__init__()
        self.decoder, self.nested_keys, self.nested_state = decoder, keys, state

    def forward(
        self, words: Tensor, regions: Tensor, keys: Sequence[Tensor], state: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Predict the next words after words (B, C), given regions (B, R, D), keys (B, ...) and state (B, C, ...).

        Returns log-probabilities (B, C, V), alpha (B, C, R) and the tensors of the next state (B, C, ...).
        """
        nested_keys, nested_state = nest(keys, self.nested_keys), nest(state, self.nested_state)
        output = self.decoder.step(words, regions, nested_keys, nested_state)
        return output.logits.float().log_softmax(dim=-1), output.alpha, *flatten(output.state)


def flatten(nested: Nested) -> list[Tensor]:
    """Return all tensors in order."""
    if nested is None or isinstance(nested, Tensor):
        return [] if nested is None else [nested]
    return [tensor for part in nested for tensor in flatten(part)]


def nest(tensors: Sequence[Tensor], like: Nested) -> Nested:
    """Undo `flatten`: nest tensors as those of `like` are."""
    remaining = iter(tensors)
    return map_tensors(lambda _: next(remaining), like)


class TensorNames(NamedTuple):
    """Names of the inputs and outputs of both models besides `regions`, `words`, `log_probs` and `alpha`."""

    inputs: list[str]  # of the model that runs once per image
    keys: list[str]
    state: list[str]
    next_state: list[str]

    @classmethod
    def of(cls, captioner: Captioner) -> "TensorNames":
        """Return the names of a captioner's tensors."""
        inputs = ["features" if captioner.uses_region_features else "images"]
        if takes_boxes(captioner):
            inputs.append("boxes")
        _, keys, state = ImageModule(captioner).encode(*random_inputs(captioner, 1, 1))
        key_names = [f"key_{i}" for i in range(len(flatten(keys)))]
        state_names = [f"state_{i}" for i in range(len(flatten(state)))]
        return cls(inputs, key_names, state_names, [f"next_{name}" for name in state_names])

    @property
    def image_outputs(self) -> list[str]:
        """Outputs of the model that runs once per image, which are inputs of the other."""
        return ["regions", *self.keys, *self.state]


def takes_boxes(captioner: Captioner) -> bool:
    """Return True if the boxes of objects or of region features are an input."""
    return captioner.uses_objects or captioner.uses_region_features


def random_inputs(captioner: Captioner, B: int, N: int) -> tuple[Tensor, ...]:
    """Draw images (B, 3, S, S) uint8 or region features (B, N, F) and, if the captioner takes boxes, these (B, N, 4).

    If there are several, the last box of image 0 has no area, as padding has none.
    """
    generator = torch.Generator().manual_seed(B)
    if captioner.uses_region_features:
        inputs = torch.randn(B, N, captioner.encoder.feature_dim, generator=generator)
    else:
        side = captioner.image_size
        inputs = torch.randint(0, 256, (B, 3, side, side), dtype=torch.uint8, generator=generator)
    if not takes_boxes(captioner):
        return (inputs,)
    boxes = torch.rand(B, N, 2, 2, generator=generator).sort(dim=2).values.flatten(2)  # left and top first
    boxes[0, max(1, N - 1) :] = 0
    return inputs, boxes


def make_example(captioner: Captioner, B: int, N: int, C: int, t: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return example inputs of both modules: B images with N boxes, and C captions of each after t words."""
    inputs = random_inputs(captioner, B, N)
    regions, keys, state = ImageModule(captioner).encode(*inputs)
    state, words = expand(state, C), torch.full((B, C), START)
    for _ in range(t):
        state = captioner.decoder.step(words, regions, keys, state).state
    keys, state = ([x.contiguous() for x in flatten(nested)] for nested in (keys, state))  # ONNX has no strides
    return inputs, (words, regions.contiguous(), keys, state)


class Part(NamedTuple):
    """A module that becomes one ONNX model."""

    name: str  # in messages
    module: nn.Module
    examples: tuple[tuple[Any, ...], tuple[Any, ...]]  # two sets of inputs with no size in common
    axis_names: tuple[tuple[str, ...], ...]  # for each input, as in `dynamic_axes`
    input_names: list[str]
    output_names: list[str]

    def write(self, path: Path, metadata: dict[str, str]) -> None:
        """Write the model as one file. Raises InputError if torch cannot export the module."""
        axes = [dynamic_axes(*each) for each in zip(*self.examples, self.axis_names, strict=True)]
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")  # torch warns about its own deprecated calls
            try:
                program = torch.onnx.export(
                    self.module,
                    self.examples[0],
                    dynamo=True,
                    input_names=self.input_names,
                    output_names=self.output_names,
                    dynamic_shapes=tuple(axes),
                    verbose=False,
                )
                assert program is not None
                program.model.metadata_props.update(metadata)
                program.save(path, external_data=False)
            except (OSError, MemoryError):
                raise
            except Exception as error:  # an operation that ONNX lacks raises almost anything
                while error.__cause__ is not None:
                    error = error.__cause__  # torch wraps the reason
                raise InputError(
                    f"torch {torch.__version__} cannot export the {self.name}: {first_line(error)}"
                ) from None


def dynamic_axes(x: Any, other: Any, names: tuple[str, ...]) -> Any:
    """Name the axes of a tensor, or of a list of tensors, whose sizes differ in another example.

    Axis i is names[i]; further axes have the last name.
    """
    if not isinstance(x, Tensor):
        return [dynamic_axes(*each, names) for each in zip(x, other, strict=True)]
    sizes = enumerate(zip(x.shape, other.shape, strict=True))
    return {i: names[min(i, len(names) - 1)] for i, (size, other_size) in sizes if size != other_size}


def make_parts(captioner: Captioner, names: TensorNames) -> tuple[Part, Part]:
    """Return the two parts of a captioner: once per image, and at each word."""
    # Axes whose sizes differ between the examples are dynamic. No size is 1, which torch would fix.
    inputs, arguments = zip(make_example(captioner, 2, 5, 3, 2), make_example(captioner, 4, 7, 5, 3), strict=True)
    of_boxes, of_regions, of_captions = ("batch", "boxes"), ("batch", "regions"), ("batch", "captions", "length")
    encoder = Part(
        "encoder", ImageModule(captioner), inputs, (of_boxes,) * len(names.inputs), names.inputs, names.image_outputs
    )
    _, keys, state = ImageModule(captioner).encode(*inputs[0])
    step = Part(
        "decoder",
        StepModule(captioner.decoder, keys, state),
        arguments,
        (of_captions, of_regions, of_regions, of_captions),
        ["words", *names.image_outputs],
        ["log_probs", "alpha", *names.next_state],
    )
    return encoder, step
