"""All caption formats: readers of files and folders into image records, detection by content, random splits."""

import codecs
import csv
import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from preparation.images import PHOTO_SUFFIXES
from preparation.json_stream import iter_json_list
from preparation.records import (
    ImageRecord,
    pack_captions,
    pack_sentences,
    parse_split,
    records_of,
    require_type,
    require_words,
    validate_objects,
)
from preparation.storage import SPLITS
from preparation.tutorial_format import read_tutorial
from utils import InputError

COLUMNS = {"file": "image", "filename": "image", "image_name": "image", "comment": "caption"}  # other names in a CSV
SPLIT_LISTS = {"train": "trainImages", "val": "devImages", "test": "testImages"}  # Flickr_8k.trainImages.txt

# ------------------------------------------------------------------------------------------------ text files


def read_lines(path: Path, newline: str | None = None) -> list[str]:
    """Read the lines of a UTF-8 file; `newline` is passed to `open`. Raises InputError for another encoding."""
    try:
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            return file.read().split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file in UTF-8, convert it: {error}") from None


def match_lines(path: Path, lines: list[str], pattern: str, form: str) -> Iterator[re.Match[str]]:
    """Yield the full match of each line that is not blank. Raises InputError, with `form`, for other lines."""
    for line_number, line in enumerate(lines, start=1):
        if line.strip():
            match = re.fullmatch(pattern, line)
            if not match:
                raise InputError(f"{path}, line {line_number}: not {form}")
            yield match


def read_csv(path: Path, images: Path) -> list[ImageRecord]:
    """Read a CSV with the columns image,caption (Kaggle's captions.txt) or file,caption,split, in any order.

    Raises InputError with the number of the first wrong line.
    """
    captions, splits = {}, {}
    lines = read_lines(path, newline="")  # unchanged: csv handles line ends within quotes
    rows = csv.reader((f"{line}\n" for line in lines), delimiter=max(",;\t", key=lines[0].count), strict=True)
    try:
        columns = [COLUMNS.get(name, name) for name in map(str.strip, map(str.lower, next(rows, [])))]
        if not {"image", "caption"} <= set(columns):
            raise InputError(
                f"{path} starts with {lines[0].strip()[:60]!r}: neither a CSV whose first line is image,caption or "
                f"file,caption,split nor another known format"
            )
        for fields in filter(None, rows):
            where = f"{path}, line {rows.line_num}"
            if len(fields) > len(columns):
                raise InputError(f"{where}: a caption with commas must be in quotes")
            row = dict(zip(columns, map(str.strip, fields), strict=False))
            image = row.get("image")
            if not image or not row.get("caption"):
                raise InputError(f"{where}: no {'caption' if image else 'image'}")
            captions.setdefault(image, []).append(row["caption"])
            if "split" in columns:
                split = parse_split(row.get("split", ""), where)
                if splits.setdefault(image, split) != split:
                    raise InputError(f"{where}: {image} is in {splits[image]} and in {split}")
    except csv.Error as error:
        raise InputError(f"{path} is not a CSV: {error}") from None
    return records_of(captions, images, splits)


def read_flickr30k(path: Path, images: Path) -> list[ImageRecord]:
    """Read Flickr30k's results.csv: image_name| comment_number| comment, without quotes.

    Raises InputError with the number of the first wrong line.
    """
    captions = {}
    lines = [line.strip() for line in read_lines(path)]
    lines[0] = ""  # the header
    pattern = r"([^|]+)\|\s*\d+\s*[|\s]\s*(.*)"  # one line of the published file lacks its second bar
    for match in match_lines(path, lines, pattern, "image_name| comment_number| comment"):
        captions.setdefault(match[1].strip(), []).append(match[2])
    return records_of(captions, images)


def read_token(path: Path, images: Path) -> list[ImageRecord]:
    """Read Flickr8k.token.txt or Flickr30k's token file: name#number, a tab, the caption.

    Flickr8k's split lists beside it, such as Flickr_8k.trainImages.txt, give the splits. Raises InputError for a wrong
    line and for a list that is missing or contradicts another.
    """
    captions = {}
    form = "an image's name, #, a number, a tab and a caption"
    for match in match_lines(path, read_lines(path), r"(.+)#\d+\t(.*)", form):
        captions.setdefault(match[1], []).append(match[2])
    lists = {split: path.with_name(f"Flickr_8k.{name}.txt") for split, name in SPLIT_LISTS.items()}
    missing = [file.name for file in lists.values() if not file.is_file()]
    if len(missing) == len(lists):
        return records_of(captions, images)
    if missing:
        raise InputError(f"{path} has split lists beside it, but no {missing[0]}")
    splits = {}
    for split, file in lists.items():
        for name in filter(None, map(str.strip, read_lines(file))):
            if splits.setdefault(name, split) != split:
                raise InputError(f"{file}: {name} is also in the list of {splits[name]}")
    if unlisted := captions.keys() - splits.keys():
        print(f"{len(unlisted)} images are in no split list and are left out, such as {min(unlisted)}")
    return records_of({name: captions.get(name, []) for name in splits}, images, splits)


# ------------------------------------------------------------------------------------------------ JSON


def read_karpathy(path: Path, images: Path) -> list[ImageRecord]:
    """Read Karpathy's JSON (dataset_flickr8k.json, dataset_flickr30k.json, dataset_coco.json).

    Raises InputError if its format is another.
    """
    records = []
    try:
        for index, image in enumerate(iter_json_list(path, "images")):
            records.append(_karpathy_record(image, index, path, images))
    except KeyError as error:
        raise InputError(f"{path}: no key {error} in images[{len(records)}], is this Karpathy's JSON?") from None
    except (TypeError, AttributeError, OverflowError):
        raise InputError(f"{path}: images[{len(records)}] has an unexpected format, is this Karpathy's JSON?") from None
    return records


def _karpathy_record(image: Any, index: int, path: Path, images: Path) -> ImageRecord:
    """Make a record of an image. Raises KeyError, TypeError or AttributeError for another format."""
    name = require_type(image["filename"], str)
    if image.get("filepath"):
        name = f"{require_type(image['filepath'], str)}/{name}"
    captions = [
        {"words": require_words(sentence["tokens"]), "raw": require_type(sentence["raw"], str)}
        for sentence in image["sentences"]
    ]
    image_id = require_type(image.get("cocoid", image.get("imgid", index)), (int, str))
    split = parse_split(image["split"], f"{path}: {name}")
    packed = pack_captions([caption for caption in captions if caption["words"]])
    objects = validate_objects(image["objects"], f"{path}: {name}") if "objects" in image else None
    has_own_id = "cocoid" in image or "imgid" in image
    return ImageRecord(images / name, name, image_id, split, packed, objects, has_own_id=has_own_id)


def read_coco(paths: list[Path], images: Path) -> list[ImageRecord]:
    """Read COCO's files, such as captions_train2014.json; the names of several files give their splits.

    Raises InputError if a file has another format, or captions of images that it does not list.
    """
    records = []
    for path in paths:
        split = next((split for split in SPLITS if split in path.stem), "") if len(paths) > 1 else ""
        if len(paths) > 1 and not split:
            raise InputError(f"{path}: the name of one of several files must contain its split: {', '.join(SPLITS)}")
        records += _read_coco_file(path, images, split)
    return records


def _read_coco_file(path: Path, images: Path, split: str) -> list[ImageRecord]:
    """Read one of COCO's files, whose images all belong to `split`; its photos may be in a folder train2014."""
    captions, records = {}, []
    folder = path.stem.removeprefix("captions_")  # train2014
    prefix = f"{folder}/" if (images / folder).is_dir() else ""
    try:
        for annotation in iter_json_list(path, "annotations"):
            captions.setdefault(annotation["image_id"], []).append(require_type(annotation["caption"], str))
        for image in iter_json_list(path, "images"):
            image_id, name = require_type(image["id"], (int, str)), prefix + require_type(image["file_name"], str)
            packed = pack_sentences(captions.pop(image_id, []))
            records.append(ImageRecord(images / name, name, image_id, split, packed, has_own_id=True))
    except KeyError as error:
        raise InputError(f"{path}: no key {error} after {len(records)} images, is this COCO's JSON?") from None
    except (TypeError, AttributeError):
        raise InputError(f"{path}: unexpected format after {len(records)} images, is this COCO's JSON?") from None
    if captions:
        raise InputError(
            f"{path}: {len(captions)} images have captions but are not listed under images, such as image_id "
            f"{next(iter(captions))!r}"
        )
    return records


# ------------------------------------------------------------------------------------------------ folders


def read_folder(path: Path, _: Path) -> list[ImageRecord]:
    """Read a folder and its subfolders: photos with captions beside them, dog.jpg and dog.txt, one caption per line.

    Hidden files and folders are skipped. Raises InputError if there is no photo, or if a name is not UTF-8.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file())
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    texts = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
    captions, unpaired = {}, set(texts.values())
    for file in files:
        if file.suffix.lower() in PHOTO_SUFFIXES:
            name, text = file.relative_to(path).as_posix(), texts.get(file.with_suffix(""))
            try:
                name.encode()
            except UnicodeError:
                raise InputError(f"{name!r}: its name is not UTF-8, rename it") from None
            captions[name] = [line for line in read_lines(text) if line.strip()] if text else []
            unpaired.discard(text)
    if not captions:
        raise InputError(f"{path} has no photos ({' '.join(PHOTO_SUFFIXES)})")
    if unpaired:
        print(f"{len(unpaired)} .txt files have no photo beside them, such as {min(unpaired).name!r}")
    return records_of(captions, path)


# ------------------------------------------------------------------------------------------------ any format

READERS = {
    "karpathy": read_karpathy,
    "coco": read_coco,
    "csv": read_csv,
    "flickr30k": read_flickr30k,
    "token": read_token,
    "folder": read_folder,
    "tutorial": read_tutorial,
}
FORMATS = ("auto", *READERS)


def detect_format(path: Path) -> str:
    """Detect the format of captions by their content; returns a key of READERS."""
    if path.is_dir():
        return "tutorial" if any(path.glob("WORDMAP_*.json")) else "folder"
    with open(path, "rb") as file:
        start = file.read(2**16).removeprefix(codecs.BOM_UTF8).lstrip()
    if start[:1] in (b"{", b"["):
        has_coco_keys = b'"file_name"' in start or b'"annotations"' in start
        return "coco" if has_coco_keys and b'"sentences"' not in start else "karpathy"
    first = start.split(b"\n")[0]
    if re.match(rb".+#\d+\t", first):
        return "token"
    return "flickr30k" if first.startswith(b"image_name|") else "csv"


def read_records(captions: Sequence[str], images: str, kind: str) -> tuple[list[ImageRecord], str]:
    """Read captions of any format; returns the records, with or without splits, and the format.

    Args:
        captions: paths of files, or of one folder.
        images: folder of the photos; unused if `captions` is a folder.
        kind: a key of READERS, or auto to detect it.

    Raises InputError if the paths do not fit the format, or if the captions cannot be read.
    """
    paths, shown = [Path(path) for path in captions], f"--captions {' '.join(captions)}"
    if kind == "auto":
        kind = detect_format(paths[0])
    if paths[0].is_dir() != (kind in ("folder", "tutorial")):
        found, taken = ("a folder", "a file") if paths[0].is_dir() else ("a file", "a folder")
        raise InputError(f"{shown} is {found}, but --format {kind} takes {taken}")
    if len(paths) > 1 and kind != "coco":
        raise InputError(f"{shown}: --format {kind} takes one file, only coco takes several")
    records = READERS[kind](paths if kind == "coco" else paths[0], Path(images))
    if not records:
        raise InputError(f"{shown} names no images")
    name, count = Counter(record.name for record in records).most_common(1)[0]
    if count > 1:
        raise InputError(f"{shown} names {name} as {count} images")
    return records, kind


def random_split(records: Sequence[ImageRecord], seed: int) -> list[ImageRecord]:
    """Assign a tenth of the images, at least one, to each of val and test at random, and the rest to train."""
    indices = list(range(len(records)))
    random.Random(seed).shuffle(indices)
    tenth = math.ceil(len(records) / 10)
    splits = dict.fromkeys(indices, "train")
    if len(records) > 1:
        splits |= dict.fromkeys(indices[:tenth], "val")
    if len(records) > 2:
        splits |= dict.fromkeys(indices[tenth : 2 * tenth], "test")
    return [replace(record, split=splits[i]) for i, record in enumerate(records)]
