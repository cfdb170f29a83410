"""Count true relations in captions of shapes: python benchmarks/relation_accuracy.py RESULTS --data_folder DIR

A caption such as "a red circle left of a blue cross" is true if the scene has both shapes and the first is to the left.
`create_input_files.py --num_shapes 4 5 6` draws scenes in which that needs more than naming what is there.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.files import read_json
from preparation.storage import read_captions
from utils import BaseSettings, InputError, run_script, setting

RELATION = r"(.+) (left of|right of|above|below) (.+)"
SAME_COLUMN = 0.1  # distance of centers, as a share of the side, below which shapes are above each other


@dataclass(frozen=True, kw_only=True)
class Settings(BaseSettings):
    """Count how many captions of shapes name two shapes of their scene, and relate them truly."""

    results: str  # captions that eval.py wrote, results_*.json
    data_folder: str = "data/shapes"  # what create_input_files.py wrote
    split: str = setting("test", choices=("train", "val", "test"))  # of the captions


def relation_of(first: Sequence[float], second: Sequence[float]) -> str:
    """How the first of two boxes (left, top, right, bottom) lies to the second, in the words of the captions."""
    dx, dy = ((second[i] + second[i + 2] - first[i] - first[i + 2]) / 2 for i in (0, 1))
    if abs(dx) > SAME_COLUMN:
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def find_shape(phrase: str, objects: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The object of a scene that a phrase such as "a large red circle" names; the size may be left out, not wrong."""
    words = phrase.split()[1:]  # without the article
    return next((item for item in objects if words in (item["words"], item["words"][1:])), None)


def judge(caption: str, objects: Sequence[dict[str, Any]]) -> tuple[bool, bool] | None:
    """Whether the scene has both shapes of a caption, and whether they lie as it says; None for other captions."""
    match = re.fullmatch(RELATION, caption)
    if not match:
        return None
    first, second = (find_shape(phrase, objects) for phrase in (match[1], match[3]))
    if not first or not second or first is second:
        return False, False
    return True, relation_of(first["box"], second["box"]) == match[2]


def main(settings: Settings) -> None:
    """Print the counts and shares."""
    entries, _, objects = read_captions(settings.data_folder, settings.split)
    results = read_json(settings.results)
    if not objects.any():
        raise InputError(f"{settings.data_folder} has no objects: is it one of shapes?")
    if not isinstance(results, list) or not all(isinstance(item, dict) and "caption" in item for item in results):
        raise InputError(f"{settings.results}: not captions that eval.py wrote, results_*.json")
    if [item.get("image_id") for item in results] != [entry["image_id"] for entry in entries]:
        raise InputError(f"{settings.results}: not of the {settings.split} split of {settings.data_folder}")
    judged = [judge(item["caption"], each) for item, each in zip(results, objects, strict=True)]
    relating = [each for each in judged if each is not None]
    if not relating:
        raise InputError(f"{settings.results}: no caption relates two shapes, such as {results[0]['caption']}")
    both, true = map(sum, zip(*relating, strict=True))
    print(f"{len(relating)} of {len(judged)} captions relate two shapes")
    print(f"both shapes are in the scene: {both} ({both / len(relating):.3f})")
    print(f"and the relation is true: {true} ({true / max(both, 1):.3f} of these)")


if __name__ == "__main__":
    run_script(main, Settings)
