"""Captions in COCO's results format: [{"image_id": 1, "caption": "a dog"}], or with "image", the photo's file name."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.files import read_json
from utils import InputError

SHOWN = 3  # images named in an error


def read_results(path: str | Path, entries: list[dict[str, Any]], where: str) -> list[str]:
    """Read the captions of a results file in the order of a split's images.

    Args:
        entries: the split's images, [{"image", "image_id"}], from `preparation.storage.read_captions`.
        where: the name of the split in messages.

    Raises InputError if the file has another format, or an image is unknown, missing or repeated.
    """
    results = read_json(path)
    if not isinstance(results, list) or not all(map(_is_result, results)):
        raise InputError(f'{path} is not in COCO\'s results format, [{{"image_id": 1, "caption": "a dog"}}, ...]')
    names = {entry["image_id"]: entry["image"] for entry in entries}
    ids = {entry["image"]: entry["image_id"] for entry in entries}
    captions, unknown = {}, []
    for item in results:
        image_id = item["image_id"] if "image_id" in item else ids.get(item["image"])
        if image_id not in names or item.get("image", names[image_id]) != names[image_id]:
            unknown.append(item.get("image", item.get("image_id")))
        captions[image_id] = item["caption"]
    if unknown:
        raise InputError(
            f"{path} has images that {where} does not have: {_first(unknown)}. Give the --split of the file"
        )
    counts = Counter(item["image_id"] if "image_id" in item else ids[item["image"]] for item in results)
    if repeated := [names[image_id] for image_id, count in counts.items() if count > 1]:
        raise InputError(f"{path} has several captions of an image: {_first(repeated)}. Keep one of each")
    if missing := [name for image_id, name in names.items() if image_id not in captions]:
        raise InputError(f"{path} lacks images of {where}: {_first(missing)}. Each image needs a caption")
    return [captions[entry["image_id"]] for entry in entries]


def _is_result(item: Any) -> bool:
    """Return True if an item of a results file has a caption and names its image."""
    if not isinstance(item, dict) or not isinstance(item.get("caption"), str):
        return False
    keys = [(name, item[name]) for name in ("image_id", "image") if name in item]
    return bool(keys) and all(isinstance(value, (int, str) if name == "image_id" else str) for name, value in keys)


def _first(images: Iterable[Any]) -> str:
    """Join the first few images, and add how many more there are."""
    images = list(map(str, images))
    more = f" and {len(images) - SHOWN} more" if len(images) > SHOWN else ""
    return ", ".join(images[:SHOWN]) + more
