"""Objects in photos, from a detector's results or from COCO's annotations, given to image records.

A record's objects have "words", which name them, and a "box" [left, top, right, bottom] in fractions of the photo's
sides; those of a detector have its "score" as well.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torchvision.models.detection import FasterRCNN_ResNet50_FPN_V2_Weights
from tqdm import tqdm

from preparation.images import photo_size
from preparation.json_stream import is_json_list, iter_json_list
from preparation.records import ImageRecord, require_type
from preparation.storage import open_images
from text.tokenizer import tokenize
from utils import InputError


class PixelObject(NamedTuple):
    """An object of a photo, its box in pixels."""

    image: int | str  # id or file name of the photo
    words: list[str]  # its category
    box: list[float]  # left, top, right, bottom
    score: float | None  # of a detector


class ObjectFile(NamedTuple):
    """The objects of a file, by ids or by file names of photos, and the photos' sizes (width, height) where known."""

    objects: dict[int | str, list[PixelObject]]
    sizes: dict[int | str, tuple[int, int]]


def read_objects(path: Path) -> ObjectFile:
    """Read COCO's detection results or its annotations (instances_train2014.json), recognized by their content.

    Results are a list of {"image_id", or "image" or "file_name", "bbox": [left, top, width, height] in pixels,
    "category" or COCO's "category_id", "score"}. Annotations of crowds are left out. Raises InputError where the file
    is missing or has another form.
    """
    if not path.is_file():
        raise InputError(f"--objects {path}: no such file")
    is_results = is_json_list(path)
    sizes, count = {}, 0
    objects: dict[int | str, list[PixelObject]] = {}
    try:
        if is_results:
            names = dict(enumerate(FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1.meta["categories"]))
            found = (_result(item, names) for item in iter_json_list(path))
        else:
            names = {
                require_type(item["id"], int): require_type(item["name"], str)
                for item in iter_json_list(path, "categories")
            }
            for image in iter_json_list(path, "images"):
                size = (require_type(image["width"], int), require_type(image["height"], int))
                sizes[require_type(image["id"], (int, str))] = size
            found = _annotations(path, names)
        for item in found:
            objects.setdefault(item.image, []).append(item)
            count += 1
    except KeyError as error:
        raise InputError(f"--objects {path}: no key {error} after {count} objects, are these COCO's?") from None
    except (TypeError, AttributeError, IndexError):
        raise InputError(f"--objects {path}: another form after {count} objects, are these COCO's?") from None
    if not objects:
        raise InputError(f"--objects {path}: holds no objects")
    return ObjectFile(objects, sizes)


def _result(item: dict[str, Any], names: dict[int, str]) -> PixelObject:
    """One result of a detector; KeyError or TypeError where it has another form."""
    image = next((item[key] for key in ("image", "file_name") if key in item), None)
    image = require_type(item["image_id"] if image is None else image, (int, str))
    name = require_type(item["category"], str) if "category" in item else names[item["category_id"]]
    return PixelObject(image, _words(name), _edges(item["bbox"]), _number(item["score"]))


def _annotations(path: Path, names: dict[int, str]) -> Iterator[PixelObject]:
    """COCO's annotations, but those of crowds; KeyError or TypeError where one has another form."""
    for item in iter_json_list(path, "annotations"):
        if not item.get("iscrowd"):
            image = require_type(item["image_id"], (int, str))
            yield PixelObject(image, _words(names[item["category_id"]]), _edges(item["bbox"]), None)


def _words(category: str) -> list[str]:
    return tokenize(category) or [category]


def _number(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(require_type(value, (int, float))):
        raise TypeError
    return value


def _edges(box: Any) -> list[float]:
    """left, top, right, bottom of a box of left, top, width, height."""
    if len(require_type(box, list)) != 4:
        raise TypeError
    left, top, width, height = map(_number, box)
    return [left, top, left + width, top + height]


def add_objects(records: Sequence[ImageRecord], path: Path) -> list[ImageRecord]:
    """The records with the objects of a file, by descending score, clipped to their photos; prints how many.

    Photos are found by their names, with or without folders, or by their ids. Raises InputError where the file has
    no object of any of them, and as `read_objects`.
    """
    found, added, counts = read_objects(path), [], Counter()
    for record in tqdm(records, desc="objects", unit="photo"):
        kept = objects = []
        names = (record.name, Path(record.name).name, record.image_id)
        for name in [name for name in names if name in found.objects][:1]:
            size = found.sizes.get(name) or _size(record)
            objects = [_in_fractions(item, size) for item in found.objects[name]]
            kept = sorted((item for item in objects if item), key=lambda item: -item.get("score", 0.0))
        counts.update(objects=len(kept), outside=len(objects) - len(kept), photos=bool(kept))
        added.append(replace(record, objects=kept))
    if not counts["objects"]:
        raise InputError(f"--objects {path}: has no object of the {len(records)} photos, such as {records[0].name}")
    without = len(records) - counts["photos"]
    print(f"{counts['objects']} objects in {counts['photos']} photos, {without} photos have none")
    if counts["outside"]:
        print(f"{counts['outside']} objects lie outside of their photo and are left out")
    return added


def _size(record: ImageRecord) -> tuple[int, int] | None:
    """Width and height of a record's photo; None where it is unusable, which writing the folder reports."""
    try:
        if record.row < 0:
            return photo_size(record.path)
        with open_images(record.path) as images:
            return images.shape[3], images.shape[2]
    except (InputError, OSError):
        return None


def _in_fractions(item: PixelObject, size: tuple[int, int] | None) -> dict[str, Any] | None:
    """A record's object; None where it lies outside of a photo of this size, or the size is not known."""
    if size is None:
        return None
    box = [round(min(1.0, max(0.0, edge / size[i % 2])), 4) for i, edge in enumerate(item.box)]
    if box[0] >= box[2] or box[1] >= box[3]:
        return None
    score = {} if item.score is None else {"score": item.score}
    return {"words": item.words, "box": box, **score}
