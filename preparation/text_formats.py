"""Caption formats in text files: CSV, Flickr30k's results.csv and Flickr8k's token file with its split lists."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path

from preparation.records import ImageRecord, parse_split, records_of
from utils import InputError

COLUMNS = {"file": "image", "filename": "image", "image_name": "image", "comment": "caption"}  # other names in a CSV
SPLIT_LISTS = {"train": "trainImages", "val": "devImages", "test": "testImages"}  # Flickr_8k.trainImages.txt


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
        for fields in rows:
            if not fields:
                continue
            where = f"{path}, line {rows.line_num}"
            if len(fields) > len(columns):
                raise InputError(f"{where}: a caption with commas must be in quotes")
            row = dict(zip(columns, map(str.strip, fields), strict=False))
            image = row.get("image")
            if not image:
                raise InputError(f"{where}: no image is named")
            if not row.get("caption"):
                raise InputError(f"{where}: no caption for {image!r}")
            captions.setdefault(image, []).append(row["caption"])
            if "split" in columns:
                split = parse_split(row.get("split", ""), path, f"line {rows.line_num}, {image}")
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
    splits = read_split_lists(path.parent)
    if splits is None:
        return records_of(captions, images)
    if unlisted := captions.keys() - splits.keys():
        print(f"{len(unlisted)} images are in no split list and are left out, such as {min(unlisted)}")
    return records_of({name: captions.get(name, []) for name in splits}, images, splits)


def read_split_lists(folder: Path) -> dict[str, str] | None:
    """Read the split of each image from Flickr8k's three lists of file names; None if a folder has no list."""
    paths = {split: folder / f"Flickr_8k.{name}.txt" for split, name in SPLIT_LISTS.items()}
    found = [path for path in paths.values() if path.is_file()]
    if not found:
        return None
    if missing := [path for path in paths.values() if path not in found]:
        raise InputError(f"{found[0]} has no {missing[0].name} beside it")
    splits = {}
    for split, path in paths.items():
        for name in filter(None, map(str.strip, read_lines(path))):
            if splits.setdefault(name, split) != split:
                raise InputError(f"{path}: {name} is also in the list of {splits[name]}")
    return splits
