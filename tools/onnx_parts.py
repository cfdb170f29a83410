"""A captioner as two ONNX models: what is computed once per image, and what is computed at each word.

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
    """What is computed once per image: the encoder and all between it and the first word."""

    def __init__(self, captioner: Captioner) -> None:
        super().__init__()
        self.captioner = captioner

    def forward(self, inputs: Tensor, boxes: Tensor | None = None) -> tuple[Tensor, ...]:
        """inputs and boxes of `random_inputs` -> regions (B, R, D), the tensors of keys (B, ...) and state (B, 1, ...).

        The state is that before the first word.
        """
        regions, keys, state = self.encode(inputs, boxes)
        return regions, *flatten(keys), *flatten(state)

    def encode(self, inputs: Tensor, boxes: Tensor | None = None) -> tuple[Tensor, Nested, Nested]:
        """As `forward`, with keys and state as the decoder nests them."""
        encoded = self.captioner.encode(inputs, boxes)
        regions, mask, decoder = encoded.regions, encoded.mask, self.captioner.decoder
        return regions, decoder.keys(regions, mask), decoder.init_state(regions, mask)


class StepModule(nn.Module):
    """What is computed at each word, by a decoder whose keys and state are nested as those given."""

    def __init__(self, decoder: Decoder, keys: Nested, state: Nested) -> None:
        super().__init__()
        self.decoder, self.nested_keys, self.nested_state = decoder, keys, state

    def forward(
        self, words: Tensor, regions: Tensor, keys: Sequence[Tensor], state: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """words (B, C), regions (B, R, D), tensors of keys (B, ...) and state (B, C, ...)
        -> log-probabilities (B, C, V), alpha (B, C, R), tensors of the next state (B, C, ...).
        """
        nested_keys, nested_state = nest(keys, self.nested_keys), nest(state, self.nested_state)
        logits, alpha, next_state = self.decoder.step(words, regions, nested_keys, nested_state)
        return logits.float().log_softmax(dim=-1), alpha, *flatten(next_state)


def flatten(nested: Nested) -> list[Tensor]:
    """All tensors, in their order."""
    if nested is None or isinstance(nested, Tensor):
        return [] if nested is None else [nested]
    return [tensor for part in nested for tensor in flatten(part)]


def nest(tensors: Sequence[Tensor], like: Nested) -> Nested:
    """The inverse of `flatten`: tensors nested as those of `like`."""
    remaining = iter(tensors)
    return map_tensors(lambda _: next(remaining), like)


class TensorNames(NamedTuple):
    """What the inputs and outputs of both models are called, `regions`, `words`, `log_probs` and `alpha` aside."""

    inputs: list[str]  # of the image's model
    keys: list[str]
    state: list[str]
    next_state: list[str]

    @classmethod
    def of(cls, captioner: Captioner) -> "TensorNames":
        """The names of a captioner's tensors."""
        inputs = ["features" if captioner.uses_region_features else "images", *["boxes"] * takes_boxes(captioner)]
        _, *nested = ImageModule(captioner).encode(*random_inputs(captioner, 1, 1))
        keys, state = (range(len(flatten(each))) for each in nested)
        return cls(
            inputs, [f"key_{i}" for i in keys], [f"state_{i}" for i in state], [f"next_state_{i}" for i in state]
        )

    @property
    def image_outputs(self) -> list[str]:
        """The outputs of the image's model, which are inputs of the word's."""
        return ["regions", *self.keys, *self.state]


def takes_boxes(captioner: Captioner) -> bool:
    """Whether the boxes of objects or of region features are an input."""
    return captioner.uses_objects or captioner.uses_region_features


def random_inputs(captioner: Captioner, B: int, N: int) -> tuple[Tensor, ...]:
    """Images (B, 3, S, S) uint8 or region features (B, N, F), and the boxes (B, N, 4) where the captioner takes some.

    Where there are several, the last box of image 0 has no area: it stands for none.
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


class Example(NamedTuple):
    """Inputs of both models."""

    inputs: tuple[Tensor, ...]  # of `random_inputs`
    words: Tensor  # (B, C)
    regions: Tensor  # (B, R, D)
    keys: Nested  # tensors (B, ...)
    state: Nested  # tensors (B, C, ...)


def make_example(captioner: Captioner, B: int, N: int, C: int, t: int) -> Example:
    """B images with N boxes, each with C captions of which t words are decoded."""
    inputs = random_inputs(captioner, B, N)
    regions, keys, state = ImageModule(captioner).encode(*inputs)
    state, words = expand(state, C), torch.full((B, C), START)
    for _ in range(t):
        *_, state = captioner.decoder.step(words, regions, keys, state)
    keys, state = (map_tensors(Tensor.contiguous, nested) for nested in (keys, state))  # ONNX knows no strides
    return Example(inputs, words, regions.contiguous(), keys, state)


def dynamic_axes(tensors: Sequence[Tensor], others: Sequence[Tensor], names: Sequence[str]) -> list[dict[int, str]]:
    """The axes of each tensor whose sizes differ in another example; the last of names is that of all other axes."""
    return [
        {i: names[min(i, len(names) - 1)] for i, (m, n) in enumerate(zip(x.shape, y.shape, strict=True)) if m != n}
        for x, y in zip(tensors, others, strict=True)
    ]


class Part(NamedTuple):
    """A module that becomes one ONNX model."""

    name: str  # in messages
    module: nn.Module
    arguments: tuple[Any, ...]  # an example of its inputs
    axes: tuple[Any, ...]  # {axis: name} of each input whose size may be another
    input_names: list[str]
    output_names: list[str]

    def write(self, path: Path, metadata: dict[str, str]) -> None:
        """Write it as one file. Raises InputError where torch cannot export the module."""
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")  # of what torch deprecates in itself
            try:
                program = torch.onnx.export(
                    self.module,
                    self.arguments,
                    dynamo=True,
                    input_names=self.input_names,
                    output_names=self.output_names,
                    dynamic_shapes=self.axes,
                    verbose=False,
                )
                assert program is not None
                program.model.metadata_props.update(metadata)
                program.save(path, external_data=False)
            except (OSError, MemoryError):
                raise
            except Exception as error:  # what ONNX lacks raises almost anything
                while error.__cause__ is not None:
                    error = error.__cause__  # torch wraps the reason
                raise InputError(
                    f"torch {torch.__version__} cannot export the {self.name}: {first_line(error)}"
                ) from None


def make_parts(captioner: Captioner, names: TensorNames) -> tuple[Part, Part]:
    """The encoder, with all that is computed once per image, and the decoder's step."""
    # Of two examples without a common size the axes that differ are dynamic. No size is 1, which torch would fix.
    example, other = make_example(captioner, 2, 5, 3, 2), make_example(captioner, 4, 7, 5, 3)
    keys, state = flatten(example.keys), flatten(example.state)
    input_axes = dynamic_axes(example.inputs, other.inputs, ("batch", "boxes"))
    region_axes, *key_axes = dynamic_axes(
        [example.regions, *keys], [other.regions, *flatten(other.keys)], ("batch", "regions")
    )
    word_axes, *state_axes = dynamic_axes(
        [example.words, *state], [other.words, *flatten(other.state)], ("batch", "captions", "length")
    )
    step = Part(
        "decoder",
        StepModule(captioner.decoder, example.keys, example.state),
        (example.words, example.regions, keys, state),
        (word_axes, region_axes, key_axes, state_axes),
        ["words", *names.image_outputs],
        ["log_probs", "alpha", *names.next_state],
    )
    encoder = ImageModule(captioner)
    return Part("encoder", encoder, example.inputs, tuple(input_axes), names.inputs, names.image_outputs), step
