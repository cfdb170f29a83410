"""Count true relations in captions of shapes: python benchmarks/relation_accuracy.py RESULTS --data_folder DIR

A caption such as "a red circle left of a blue cross" is true if the scene has both shapes and the first is to the left.
In the scenes of `create_input_files.py --num_shapes 4 5 6`, naming the shapes alone is not enough.
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
SAME_COLUMN = 0.1  # horizontal distance of centers, as a fraction of the side, up to which shapes share a column


@dataclass(frozen=True, kw_only=True)
class Settings(BaseSettings):
    """Count the captions of shapes that name two shapes of their scene and relate them correctly."""

    results: str  # captions written by eval.py, results_*.json
    data_folder: str = "data/shapes"  # what create_input_files.py wrote
    split: str = setting("test", choices=("train", "val", "test"))  # split of the captions


def relation_of(first: Sequence[float], second: Sequence[float]) -> str:
    """Return the relation of the first box (left, top, right, bottom) to the second, in the words of the captions."""
    dx, dy = ((second[i] + second[i + 2] - first[i] - first[i + 2]) / 2 for i in (0, 1))
    if abs(dx) > SAME_COLUMN:
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def find_shape(phrase: str, objects: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Find the object named by a phrase such as "a large red circle"; the size may be missing but not wrong."""
    words = phrase.split()[1:]  # without the article
    return next((item for item in objects if words in (item["words"], item["words"][1:])), None)


def judge(caption: str, objects: Sequence[dict[str, Any]]) -> tuple[bool, bool] | None:
    """Tell whether the scene has both shapes of a caption, and in that relation; return None for other captions."""
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
        raise InputError(f"{settings.data_folder} has no objects: give a data folder of shapes")
    if not isinstance(results, list) or not all(isinstance(item, dict) and "caption" in item for item in results):
        raise InputError(f"{settings.results}: not captions written by eval.py: give a results_*.json")
    if [item.get("image_id") for item in results] != [entry["image_id"] for entry in entries]:
        raise InputError(f"{settings.results}: not from the {settings.split} split of {settings.data_folder}")
    judged = [judge(item["caption"], each) for item, each in zip(results, objects, strict=True)]
    relating = [each for each in judged if each is not None]
    if not relating:
        raise InputError(f"{settings.results}: no caption relates two shapes; the first is: {results[0]['caption']}")
    both, true = map(sum, zip(*relating, strict=True))
    print(f"{len(relating)} of {len(judged)} captions relate two shapes")
    print(f"both shapes are in the scene: {both} ({both / len(relating):.3f})")
    print(f"and the relation is true: {true} ({true / max(both, 1):.3f} of these)")


if __name__ == "__main__":
    run_script(main, Settings)
