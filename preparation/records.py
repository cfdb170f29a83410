"""Image records: what every caption format is read into."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from preparation.storage import SPLITS
from text.tokenizer import tokenize
from utils import InputError

SPLIT_NAMES = {"restval": "train", "valid": "val", "validation": "val", "dev": "val"}  # other names of SPLITS


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image of a data set with its captions.

    The captions are kept as JSON: as lists of strings, COCO's 616,000 would take a gigabyte.
    """

    path: Path  # of the photo, or of an HDF5 file of images
    name: str  # as the captions file spells it
    image_id: int | str
    split: str  # empty where the captions have no splits
    packed_captions: bytes  # of `pack_captions`
    objects: list[dict[str, Any]] | None = None  # [{"words", "box": [left, top, right, bottom], "score"?}] where known
    row: int = -1  # index in an HDF5 file of images; -1: `path` is a photo
    has_own_id: bool = False  # whether image_id is from the captions file; else images are counted

    @property
    def captions(self) -> list[dict[str, Any]]:
        """The captions, [{"words": [...], "raw": "..."}], decoded anew each time."""
        return json.loads(self.packed_captions)

    def with_captions(self, captions: list[dict[str, Any]]) -> "ImageRecord":
        """A record of the same image with other captions."""
        return replace(self, packed_captions=pack_captions(captions))


def pack_captions(captions: list[dict[str, Any]]) -> bytes:
    """Captions, [{"words": [...], "raw": "..."}], as an `ImageRecord` keeps them."""
    return json.dumps(captions, ensure_ascii=False, separators=(",", ":")).encode()


def records_of(
    captions: Mapping[str, list[str]], images: Path, splits: Mapping[str, str] | None = None
) -> list[ImageRecord]:
    """Records of a dictionary from file names to captions, their ids counted in its order.

    Args:
        images: the folder that the names are relative to.
        splits: from file names to splits; None: the captions have no splits.
    """
    return [
        ImageRecord(images / name, name, index, (splits or {}).get(name, ""), pack_sentences(image_captions))
        for index, (name, image_captions) in enumerate(captions.items())
    ]


def pack_sentences(captions: Iterable[str]) -> bytes:
    """Captions as an `ImageRecord` keeps them, without those that have no word."""
    return pack_captions(
        [{"words": words, "raw": caption.strip()} for caption in captions if (words := tokenize(caption))]
    )


def parse_split(name: Any, path: Path, image: str) -> str:
    """One of SPLITS from its name in a file. Raises InputError, with the path and the image, for an unknown name."""
    split = SPLIT_NAMES.get(name, name) if isinstance(name, str) else name
    if split not in SPLITS:
        raise InputError(f"{path}: {image} has the split {name!r}, not one of {' '.join((*SPLITS, *SPLIT_NAMES))}")
    return split


def require_type(value: Any, kind: type | tuple[type, ...]) -> Any:
    """Return a value unchanged; TypeError where it is of another type."""
    if not isinstance(value, kind):
        raise TypeError
    return value
