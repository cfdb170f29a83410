"""Objects in photos, read from a detector's results or from COCO's annotations and added to image records.

An object of a record has "words", which name it, a "box" [left, top, right, bottom] in fractions of the photo's sides,
and the "score" of the detector, which is 1 for annotations.
"""

import codecs
import math
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from tqdm import tqdm

from common.files import did_you_mean
from preparation.json_stream import iter_json_lists
from preparation.photo_index import PhotoIndex
from preparation.records import ImageRecord, require_type
from text.nouns import COCO_CATEGORIES
from text.tokenizer import tokenize
from utils import InputError

MAX_OBJECTS = 100  # of a photo, those of the highest scores: the maximum of region features (Anderson et al., 2018)


class DetectedObject(NamedTuple):
    """An object of a photo in the form of a file."""

    photo: str  # file name or id of the photo
    category: int | str  # a name, or a key of `ObjectFile.categories`
    box: list[float]  # left, top, width, height in pixels
    score: float


class ObjectFile:
    """A file of objects in one of three forms, recognized by its content.

    - COCO's results: a list of {"image_id", or "image" or "file_name", "bbox": [left, top, width, height] in pixels,
      "category" or COCO's "category_id", "score"}.
    - COCO's annotations (instances_train2014.json): lists of photos, categories and objects. Crowds are left out.
    - Karpathy's JSON, if its images have "objects" with "words" and a "box", as in the JSON of the shapes.

    `categories`, and the `sizes` (width, height) and `names` of photos, are complete after the iteration.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.categories: dict[int, str] = {}
        self.sizes: dict[str, tuple[int, int]] = {}
        self.names: dict[str, str] = {}  # of photos, by their ids

    def __iter__(self) -> Iterator[DetectedObject]:
        """Yield the objects. Raises InputError if the file is missing or has another form."""
        count = 0
        try:
            for item in self._objects():
                yield item
                count += 1
        except KeyError as error:
            raise InputError(
                f"--objects {self.path}: no key {error} after {count} objects, are these COCO's?"
            ) from None
        except (TypeError, AttributeError, OverflowError):
            raise InputError(f"--objects {self.path}: another form after {count} objects, are these COCO's?") from None

    def _objects(self) -> Iterator[DetectedObject]:
        """Yield the objects. Raises KeyError, TypeError, AttributeError or OverflowError for another form."""
        with open(self.path, "rb") as file:
            is_results = file.read(2**10).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
        if is_results:
            ids = enumerate(COCO_CATEGORIES.split(", "), start=1)
            self.categories = {number: name for number, name in ids if name}
        is_karpathy = False
        try:
            for key, item in iter_json_lists(self.path, () if is_results else ("images", "annotations", "categories")):
                if key == "images" and "filename" in item:
                    is_karpathy = True
                    yield from self._objects_of_image(item)
                elif key == "images":
                    self._read_photo(item)
                elif key == "categories":
                    self.categories[require_type(item["id"], int)] = _name(item["name"])
                elif not item.get("iscrowd"):
                    yield _detected_object(item, has_score=is_results)
        except KeyError as error:
            if not is_karpathy or error.args[0] not in ("annotations", "categories"):
                raise

    def _read_photo(self, item: dict[str, Any]) -> None:
        """Store size and name of a photo of COCO's annotations."""
        key = _photo_key(item["id"])
        if "width" in item and "height" in item:
            width, height = item["width"], item["height"]
            if min(require_type(width, int), require_type(height, int)) < 1:
                raise TypeError
            self.sizes[key] = (width, height)
        if "file_name" in item:
            self.names[key] = _name(item["file_name"])

    def _objects_of_image(self, item: dict[str, Any]) -> Iterator[DetectedObject]:
        """Yield the objects of an image of Karpathy's JSON."""
        photo = str(PurePosixPath(item.get("filepath") or "", _name(item["filename"])))
        self.sizes[photo] = (1, 1)  # boxes are in fractions of the sides
        for each in require_type(item.get("objects", []), list):
            left, top, right, bottom = _four_numbers(each["box"])
            name = _name(" ".join(require_type(each["words"], list)))
            yield DetectedObject(photo, name, [left, top, right - left, bottom - top], _number(each.get("score", 1.0)))

    def category(self, category: int | str) -> list[str]:
        """Return the words of a category. Raises InputError for an id without a name."""
        name = category if isinstance(category, str) else self.categories.get(category)
        if name is None:
            known = f"{min(self.categories)} to {max(self.categories)}" if self.categories else "not in the file"
            raise InputError(
                f"--objects {self.path}: unknown category_id {category}, those of COCO are {known} with gaps: give "
                f'names instead, as "category"'
            )
        return tokenize(name) or [name]


def _detected_object(item: dict[str, Any], has_score: bool) -> DetectedObject:
    photo = next((item[key] for key in ("image", "file_name") if item.get(key) is not None), None)
    if photo is None:
        photo = item["image_id"]
    category = _name(item["category"]) if item.get("category") is not None else require_type(item["category_id"], int)
    score = _number(item["score"]) if has_score else 1.0
    return DetectedObject(_photo_key(photo), category, _four_numbers(item["bbox"]), score)


def _four_numbers(value: Any) -> list[float]:
    if len(require_type(value, list)) != 4:
        raise TypeError
    return [_number(number) for number in value]


def _photo_key(value: Any) -> str:
    """Return a file name, or an id as text, the same for 7, 7.0 and "7"."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or value == "":
        raise TypeError
    return str(require_type(value, (int, str)))


def _name(value: Any) -> str:
    if not require_type(value, str).strip():
        raise TypeError
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(require_type(value, (int, float))):
        raise TypeError
    return value


def require_objects_file(path: str) -> None:
    """Raise InputError if the file does not exist; the message suggests a similar name."""
    if not Path(path).is_file():
        raise InputError(f"--objects {path}: no such file{did_you_mean(path)}")


def add_objects(records: Sequence[ImageRecord], path: Path) -> list[ImageRecord]:
    """Return the records with the objects of a file, by descending score, clipped to their photos; print the counts.

    Raises InputError if records have objects already, and as `ObjectFile` does.
    """
    if any(record.objects for record in records):
        raise InputError(f"--objects {path}: the captions file has objects of its own, leave --objects out")
    file, categories, counts = ObjectFile(path), {}, Counter()
    by_photo: dict[str, array] = {}  # six numbers per object: millions of Python objects would take gigabytes
    for item in tqdm(file, desc=f"objects of {path.name}", unit="object"):
        number = categories.setdefault(item.category, len(categories))
        by_photo.setdefault(item.photo, array("d")).extend([number, item.score, *item.box])
    words = [file.category(category) for category in categories]
    matches = PhotoIndex(records).match({photo: file.names.get(photo, photo) for photo in by_photo})
    added = []
    for i, record in enumerate(tqdm(records, desc="boxes", unit="photo")):
        placed = []
        for photo in matches.get(i, []):
            numbers = by_photo.pop(photo)
            if size := file.sizes.get(photo) or record.photo_size():
                placed += [_in_fractions(numbers[k : k + 6], words, size) for k in range(0, len(numbers), 6)]
        kept, inside = _best_inside(placed)
        counts["outside of their photo"] += len(placed) - inside
        counts[f"beyond the best {MAX_OBJECTS} of a photo"] += inside - len(kept)
        counts["objects"] += len(kept)
        counts["photos"] += bool(kept)
        added.append(replace(record, objects=kept))
    counts["of other photos"] = sum(len(numbers) // 6 for numbers in by_photo.values())
    without = len(records) - counts["photos"]
    print(f"{counts.pop('objects')} objects in {counts.pop('photos')} photos, {without} photos have none")
    if left_out := [f"{count} {reason}" for reason, count in counts.items() if count]:
        print(f"objects left out: {', '.join(left_out)}")
    return added


def objects_of_detections(detections: Sequence[dict[str, Any]], size: tuple[int, int]) -> list[dict[str, Any]]:
    """Convert what a `preparation.detection.Detector` found in a photo (width, height) to the objects of a record."""
    words = [tokenize(item["category"]) or [item["category"]] for item in detections]
    numbers = [[i, item["score"], *item["bbox"]] for i, item in enumerate(detections)]
    return _best_inside([_in_fractions(each, words, size) for each in numbers])[0]


def _best_inside(placed: Sequence[dict[str, Any] | None]) -> tuple[list[dict[str, Any]], int]:
    """Return the best MAX_OBJECTS objects inside of a photo, by descending score, and how many are inside."""
    inside = sorted((item for item in placed if item), key=lambda item: -item["score"])
    return inside[:MAX_OBJECTS], len(inside)


def _in_fractions(numbers: Sequence[float], words: list[list[str]], size: tuple[int, int]) -> dict[str, Any] | None:
    """Make a record's object from category, score and box in pixels; None if it lies outside of the photo."""
    category, score, left, top, width, height = numbers
    edges = (left / size[0], top / size[1], (left + width) / size[0], (top + height) / size[1])
    box = [round(min(1.0, max(0.0, edge)), 4) for edge in edges]
    if box[0] >= box[2] or box[1] >= box[3]:
        return None
    return {"words": words[int(category)], "box": box, "score": score}
