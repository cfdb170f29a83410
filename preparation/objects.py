"""Objects in photos, from a detector's results or from COCO's annotations, given to image records.

A record's objects have "words", which name them, a "box" [left, top, right, bottom] in fractions of the photo's sides,
and the "score" of the detector; that of annotations is 1.
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
from preparation.photo_index import PhotoIndex, best_matches, record_size
from preparation.records import ImageRecord, require_type
from text.nouns import COCO_CATEGORIES
from text.tokenizer import tokenize
from utils import InputError

MIN_SCORE = 0.3  # of a detected object that a noun may name; those less certain are often wrong
MAX_OBJECTS = 100  # of a photo, those of the highest scores: what region features have at most (Anderson et al., 2018)


class DetectedObject(NamedTuple):
    """An object of a photo, as a file has it."""

    photo: str  # what names the photo: a file name, or its id
    category: int | str  # a name, or an id of `ObjectFile.categories`
    box: list[float]  # left, top, width, height in pixels
    score: float


class ObjectFile:
    """A file of objects, recognized by its content: a detector's results or annotations, as COCO has them.

    Results are a list of {"image_id", or "image" or "file_name", "bbox": [left, top, width, height] in pixels,
    "category" or COCO's "category_id", "score"}. Annotations (instances_train2014.json) have photos, categories and
    objects in lists of their own; those of crowds are left out. Karpathy JSON may have the objects of each of its
    images, as that of the shapes does, with "words" and a "box" as a record's have. `categories` and the `sizes`
    (width, height) of photos are complete when all objects are read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.categories: dict[int, str] = {}
        self.sizes: dict[str, tuple[int, int]] = {}
        self.names: dict[str, str] = {}  # of photos, by their ids

    def __iter__(self) -> Iterator[DetectedObject]:
        """Yield the objects; InputError where the file is missing or has another form."""
        with open(self.path, "rb") as file:
            is_results = file.read(2**10).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
        count, is_karpathy = 0, False
        try:
            if is_results:
                ids = enumerate(COCO_CATEGORIES.split(", "), start=1)
                self.categories = {number: name for number, name in ids if name}
            for key, item in iter_json_lists(self.path, () if is_results else ("images", "annotations", "categories")):
                if key == "images" and "filename" in item:
                    is_karpathy = True
                    for each in self._own_objects(item):
                        yield each
                        count += 1
                elif key == "images":
                    self._read_photo(item)
                elif key == "categories":
                    self.categories[require_type(item["id"], int)] = _name(item["name"])
                elif not item.get("iscrowd"):
                    yield _detected_object(item, has_score=is_results)
                    count += 1
        except KeyError as error:
            if is_karpathy and error.args[0] in ("annotations", "categories"):
                return
            raise InputError(
                f"--objects {self.path}: no key {error} after {count} objects, are these COCO's?"
            ) from None
        except (TypeError, AttributeError, OverflowError):
            raise InputError(f"--objects {self.path}: another form after {count} objects, are these COCO's?") from None

    def _read_photo(self, item: dict[str, Any]) -> None:
        """Take in what annotations say of a photo."""
        key = _photo_key(item["id"])
        if "width" in item and "height" in item:
            width, height = item["width"], item["height"]
            if min(require_type(width, int), require_type(height, int)) < 1:
                raise TypeError
            self.sizes[key] = (width, height)
        if "file_name" in item:
            self.names[key] = _name(item["file_name"])

    def _own_objects(self, item: dict[str, Any]) -> Iterator[DetectedObject]:
        """The objects of an image of Karpathy JSON."""
        photo = str(PurePosixPath(item.get("filepath") or "", _name(item["filename"])))
        self.sizes[photo] = (1, 1)  # boxes are in fractions of the sides
        for each in require_type(item.get("objects", []), list):
            left, top, right, bottom = _four_numbers(each["box"])
            name = _name(" ".join(require_type(each["words"], list)))
            yield DetectedObject(photo, name, [left, top, right - left, bottom - top], _number(each.get("score", 1.0)))

    def category(self, category: int | str) -> list[str]:
        """The words of a category. Raises InputError for an id without a name."""
        name = category if isinstance(category, str) else self.categories.get(category)
        if name is None:
            known = f"{min(self.categories)} to {max(self.categories)}" if self.categories else "not in the file"
            raise InputError(
                f"--objects {self.path}: unknown category_id {category}, those of COCO are {known} with gaps: give "
                f'names instead, as "category"'
            )
        return tokenize(name) or [name]


def _detected_object(item: dict[str, Any], has_score: bool) -> DetectedObject:
    """One object of a file; KeyError or TypeError where it has another form."""
    photo = next((item[key] for key in ("image", "file_name") if item.get(key) is not None), None)
    if photo is None:
        photo = item["image_id"]
    category = _name(item["category"]) if item.get("category") is not None else require_type(item["category_id"], int)
    return DetectedObject(
        _photo_key(photo), category, _four_numbers(item["bbox"]), _number(item["score"]) if has_score else 1.0
    )


def _four_numbers(value: Any) -> list[float]:
    if len(require_type(value, list)) != 4:
        raise TypeError
    return [_number(number) for number in value]


def _photo_key(value: Any) -> str:
    """A file name, or an id as text: 7, 7.0 and "7" are the same."""
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
    """Raise InputError where there is no file of objects, with a similar name if there is one."""
    if not Path(path).is_file():
        raise InputError(f"--objects {path}: no such file{did_you_mean(path)}")


def add_objects(records: Sequence[ImageRecord], path: Path) -> list[ImageRecord]:
    """The records with the objects of a file, by descending score, clipped to their photos; prints how many.

    Raises InputError where records have objects already, and as `ObjectFile`.
    """
    if any(record.objects for record in records):
        raise InputError(f"--objects {path}: the captions file has objects of its own, leave --objects out")
    file, index, categories, counts = ObjectFile(path), PhotoIndex(records), {}, Counter()
    by_photo: dict[str, array] = {}  # six numbers of each object: of Python's own, millions would take gigabytes
    for item in tqdm(file, desc=f"objects of {path.name}", unit="object"):
        number = categories.setdefault(item.category, len(categories))
        by_photo.setdefault(item.photo, array("d")).extend([number, item.score, *item.box])
    words = [file.category(category) for category in categories]
    photos: dict[int, dict[str, float]] = {}  # by the record's index, those of the file with how well they match
    for photo in by_photo:
        if match := index.find(file.names.get(photo, photo)):
            photos.setdefault(match[0], {})[photo] = match[1]
    added = []
    for i, record in enumerate(tqdm(records, desc="boxes", unit="photo")):
        placed = []
        for photo in best_matches(photos.get(i, {})):
            numbers = by_photo.pop(photo)
            if size := file.sizes.get(photo) or record_size(record):
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
    """What a `preparation.detection.Detector` found in a photo (width, height), as `add_objects` gives it."""
    words = [tokenize(item["category"]) or [item["category"]] for item in detections]
    numbers = [[i, item["score"], *item["bbox"]] for i, item in enumerate(detections)]
    return _best_inside([_in_fractions(each, words, size) for each in numbers])[0]


def _best_inside(placed: Sequence[dict[str, Any] | None]) -> tuple[list[dict[str, Any]], int]:
    """The best MAX_OBJECTS of a photo by descending score, without those outside, and how many are inside."""
    inside = sorted((item for item in placed if item), key=lambda item: -item["score"])
    return inside[:MAX_OBJECTS], len(inside)


def _in_fractions(numbers: Sequence[float], words: list[list[str]], size: tuple[int, int]) -> dict[str, Any] | None:
    """A record's object from its category, score and box in pixels; None where it lies outside of the photo."""
    category, score, left, top, width, height = numbers
    edges = (left / size[0], top / size[1], (left + width) / size[0], (top + height) / size[1])
    box = [round(min(1.0, max(0.0, edge)), 4) for edge in edges]
    if box[0] >= box[2] or box[1] >= box[3]:
        return None
    return {"words": words[int(category)], "box": box, "score": score}
