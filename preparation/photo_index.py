"""The photos of a data set, found by what other files call them: a file name, part of a path, or an id."""

import math
import re
from collections import Counter
from collections.abc import Sequence
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
        self.indices: dict[str, int] = {}
        names = [PurePosixPath(record.name.replace("\\", "/")) for record in records]
        ids = [str(record.image_id) if record.has_own_id else "" for record in records]
        levels = [[_end_of_path(name, count) for name in names] for count in range(MAX_PARTS, 0, -1)]
        numbers = [match[1] if (match := re.fullmatch(COCO_NAME, name.stem)) else "" for name in names]
        for keys in (*levels, ids, [name.stem for name in names], numbers):
            counts = Counter(keys)
            for i, key in enumerate(keys):
                if key and counts[key] == 1:
                    self.indices.setdefault(key, i)

    def find(self, name: str) -> tuple[int, float] | None:
        """The index of the record, and how many parts of the name agree, inf where all do; None without a record."""
        path = PurePosixPath(name.replace("\\", "/"))
        for count in range(MAX_PARTS, 0, -1):
            key = _end_of_path(path, count)
            if key in self.indices:
                return self.indices[key], math.inf if count == len(path.parts) else count
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
