"""Caption formats in JSON: Karpathy's and COCO's."""

import math
from pathlib import Path
from typing import Any

from preparation.json_stream import iter_json_list
from preparation.records import ImageRecord, pack_captions, pack_sentences, parse_split, require_type
from preparation.storage import SPLITS
from utils import InputError


def read_karpathy(path: Path, images: Path) -> list[ImageRecord]:
    """Read Karpathy's JSON (dataset_flickr8k.json, dataset_flickr30k.json, dataset_coco.json).

    Raises InputError if it has another form.
    """
    records = []
    try:
        for index, image in enumerate(iter_json_list(path, "images")):
            records.append(_karpathy_record(image, index, path, images))
    except KeyError as error:
        raise InputError(f"{path}: no key {error} in images[{len(records)}], is this Karpathy's JSON?") from None
    except (TypeError, AttributeError):
        raise InputError(f"{path}: images[{len(records)}] has another form, is this Karpathy's JSON?") from None
    return records


def _karpathy_record(image: Any, index: int, path: Path, images: Path) -> ImageRecord:
    """Make a record of an image. Raises KeyError, TypeError or AttributeError if it has another form."""
    name = require_type(image["filename"], str)
    if image.get("filepath"):
        name = f"{require_type(image['filepath'], str)}/{name}"
    captions = [
        {"words": require_words(sentence["tokens"]), "raw": require_type(sentence["raw"], str)}
        for sentence in image["sentences"]
    ]
    image_id = require_type(image.get("cocoid", image.get("imgid", index)), (int, str))
    split = parse_split(image["split"], path, name)
    packed = pack_captions([caption for caption in captions if caption["words"]])
    objects = validate_objects(image["objects"], f"{path}: {name}") if "objects" in image else None
    has_own_id = "cocoid" in image or "imgid" in image
    return ImageRecord(images / name, name, image_id, split, packed, objects, has_own_id=has_own_id)


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
        if not require_words(item["words"]) or len(box) != 4:
            raise TypeError
        if not math.isfinite(require_type(item.get("score", 1.0), (int, float))):
            raise TypeError
        if not all(-1 <= require_type(edge, (int, float)) <= 2 for edge in box):
            raise InputError(f"{where}: a box is left, top, right, bottom in fractions of the photo's sides, not {box}")
    return value


def read_coco(paths: list[Path], images: Path) -> list[ImageRecord]:
    """Read COCO's files, such as captions_train2014.json; the names of several files give their splits.

    Raises InputError if a file has another form, or captions of images that it does not list.
    """
    records = []
    for path in paths:
        split = ""
        if len(paths) > 1:
            split = next((split for split in SPLITS if split in path.stem), "")
            if not split:
                raise InputError(
                    f"{path}: the name of one of several files must contain its split: {', '.join(SPLITS)}"
                )
        records += read_coco_file(path, images, split)
    return records


def read_coco_file(path: Path, images: Path, split: str) -> list[ImageRecord]:
    """Read one of COCO's files, whose images all belong to `split`; its photos may be in a folder train2014."""
    name, captions, records = None, {}, []
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
        raise InputError(f"{path}: no key {error} after {name or 'its start'}, is this COCO's JSON?") from None
    except (TypeError, AttributeError):
        raise InputError(f"{path}: another form after {name or 'its start'}, is this COCO's JSON?") from None
    if captions:
        raise InputError(
            f"{path}: {len(captions)} images have captions only, such as image_id {next(iter(captions))!r}"
        )
    return records
