"""The photos of a data set, found by what other files call them: a file name, part of a path, or an id."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from preparation.images import photo_size
from preparation.records import ImageRecord
from preparation.storage import open_images
from utils import InputError

MAX_PARTS = 8  # of paths, that are compared
COCO_NAME = r"(?:COCO_\w+_)?0*(\d+)"  # of a photo's stem, with its id


class PhotoIndex:
    """Finds the record that another file names: by as many parts of its path as both have in common from the end,
    by its id, by the name's stem, or by the number in a name of COCO's.

    What several photos share finds none; neither does an id that is only counted.
    """

    def __init__(self, records: Sequence[ImageRecord]) -> None:
        names = [PurePosixPath(record.name.replace("\\", "/")) for record in records]
        ids = [str(record.image_id) if record.has_own_id else "" for record in records]
        levels = [[_end_of_path(name, count) for name in names] for count in range(MAX_PARTS, 0, -1)]
        numbers = [match[1] if (match := re.fullmatch(COCO_NAME, name.stem)) else "" for name in names]
        stems = [name.stem for name in names]
        self.readings = {  # of a key, by how it is read
            "file names": _unique([*levels, stems]),
            "ids": _unique([ids]),
            "numbers in file names": _unique([numbers]),
        }
        self.indices = _unique([*levels, ids, stems, numbers])

    def find(self, name: str) -> tuple[int, float] | None:
        """The index of the record, and how many parts of the name agree, inf where all do; None without a record."""
        return _find(name, self.indices)

    def find_all(self, keys: Iterable[str], file: str) -> dict[int, str]:
        """The keys of a file by the indices of their records, all read in one way: the way that finds most photos.

        A record that two keys may mean has none. Raises InputError where two ways find as many photos, and a key is of
        another photo in each.
        """
        keys, found = list(keys), {}
        for reading, indices in self.readings.items():
            matches: dict[int, dict[str, float]] = {}
            for key in keys:
                if match := _find(key, indices):
                    matches.setdefault(match[0], {})[key] = match[1]
            best = {i: best_matches(each) for i, each in matches.items()}
            found[reading] = {i: names[0] for i, names in best.items() if names}
        most = max(map(len, found.values()))
        (first, chosen), *others = [(reading, each) for reading, each in found.items() if len(each) == most]
        photos = {key: i for i, key in chosen.items()}
        for reading, other in others:
            for i, key in other.items():
                if photos.get(key, i) != i:
                    raise InputError(
                        f"{file}: its photos, such as {key}, may be {first} or {reading}, of other photos: name them "
                        f"by file names with suffix, such as {key}.jpg"
                    )
        return chosen


def best_matches(matches: dict[str, float]) -> list[str]:
    """Of the names in a file for one photo, with how many parts of them agree, those that mean it.

    None does where several agree as much and none completely.
    """
    best = [name for name, parts in matches.items() if parts == max(matches.values())]
    return [] if len(best) > 1 and matches[best[0]] < math.inf else best


def _unique(columns: Sequence[Sequence[str]]) -> dict[str, int]:
    """The index of each key that occurs once in its column; where columns share a key, the first column's."""
    indices: dict[str, int] = {}
    for keys in columns:
        counts = Counter(keys)
        for i, key in enumerate(keys):
            if key and counts[key] == 1:
                indices.setdefault(key, i)
    return indices


def _find(name: str, indices: dict[str, int]) -> tuple[int, float] | None:
    """As `PhotoIndex.find`, in the given indices."""
    path = PurePosixPath(name.replace("\\", "/"))
    for count in range(MAX_PARTS, 0, -1):
        key = _end_of_path(path, count)
        if key in indices:
            return indices[key], math.inf if count == len(path.parts) else count
    return None


def _end_of_path(path: PurePosixPath, count: int) -> str:
    """The last parts of a path, as many as asked for; "" where it has fewer."""
    return "/".join(path.parts[-count:]) if len(path.parts) >= count else ""


def record_size(record: ImageRecord) -> tuple[int, int] | None:
    """Width and height of a record's photo; None where it is unusable, which writing the folder reports."""
    try:
        if record.row < 0:
            return photo_size(record.path)
        with open_images(record.path) as images:
            return images.shape[3], images.shape[2]
    except (InputError, OSError):
        return None
