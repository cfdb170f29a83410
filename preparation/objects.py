"""Objects in photos, read from a detector's results or from COCO's annotations and added to image records.

An object of a record has "words", which name it, a "box" [left, top, right, bottom] in fractions of the photo's sides,
and the "score" of the detector, which is 1 for annotations.
"""

import codecs
import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from common.files import did_you_mean
from preparation.json_stream import iter_json_lists
from preparation.photo_index import PhotoIndex
from preparation.records import ImageRecord, require_type, validate_objects
from text.nouns import COCO_CATEGORIES
from text.tokenizer import tokenize
from utils import InputError

MAX_OBJECTS = 100  # of a photo, those of the highest scores: the maximum of region features (Anderson et al., 2018)
LISTS = ("images", "annotations", "categories")  # of COCO's annotations


class ObjectFile:
    """The objects in a file of one of three forms, recognized by its content.

    - COCO's results: a list of {"image_id", or "image" or "file_name", "bbox": [left, top, width, height] in pixels,
      "category" or COCO's "category_id", "score"}.
    - COCO's annotations (instances_train2014.json): lists of photos, categories and objects. Crowds are left out.
    - Karpathy's JSON, if its images have "objects" with "words" and a "box", as in the JSON of the shapes.

    Attributes:
        by_photo: objects of each photo, six numbers for each: its category (an index of `words`), score, left, top,
            width and height. Millions of Python objects would take gigabytes.
        words: those of each category.
        sizes: width and height of photos, if the file has them.
        names: file names of photos, if the file has them.

    The keys of photos are their file names or ids. Raises InputError if the file is missing or has another format.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self.by_photo: dict[str, array] = {}
        self.sizes: dict[str, tuple[int, int]] = {}
        self.names: dict[str, str] = {}
        self._categories: dict[int | str, int] = {}  # numbers of categories, by a name or an id of the file
        category_names: dict[int, str] = {}  # by the ids of the file
        is_karpathy = False
        with open(path, "rb") as file:
            is_results = file.read(2**10).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
        items = iter_json_lists(path, () if is_results else LISTS)
        try:
            for key, item in tqdm(items, desc=f"objects of {path.name}", unit="object"):
                if key == "images" and "filename" in item:
                    is_karpathy = True
                    self._read_karpathy_image(item)
                elif key == "images":
                    self._read_photo(item)
                elif key == "categories":
                    category_names[item["id"]] = require_type(item["name"], str)
                elif not item.get("iscrowd"):
                    photo = item.get("image") or item.get("file_name") or item["image_id"]
                    category = require_type(item.get("category") or item["category_id"], (int, str))
                    self._append(_photo_key(photo), category, item["score"] if is_results else 1.0, *item["bbox"])
        except KeyError as error:
            if not is_karpathy or error.args[0] not in LISTS:
                raise InputError(
                    f"--objects {path}: no key {error} after {self.count} objects, are these COCO's?"
                ) from None
        except (TypeError, AttributeError, OverflowError):
            raise InputError(
                f"--objects {path}: unexpected format after {self.count} objects, are these COCO's?"
            ) from None
        if is_results:
            category_names = {i: name for i, name in enumerate(COCO_CATEGORIES.split(", "), start=1) if name}
        self.words = [self._words_of(category, category_names) for category in self._categories]

    def _append(self, photo: str, category: int | str, score: float, *box: float) -> None:
        """Add an object. Raises TypeError or OverflowError if score and box are not five finite numbers."""
        if len(box) != 4 or not all(map(math.isfinite, (score, *box))):
            raise TypeError
        number = self._categories.setdefault(category, len(self._categories))
        self.by_photo.setdefault(photo, array("d")).extend([number, score, *box])
        self.count += 1

    def _read_photo(self, item: dict[str, Any]) -> None:
        """Store size and name of a photo of COCO's annotations."""
        key = _photo_key(item["id"])
        if "width" in item and "height" in item:
            self.sizes[key] = (require_type(item["width"], int), require_type(item["height"], int))
            if min(self.sizes[key]) < 1:
                raise TypeError
        if "file_name" in item:
            self.names[key] = require_type(item["file_name"], str)

    def _read_karpathy_image(self, item: dict[str, Any]) -> None:
        """Add the objects of an image of Karpathy's JSON."""
        photo = str(PurePosixPath(item.get("filepath") or "", item["filename"]))
        self.sizes[photo] = (1, 1)  # boxes are in fractions of the sides
        for each in validate_objects(item.get("objects", []), f"--objects {self.path}: {photo}"):
            left, top, right, bottom = each["box"]
            self._append(photo, " ".join(each["words"]), each.get("score", 1.0), left, top, right - left, bottom - top)

    def _words_of(self, category: int | str, names: dict[int, str]) -> list[str]:
        """Return the words of a category. Raises InputError for an id without a name."""
        name = category if isinstance(category, str) else names.get(category)
        if name is None:
            raise InputError(
                f'--objects {self.path}: unknown category_id {category}: give the names of categories, as "category"'
            )
        return tokenize(name) or [name]


def _photo_key(value: Any) -> str:
    """Return a file name, or an id as text, the same for 7, 7.0 and "7"."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(require_type(value, (int, str)))


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
    file, counts = ObjectFile(path), Counter()
    matches = PhotoIndex(records).match({photo: file.names.get(photo, photo) for photo in file.by_photo})
    added = []
    for i, record in enumerate(tqdm(records, desc="boxes", unit="photo")):
        placed = []
        for photo in matches.get(i, []):
            numbers = file.by_photo.pop(photo)
            if size := file.sizes.get(photo) or record.photo_size():
                placed += [_in_fractions(numbers[k : k + 6], file.words, size) for k in range(0, len(numbers), 6)]
        kept, inside = _best_inside(placed)
        counts["outside of their photo"] += len(placed) - inside
        counts[f"beyond the best {MAX_OBJECTS} of a photo"] += inside - len(kept)
        counts["objects"] += len(kept)
        counts["photos"] += bool(kept)
        added.append(replace(record, objects=kept))
    counts["of other photos"] = sum(len(numbers) // 6 for numbers in file.by_photo.values())
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
