"""Shared by pictures and the report: the photo as they show it, its named regions, and the files of the pictures.

Shapes: R regions. This module does not import matplotlib, which takes half a second.
"""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from decoding.captions import CaptioningModel, ImageCaption
from preparation.images import PhotoBytes, open_photo, to_square
from utils import InputError

SOFTWARE = "caption.py (image captioning)"  # PNG metadata that tells our pictures from the user's files
PHOTO_SIDE = 400  # pixels of a photo's longer side in a picture
MAX_ASPECT = (
    2.5  # largest ratio of a photo's sides in a picture; longer photos are squeezed, as the model sees a square
)
FULL_BRIGHTNESS = 4.0  # attention, in multiples of the uniform weight 1 / R, at which a tile reaches full brightness
MAX_FRAMES = 3  # framed objects at a word
MAX_NAMED_EDGES = 8  # edges of a graph with names at a word


def open_for_picture(path: str | Path | PhotoBytes, resize_mode: str) -> Image.Image:
    """Open a photo as pictures show it: exactly the part that the grid of regions covers.

    This is the whole photo if `resize_mode` is squash, otherwise the square that the model sees
    (`preparation.images.to_square`).
    """
    photo = open_photo(path, PHOTO_SIDE)
    if resize_mode != "squash":
        return Image.fromarray(to_square(photo, PHOTO_SIDE, resize_mode).permute(1, 2, 0).numpy())
    longer = min(PHOTO_SIDE, max(photo.size))
    shorter = max(1, round(longer * min(photo.size) / max(photo.size)), round(longer / MAX_ASPECT))
    return photo.resize((longer, shorter) if photo.width > photo.height else (shorter, longer))


class Regions(NamedTuple):
    """The regions that the attention weights belong to."""

    boxes: np.ndarray  # (R, 4) left, top, right and bottom in fractions of the sides
    names: Sequence[str | None]  # of the R regions; None: a cell of the grid (these come first); "": name unknown

    @property
    def num_cells(self) -> int:
        """The number of regions that are cells of a grid."""
        return self.names.count(None)

    def is_whole(self, i: int) -> bool:
        """Return True if a region is the whole photo."""
        return bool((self.boxes[i] == (0, 0, 1, 1)).all())

    def is_part(self, i: int) -> bool:
        """Return True if a region is neither a cell of the grid nor the whole photo."""
        return self.names[i] is not None and not self.is_whole(i)

    def named_edges(self, edges: dict[tuple[int, int], float]) -> list[tuple[tuple[int, int], float]]:
        """Return the edges whose relations are named, with their shares: the first MAX_NAMED_EDGES, largest first.

        Edges of the whole photo are left out: it is around everything.
        """
        kept = [(edge, share) for edge, share in edges.items() if not any(map(self.is_whole, edge))]
        return kept[:MAX_NAMED_EDGES]


def name_regions(captioner: CaptioningModel, caption: ImageCaption, objects: Sequence[dict[str, Any]]) -> Regions:
    """Return the regions of a caption with their names, which come from the objects of the photo."""
    source, count = captioner.region_source, len(caption.boxes)
    names: list[str | None] = [None] * count
    if source.uses_region_features:
        names = [""] * count
    elif source.uses_objects:
        of_objects = ["", *(" ".join(item["words"]) for item in objects)]  # the whole photo is first
        names[count - len(of_objects) :] = of_objects
    return Regions(caption.boxes.numpy(), names)


def picture_paths(photos: Sequence[str], folder: str | Path, kinds: Sequence[str]) -> list[dict[str, Path]]:
    """Return the paths of each photo's pictures by kind: cat_attention.png, cat-2_attention.png for another cat.

    Raises InputError if a picture would replace a file that is not one of our pictures.
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
    """Return True if `visualization.pictures.save_picture` wrote a file."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return picture.info.get("Software") == SOFTWARE
    except Exception:  # no file, no PNG, or a damaged one, which raises almost anything
        return False
