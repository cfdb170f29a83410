"""What pictures and the report share: the photo as it is shown, its regions by name, and the pictures' files.

Shapes: R regions. Without matplotlib, which takes half a second to import.
"""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from decoding.captions import ImageCaption
from evaluation.ensemble import Ensemble
from models import Captioner
from preparation.images import PhotoBytes, open_photo, to_square
from utils import InputError

SOFTWARE = "caption.py (image captioning)"  # PNG metadata by which our pictures are told from the user's files
PHOTO_SIDE = 400  # pixels of a photo's longer side in a picture
MAX_ASPECT = 2.5  # of a photo's sides in a picture, a longer one is squeezed: the model sees a square anyway
FULL_BRIGHTNESS = 4.0  # attention, in multiples of the uniform weight 1 / R, from which a tile is fully bright
MAX_FRAMES = 3  # of the objects at a word
MAX_NAMED_EDGES = 8  # of a graph at a word


def open_for_picture(path: str | Path | PhotoBytes, resize_mode: str) -> Image.Image:
    """A photo as its pictures show it, so that the grid of regions spans it exactly.

    The image that the model sees is the whole photo where `resize_mode` is squash, otherwise its square
    (`preparation.images.to_square`).
    """
    photo = open_photo(path, PHOTO_SIDE)
    if resize_mode != "squash":
        return Image.fromarray(to_square(photo, PHOTO_SIDE, resize_mode).permute(1, 2, 0).numpy())
    longer = min(PHOTO_SIDE, max(photo.size))
    shorter = max(1, round(longer * min(photo.size) / max(photo.size)), round(longer / MAX_ASPECT))
    return photo.resize((longer, shorter) if photo.width > photo.height else (shorter, longer))


class Regions(NamedTuple):
    """What the attention looks at."""

    boxes: np.ndarray  # (R, 4) left, top, right and bottom in fractions of the sides
    names: Sequence[str | None]  # of the R regions, "" where it is not known; None: cells of a grid, which come first

    @property
    def num_cells(self) -> int:
        """How many regions are cells of a grid."""
        return self.names.count(None)

    def is_whole(self, i: int) -> bool:
        """Whether a region is the whole photo."""
        return bool((self.boxes[i] == (0, 0, 1, 1)).all())

    def named_edges(self, edges: dict[tuple[int, int], float]) -> list[tuple[tuple[int, int], float]]:
        """Of edges with their shares, largest first, those whose relations are named, MAX_NAMED_EDGES at most.

        Those of the whole photo, which is around everything, are left out.
        """
        kept = [(edge, share) for edge, share in edges.items() if not any(map(self.is_whole, edge))]
        return kept[:MAX_NAMED_EDGES]

    def is_part(self, i: int) -> bool:
        """Whether a region is a part of the photo, and no cell of a grid."""
        return self.names[i] is not None and not self.is_whole(i)


def name_regions(captioner: Captioner | Ensemble, caption: ImageCaption, objects: Sequence[dict[str, Any]]) -> Regions:
    """The regions of a caption's photo, which has these objects, with their names."""
    source, count = captioner.region_source, len(caption.boxes)
    names: list[str | None] = [None] * count
    if source.uses_region_features:
        names = [""] * count
    elif source.uses_objects:
        of_objects = ["", *(" ".join(item["words"]) for item in objects)]  # the whole photo is first
        names[count - len(of_objects) :] = of_objects
    return Regions(caption.boxes.numpy(), names)


def picture_paths(photos: Sequence[str], folder: str | Path, kinds: Sequence[str]) -> list[dict[str, Path]]:
    """For each photo the paths of its pictures by kind: cat_attention.png, cat-2_attention.png for another cat.

    Raises InputError where a picture would replace a file that is not one of ours.
    """
    names: dict[str, None] = {}  # an ordered set
    for photo in photos:
        stem = name = Path(photo).stem
        suffixes = itertools.count(2)
        while name in names:
            name = f"{stem}-{next(suffixes)}"
        names[name] = None
    paths = [{kind: Path(folder) / f"{name}_{kind}.png" for kind in kinds} for name in names]
    for path in itertools.chain.from_iterable(by_kind.values() for by_kind in paths):
        if os.path.lexists(path) and not is_our_picture(path):
            raise InputError(
                f"{path} is not a picture of caption.py and is not replaced: choose another --output_folder"
            )
    return paths


def is_our_picture(path: str | Path) -> bool:
    """Whether `save_picture` wrote a file."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return picture.info.get("Software") == SOFTWARE
    except Exception:  # no file, no PNG, or a damaged one, which raises almost anything
        return False
