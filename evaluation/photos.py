"""The photos to caption: named one by one, by their folder or on standard input, and loaded in batches."""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from common.files import display_name
from evaluation.ensemble import Ensemble
from models import Captioner
from preparation.folder_formats import PHOTO_SUFFIXES
from preparation.images import load_image, photo_size, place_objects
from preparation.objects import add_objects
from preparation.records import ImageRecord
from preparation.region_features import RegionFeatures
from utils import InputError
from visualization.photos import is_our_picture


def collect_photos(arguments: Sequence[str]) -> list[str]:
    """The photos that the arguments name: a file, a folder with its subfolders, or - for names on standard input.

    Raises InputError where a folder or standard input names no photo.
    """
    photos: list[str] = []
    for argument in arguments:
        names = read_names() if argument == "-" else [argument]
        for name in names:
            photos += photos_of_folder(name) if os.path.isdir(name) else [name]
    return photos


def read_names() -> list[str]:
    """The file names on standard input, one per line. Raises InputError where there is none."""
    lines = (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer)
    names = [os.path.expanduser(line) for line in lines if line]
    if not names:
        raise InputError("-: no file names on standard input")
    return names


def photos_of_folder(folder: str) -> list[str]:
    """The photos of a folder and its subfolders, sorted, without hidden files and the pictures that caption.py wrote.

    Raises InputError where there is none.
    """
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in PHOTO_SUFFIXES and path.is_file())
    visible = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    photos = [str(path) for path in visible if not is_our_picture(path)]
    if not photos:
        raise InputError(f"{folder} has no photos ({' '.join(PHOTO_SUFFIXES)})")
    return photos


def find_objects(photos: Sequence[str], path: str | Path, image_size: int, resize: str) -> list[list[dict[str, Any]]]:
    """The objects of each photo in a file of them (`preparation.objects.ObjectFile`), in the image of `load_photos`.

    Each has "words" and a "box" in fractions of the sides. Raises InputError as `preparation.objects.add_objects`.
    """
    records = photo_records(photos)
    found = {}
    for record in add_objects(list(dict.fromkeys(records)), Path(path)):
        objects = record.objects or []
        if objects:  # so that its photo can be read
            objects = place_objects(objects, photo_size(record.path), image_size, resize)
        found[record.path] = objects
    return [found[record.path] for record in records]


def photo_records(photos: Sequence[str]) -> list[ImageRecord]:
    """Records of photos without captions; that of a photo that is named twice is the same."""
    files = [Path(os.path.abspath(photo)) for photo in photos]  # a link may have the name that is looked for
    names = {file: display_name(file) for file in files}
    records = {file: ImageRecord(file, name, i, "", b"[]") for i, (file, name) in enumerate(names.items())}
    return [records[file] for file in files]


class PhotoRegions:
    """The region features of photos in files of them (`preparation.region_features.RegionFeatures`).

    The boxes are those in the image of `load_photos`. Raises InputError where a file does not fit, has features of
    another size than the captioner takes or no boxes where it needs them, or lacks photos.
    """

    def __init__(self, photos: Sequence[str], paths: Sequence[str], captioner: Captioner | Ensemble) -> None:
        self.records = photo_records(photos)
        feature_dim = captioner.sources[0].encoder.feature_dim
        self.features = RegionFeatures(paths, list(dict.fromkeys(self.records)))
        self.features.require_all()
        if self.features.feature_dim != feature_dim:
            raise InputError(
                f"--region_features {paths[0]}: {self.features.feature_dim} features of each region, the model was "
                f"trained on {feature_dim}"
            )
        if captioner.needs_boxes and not self.features.has_boxes:
            raise InputError(f"--region_features {paths[0]}: without boxes, which the model needs")
        self.image_size, self.resize = captioner.image_size, captioner.resize

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Of B photos the features (B, R, F) float16 and boxes (B, R, 4), padded with zeros."""
        found = [self.features.read(self.records[i], self.image_size, self.resize) for i in indices]
        features, boxes = (pad_sequence(list(map(torch.from_numpy, part)), True) for part in zip(*found, strict=True))
        return features, boxes


def load_photos(
    photos: Sequence[str], batch_size: int, image_size: int, resize: str, broken: list[str]
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield batches: the photos' indices, and their images (B, 3, S, S) uint8.

    Photos that cannot be read are left out, and a line that says why is appended to `broken`.
    """
    for start in range(0, len(photos), batch_size):
        images: dict[int, np.ndarray] = {}
        for i in range(start, min(start + batch_size, len(photos))):
            try:
                images[i] = load_image(photos[i], image_size, resize)
            except InputError as error:
                broken.append(str(error))
        if images:
            yield list(images), torch.from_numpy(np.stack(list(images.values())))
