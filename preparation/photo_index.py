"""Look up the photos of a data set by file name, the end of a path, or id."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath

from preparation.records import ImageRecord
from utils import InputError

MAX_PARTS = 8  # of paths that are compared
COCO_NAME = r"(?:COCO_\w+_)?0*(\d+)"  # the stem of a COCO photo's name, with its id


class PhotoIndex:
    """Finds the records that another file names.

    A name matches by as many parts of its path as both have in common from the end, by the record's id, by the stem of
    its name, or by the number in a COCO name. Names that several records share match none, and neither do ids that
    were only counted.
    """

    def __init__(self, records: Sequence[ImageRecord]) -> None:
        paths = [_parts(record.name) for record in records]
        stems = [PurePosixPath(record.name.replace("\\", "/")).stem for record in records]
        ends = [["/".join(parts[-n:]) if len(parts) >= n else "" for parts in paths] for n in range(MAX_PARTS, 0, -1)]
        ids = [str(record.image_id) if record.has_own_id else "" for record in records]
        numbers = [match[1] if (match := re.fullmatch(COCO_NAME, stem)) else "" for stem in stems]
        self._any = _unique(*ends, ids, stems, numbers)
        self._interpretations = {
            "file names": _unique(*ends, stems),
            "ids": _unique(ids),
            "numbers in file names": _unique(numbers),
        }

    def match(self, names: Mapping[str, str]) -> dict[int, list[str]]:
        """Return the keys of `names` by the index of the record that each names; a file may mix names and ids."""
        return _match(names, self._any)

    def match_alike(self, names: Iterable[str], file: str) -> dict[int, str]:
        """Return names by the index of their record, all interpreted alike: as file names, as ids or as numbers.

        The interpretation that matches most photos is used. Raises InputError, which names the file, if two match as
        many and a name means different photos.
        """
        keys = {name: name for name in names}
        matches = {kind: _match(keys, indices) for kind, indices in self._interpretations.items()}
        most = max(map(len, matches.values()))
        first, *others = [kind for kind in matches if len(matches[kind]) == most]
        photos = {name: i for i, found in matches[first].items() for name in found}
        for other in others:
            for i, found in matches[other].items():
                for name in found:
                    if photos.get(name, i) != i:
                        raise InputError(
                            f"{file}: the names of its photos, such as {name}, could be {first} or {other}, which are "
                            f"different photos: give file names with their suffix, such as {name}.jpg"
                        )
        return {i: found[0] for i, found in matches[first].items()}


def _match(names: Mapping[str, str], indices: Mapping[str, int]) -> dict[int, list[str]]:
    """Return the keys of `names` by the index of their record: of several, those that agree in most parts.

    A record has none if several agree equally and none agrees completely: it could be any of them.
    """
    agreeing: dict[int, dict[str, float]] = {}  # by record and key, the number of parts; inf: all
    for key, name in names.items():
        parts = _parts(name)
        for count in range(min(MAX_PARTS, len(parts)), 0, -1):
            index = indices.get("/".join(parts[-count:]))
            if index is not None:
                agreeing.setdefault(index, {})[key] = math.inf if count == len(parts) else count
                break
    matches = {}
    for index, counts in agreeing.items():
        most = max(counts.values())
        best = [key for key, count in counts.items() if count == most]
        if len(best) == 1 or most == math.inf:
            matches[index] = best
    return matches


def _parts(name: str) -> tuple[str, ...]:
    return PurePosixPath(name.replace("\\", "/")).parts


def _unique(*columns: Sequence[str]) -> dict[str, int]:
    """Return the index of each key that occurs once in its column; the first column that has a key counts."""
    indices: dict[str, int] = {}
    for keys in columns:
        counts = Counter(keys)
        for i, key in enumerate(keys):
            if key and counts[key] == 1:
                indices.setdefault(key, i)
    return indices
