"""All caption formats: detection by content, reading any of them into image records, and random splits."""

import codecs
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from preparation.folder_formats import read_folder, read_tutorial
from preparation.json_formats import read_coco, read_karpathy
from preparation.records import ImageRecord
from preparation.text_formats import read_csv, read_flickr30k, read_token
from utils import InputError

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
    paths = [Path(path) for path in captions]
    for path in paths:
        if path.is_file() and not path.stat().st_size:
            raise InputError(f"--captions {path}: an empty file")
    if kind == "auto":
        kind = detect_format(paths[0])
    if paths[0].is_dir() != (kind in ("folder", "tutorial")):
        found, taken = ("a folder", "a file") if paths[0].is_dir() else ("a file", "a folder")
        raise InputError(f"--captions {paths[0]} is {found}, but --format {kind} takes {taken}")
    if len(paths) > 1 and kind != "coco":
        raise InputError(f"--captions {' '.join(captions)}: --format {kind} takes one file, only coco takes several")
    records = READERS[kind](paths if kind == "coco" else paths[0], Path(images))
    if not records:
        raise InputError(f"{' '.join(captions)} names no images")
    name, count = Counter(record.name for record in records).most_common(1)[0]
    if count > 1:
        raise InputError(f"{' '.join(captions)} names {name} as {count} images")
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
