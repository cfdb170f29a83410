"""Captions in the formats that people have, each read into a list of `ImageRecord`, told apart by their content."""

import codecs
import csv
import math
import random
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import h5py

from common.files import read_json
from preparation.storage import SPLITS
from text.tokenizer import tokenize
from text.vocabulary import SPECIAL_TOKENS
from utils import InputError

SPLIT_NAMES = {"restval": "train", "valid": "val", "validation": "val", "dev": "val"}  # and what else they are called
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
COLUMNS = {"file": "image", "filename": "image", "image_name": "image", "comment": "caption"}  # of a CSV


@dataclass(frozen=True)
class ImageRecord:
    """One image of a data set: where it is, which split it belongs to and what is said of it."""

    path: Path
    name: str  # as the captions spell it
    image_id: int | str
    split: str  # empty where the captions have no splits
    captions: list  # [{"words": [...], "raw": "..."}]
    objects: list = field(default_factory=list)  # [{"words": [...], "box": [left, top, right, bottom]}] where known
    row: int = -1  # of a prepared HDF5 file that `path` is, instead of a photo


def require_type(value, kind):
    """A value as it is; TypeError where it is of another type."""
    if not isinstance(value, kind):
        raise TypeError
    return value


def described(raw):
    """The captions in strings, without those that hold no word."""
    return [{"words": words, "raw": one.strip()} for one in raw if (words := tokenize(one))]


# --------------------------------------------------------------------------------------------------------- JSON


def read_karpathy(path, images):
    """Photos of Karpathy's JSON (dataset_flickr8k.json, dataset_flickr30k.json, dataset_coco.json)."""
    content, photos = read_json(path), []
    try:
        for number, image in enumerate(content["images"]):
            name = require_type(image["filename"], str)
            if image.get("filepath"):
                name = f"{require_type(image['filepath'], str)}/{name}"
            captions = [
                {"words": tokens(one["tokens"]), "raw": require_type(one["raw"], str)} for one in image["sentences"]
            ]
            image_id = require_type(image.get("cocoid", image.get("imgid", number)), (int, str))
            split, captions = split_name(image["split"], path, name), [one for one in captions if one["words"]]
            objects = validate_objects(image.get("objects", []))
            photos.append(ImageRecord(images / name, name, image_id, split, captions, objects))
    except KeyError as error:
        raise InputError(f"{path}: no key {error} in images[{len(photos)}], is this Karpathy's JSON?") from None
    except (TypeError, AttributeError):
        raise InputError(f"{path}: images[{len(photos)}] has another form, is this Karpathy's JSON?") from None
    return photos


def tokens(value):
    """A list of words as it is, without empty ones; TypeError for anything else."""
    return [word for word in require_type(value, list) if require_type(word, str)]


def validate_objects(value):
    """A list of objects with their words and box as it is; TypeError for anything else."""
    for one in value:
        sides = one["box"]
        if not tokens(one["words"]) or len(sides) != 4 or not all(isinstance(side, (int, float)) for side in sides):
            raise TypeError
    return value


def split_name(name, path, image):
    """One of SPLITS of what a file calls it."""
    split = SPLIT_NAMES.get(name, name) if isinstance(name, str) else name
    if split not in SPLITS:
        raise InputError(f"{path}: {image} has the split {name!r}, not one of {' '.join((*SPLITS, *SPLIT_NAMES))}")
    return split


def read_coco(paths, images):
    """Photos of COCO's own captions_train2014.json and the like; several files are a split each, by their names."""
    photos = []
    for path in paths:
        content, split, name, captions = read_json(path), "", None, {}
        if len(paths) > 1:
            split = next((split for split in SPLITS if split in path.stem), "")
            if not split:
                raise InputError(f"{path}: one of several files, its name must hold {', '.join(SPLITS)}")
        folder = path.stem.removeprefix("captions_")  # train2014
        inside = f"{folder}/" if (images / folder).is_dir() else ""
        try:
            for one in content["annotations"]:
                captions.setdefault(one["image_id"], []).append(require_type(one["caption"], str))
            for image in content["images"]:
                image_id, name = require_type(image["id"], (int, str)), inside + require_type(image["file_name"], str)
                photos.append(ImageRecord(images / name, name, image_id, split, described(captions.pop(image_id, []))))
        except KeyError as error:
            raise InputError(f"{path}: no key {error} after {name or 'its start'}, is this COCO's JSON?") from None
        except (TypeError, AttributeError):
            raise InputError(f"{path}: another form after {name or 'its start'}, is this COCO's JSON?") from None
        if captions:
            one = next(iter(captions))
            raise InputError(f"{path}: {len(captions)} images have captions only, such as image_id {one!r}")
    return photos


# ---------------------------------------------------------------------------------------------------- text files


def read_lines(path, newline=None):
    """The lines of a text file in UTF-8, `newline` as `open` takes it; InputError for another encoding."""
    try:
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            return file.read().split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text in UTF-8, save it as that: {error}") from None


def read_csv(path, images):
    """Photos of a CSV of image,caption (Kaggle's captions.txt) or one's own of file,caption,split."""
    captions, splits = {}, {}
    lines = read_lines(path, newline="")  # as they are: csv knows line ends within quotes
    try:
        rows = csv.reader((f"{line}\n" for line in lines), delimiter=max(",;\t", key=lines[0].count), strict=True)
        names = [COLUMNS.get(name, name) for name in map(str.strip, map(str.lower, next(rows, [])))]
        if not {"image", "caption"} <= set(names):
            raise InputError(
                f"{path} starts with {lines[0].strip()[:60]!r}: neither a CSV whose first line is image,caption or "
                f"file,caption,split nor another format that is known"
            )
        for fields in rows:
            if not fields:
                continue
            if len(fields) > len(names):
                raise InputError(f"{path}, line {rows.line_num}: a caption with commas must stand in quotes")
            row = dict(zip(names, map(str.strip, fields), strict=False))
            image = row.get("image")
            if not image:
                raise InputError(f"{path}, line {rows.line_num}: no image is named")
            if not row.get("caption"):
                raise InputError(f"{path}, line {rows.line_num}: no caption for {image!r}")
            captions.setdefault(image, []).append(row["caption"])
            if "split" in names:
                split = split_name(row.get("split", ""), path, f"line {rows.line_num}, {image}")
                if splits.setdefault(image, split) != split:
                    raise InputError(f"{path}, line {rows.line_num}: {image} is in {splits[image]} and in {split}")
    except csv.Error as error:
        raise InputError(f"{path} is not a CSV: {error}") from None
    return photos_of(captions, images, splits)


def read_flickr30k(path, images):
    """Photos of Flickr30k's results.csv: image_name| comment_number| comment, nothing in quotes."""
    captions = {}
    for number, line in enumerate(read_lines(path)[1:], start=2):
        if line.strip():
            # One line of the published file lacks its second bar.
            match = re.fullmatch(r"([^|]+)\|\s*\d+\s*[|\s]\s*(.*)", line.strip())
            if not match:
                raise InputError(f"{path}, line {number}: not image_name| comment_number| comment")
            captions.setdefault(match[1].strip(), []).append(match[2])
    return photos_of(captions, images)


def read_token(path, images):
    """Photos of Flickr8k.token.txt or Flickr30k's token file: name#number, a tab, the caption.

    Where Flickr8k's split lists lie beside it, Flickr_8k.trainImages.txt and so on, they say what belongs where.
    """
    captions = {}
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            match = re.fullmatch(r"(.+)#\d+\t(.*)", line)
            if not match:
                raise InputError(f"{path}, line {number}: not an image's name, #, a number, a tab and a caption")
            captions.setdefault(match[1], []).append(match[2])
    names = {"train": "trainImages", "val": "devImages", "test": "testImages"}
    lists = {split: path.with_name(f"Flickr_8k.{name}.txt") for split, name in names.items()}
    found = [one for one in lists.values() if one.is_file()]
    if not found:
        return photos_of(captions, images)
    if missing := [one for one in lists.values() if one not in found]:
        raise InputError(f"{found[0]} has no {missing[0].name} beside it")
    splits = {}
    for split, one in lists.items():
        for name in filter(None, map(str.strip, read_lines(one))):
            if splits.setdefault(name, split) != split:
                raise InputError(f"{one}: {name} is in the list of {splits[name]}, too")
    if left_out := captions.keys() - splits.keys():
        print(f"{len(left_out)} images are in none of the split lists and left out, such as {min(left_out)}")
    return photos_of({name: captions.get(name, []) for name in splits}, images, splits)


def photos_of(captions, images, splits=None):
    """Photos of a dictionary from names to captions, numbered in its order."""
    return [
        ImageRecord(images / name, name, number, (splits or {}).get(name, ""), described(of_image))
        for number, (name, of_image) in enumerate(captions.items())
    ]


# ------------------------------------------------------------------------------------------------------- folders


def read_folder(path, images):
    """Photos of a folder and those in it, each with its captions beside it: dog.jpg and dog.txt, a caption a line."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    texts = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
    captions, lonely = {}, set(texts.values())
    for file in files:
        if file.suffix.lower() in PHOTO_SUFFIXES:
            name, beside = file.relative_to(path).as_posix(), texts.get(file.with_suffix(""))
            try:
                name.encode()
            except UnicodeError:
                raise InputError(f"{name!r}: its name is not UTF-8, rename it") from None
            lonely.discard(beside)
            captions[name] = [line for line in read_lines(beside) if line.strip()] if beside else []
    if not captions:
        raise InputError(f"{path} has no photos ({' '.join(PHOTO_SUFFIXES)})")
    if lonely:
        print(f"{len(lonely)} .txt files have no photo beside them, such as {min(lonely).name!r}")
    return photos_of(captions, path)


def read_tutorial(path, images):
    """Images of a folder that the widely used PyTorch tutorial's create_input_files.py wrote, <unk> as it is there."""
    name, numbers = read_word_map(path)
    words = {number: word for word, number in numbers.items()}
    photos = []
    for split in SPLITS:
        kinds = {"IMAGES": "hdf5", "CAPTIONS": "json", "CAPLENS": "json"}
        files = [path / f"{split.upper()}_{kind}_{name}.{suffix}" for kind, suffix in kinds.items()]
        if not any(file.is_file() for file in files):
            continue
        if missing := [file for file in files if not file.is_file()]:
            raise InputError(f"{path} has a part of its {split} split only: no {missing[0].name}")
        try:
            with h5py.File(files[0]) as file:
                shape, per_image = file["images"].shape, int(file.attrs["captions_per_image"])
                square = len(shape) == 4 and shape[1] == 3 and shape[2] == shape[3] > 0
                if file["images"].dtype != "uint8" or not square:
                    raise TypeError
        except (OSError, KeyError, TypeError, AttributeError, ValueError, OverflowError):
            raise InputError(f"{files[0]} is damaged, or has no square uint8 images and captions_per_image") from None
        captions, lengths = read_json(files[1]), read_json(files[2])
        try:
            if per_image < 1 or not len(captions) == len(lengths) == shape[0] * per_image:
                raise TypeError
            told = [[words[n] for n in one[1 : length - 1]] for one, length in zip(captions, lengths, strict=True)]
        except (KeyError, TypeError):
            raise InputError(f"{files[1]}, {files[0].name} and the word map do not belong together") from None
        told = [{"words": one, "raw": " ".join(one)} for one in told]
        for row in range(shape[0]):
            of_image = [one for one in told[row * per_image : (row + 1) * per_image] if one["words"]]
            photos.append(ImageRecord(files[0], f"{split} {row}", len(photos), split, of_image, row=row))
    if not photos:
        raise InputError(f"{path} has a word map, but no images in TRAIN_IMAGES_{name}.hdf5 and the like")
    return photos


def read_word_map(path):
    """The name of the tutorial's data set in a folder, and its words' numbers."""
    found = sorted(path.glob("WORDMAP_*.json"))
    if len(found) != 1:
        raise InputError(f"{path} has {len(found)} files WORDMAP_*.json: one data set a folder")
    numbers = read_json(found[0])
    if (
        not isinstance(numbers, dict)
        or not numbers.keys() >= set(SPECIAL_TOKENS)
        or not all(isinstance(number, int) for number in numbers.values())
    ):
        raise InputError(f"{found[0]} is no word map with the words {' '.join(SPECIAL_TOKENS)}")
    return found[0].stem.removeprefix("WORDMAP_"), numbers


def tutorial_words(path):
    """The words of the tutorial's folder in the order of their numbers, without the special ones."""
    numbers = read_word_map(path)[1]
    return [word for word in sorted(numbers, key=numbers.get) if word not in SPECIAL_TOKENS]


# --------------------------------------------------------------------------------------------------- any of them

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


def detect_format(path):
    """The format of captions, a name of READERS, by their content."""
    if path.is_dir():
        return "tutorial" if any(path.glob("WORDMAP_*.json")) else "folder"
    with open(path, "rb") as file:
        start = file.read(2**16).removeprefix(codecs.BOM_UTF8).lstrip()
    if start[:1] in (b"{", b"["):
        of_coco = b'"file_name"' in start or b'"annotations"' in start
        return "coco" if of_coco and b'"sentences"' not in start else "karpathy"
    first = start.split(b"\n")[0]
    if re.match(rb".+#\d+\t", first):
        return "token"
    return "flickr30k" if first.startswith(b"image_name|") else "csv"


def read_records(captions, images, kind):
    """All photos with their captions, each in a split or none; returns them and the format, told where `kind` is auto.

    Args:
        captions: paths of files, or of a folder.
        images: the folder that the photos of captions files lie in.
        kind: a name of READERS, or auto.
    """
    paths, images = [Path(path) for path in captions], Path(images)
    for path in paths:
        if not path.exists():
            raise InputError(f"--captions {path}: no such file or folder")
    if kind == "auto":
        kind = detect_format(paths[0])
    if paths[0].is_dir() != (kind in ("folder", "tutorial")):
        what = "a folder" if paths[0].is_dir() else "a file"
        raise InputError(f"--captions {paths[0]} is {what}, which --format {kind} is not")
    if len(paths) > 1 and kind != "coco":
        raise InputError(f"--captions {' '.join(captions)}: only COCO's own may be several, this is --format {kind}")
    photos = READERS[kind](paths if kind == "coco" else paths[0], images)
    if not photos:
        raise InputError(f"{' '.join(captions)} names no images")
    name, times = Counter(photo.name for photo in photos).most_common(1)[0]
    if times > 1:
        raise InputError(f"{' '.join(captions)} names {name} as {times} images")
    return photos, kind


def random_split(photos, seed):
    """Photos without splits in splits: a tenth of the images each, but at least one, for val and for test."""
    order = list(range(len(photos)))
    random.Random(seed).shuffle(order)
    tenth = math.ceil(len(photos) / 10)
    splits = dict.fromkeys(order, "train")
    if len(photos) > 1:
        splits |= dict.fromkeys(order[:tenth], "val")
    if len(photos) > 2:
        splits |= dict.fromkeys(order[tenth : 2 * tenth], "test")
    return [replace(photo, split=splits[i]) for i, photo in enumerate(photos)]
