"""Image records, the common form of all caption formats."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from preparation.images import photo_size
from preparation.storage import SPLITS, open_images
from text.tokenizer import tokenize
from utils import InputError

SPLIT_NAMES = {"restval": "train", "valid": "val", "validation": "val", "dev": "val"}  # other names of SPLITS


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image of a data set with its captions.

    The captions are stored as JSON: lists of strings would take a gigabyte for COCO's 616,000 captions.
    """

    path: Path  # of the photo, or of an HDF5 file of images
    name: str  # spelled as in the captions file
    image_id: int | str
    split: str  # empty if the captions have no splits
    packed_captions: bytes  # of `pack_captions`
    objects: list[dict[str, Any]] | None = None  # [{"words", "box": [left, top, right, bottom], "score"?}] if known
    row: int = -1  # index in an HDF5 file of images; -1: `path` is a photo
    has_own_id: bool = False  # True if image_id is from the captions file and not counted

    @property
    def captions(self) -> list[dict[str, Any]]:
        """The captions, [{"words": [...], "raw": "..."}], decoded at each access."""
        return json.loads(self.packed_captions)

    def with_captions(self, captions: list[dict[str, Any]]) -> "ImageRecord":
        """Return a record of the same image with other captions."""
        return replace(self, packed_captions=pack_captions(captions))

    def photo_size(self) -> tuple[int, int] | None:
        """Return width and height of the photo; None if it is unreadable, which `write_folder` reports."""
        try:
            if self.row < 0:
                return photo_size(self.path)
            with open_images(self.path) as images:
                return images.shape[3], images.shape[2]
        except (InputError, OSError):
            return None


def pack_captions(captions: list[dict[str, Any]]) -> bytes:
    """Encode captions, [{"words": [...], "raw": "..."}], for an `ImageRecord`."""
    return json.dumps(captions, ensure_ascii=False, separators=(",", ":")).encode()


def pack_sentences(captions: Iterable[str]) -> bytes:
    """Tokenize captions and encode those that have words for an `ImageRecord`."""
    return pack_captions(
        [{"words": words, "raw": caption.strip()} for caption in captions if (words := tokenize(caption))]
    )


def records_of(
    captions: Mapping[str, list[str]], images: Path, splits: Mapping[str, str] | None = None
) -> list[ImageRecord]:
    """Make records from a mapping of file names to captions; their ids are counted.

    Args:
        images: the folder that the names are relative to.
        splits: from file names to splits; None: the captions have no splits.
    """
    return [
        ImageRecord(images / name, name, index, (splits or {}).get(name, ""), pack_sentences(image_captions))
        for index, (name, image_captions) in enumerate(captions.items())
    ]


def parse_split(name: Any, where: str) -> str:
    """Return the split that a file calls `name`. Raises InputError, with `where`, if it is unknown."""
    split = SPLIT_NAMES.get(name, name) if isinstance(name, str) else name
    if split not in SPLITS:
        raise InputError(f"{where}: unknown split {name!r}, not one of {' '.join((*SPLITS, *SPLIT_NAMES))}")
    return split


def require_type(value: Any, kind: type | tuple[type, ...]) -> Any:
    """Return a value unchanged. Raises TypeError if it is of another type."""
    if not isinstance(value, kind):
        raise TypeError
    return value


def require_words(value: Any) -> list[str]:
    """Return a list of words without the empty ones. Raises TypeError for anything else."""
    return [word for word in require_type(value, list) if require_type(word, str)]


def validate_objects(value: Any, where: str) -> list[dict[str, Any]]:
    """Return a list of objects with "words", a "box" and optionally a "score" unchanged.

    Raises InputError, with `where`, for boxes in pixels, TypeError or KeyError for anything else. Boxes may exceed the
    photo a little, as a detector's do.
    """
    for item in require_type(value, list):
        box = item["box"]
        if not require_words(item["words"]) or len(box) != 4 or not math.isfinite(item.get("score", 1.0)):
            raise TypeError
        if not all(-1 <= require_type(edge, (int, float)) <= 2 for edge in box):
            raise InputError(f"{where}: a box is left, top, right, bottom in fractions of the photo's sides, not {box}")
    return value
