"""Regions of the photos to caption: objects from a file or a detector, or region features from files."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from common.files import display_name
from evaluation.ensemble import Ensemble
from models import Captioner
from preparation.detection import Detector, detect_objects
from preparation.images import photo_size, place_objects
from preparation.objects import add_objects, require_objects_file
from preparation.records import ImageRecord
from preparation.region_features import RegionFeatures
from utils import InputError


def read_objects(photos: Sequence[str], path: str | Path, image_size: int, resize: str) -> list[list[dict[str, Any]]]:
    """Read the objects of each photo from a file of them (`preparation.objects.ObjectFile`).

    Each object has "words" and a "box" in fractions of the sides of the image that the model sees. Raises InputError as
    `preparation.objects.add_objects` does.
    """
    require_objects_file(str(path))
    records = photo_records(photos)
    found = {}
    for record in add_objects(list(dict.fromkeys(records)), Path(path)):
        objects = record.objects or []
        if objects:  # so its photo can be read
            objects = place_objects(objects, photo_size(record.path), image_size, resize)
        found[record.path] = objects
    return [found[record.path] for record in records]


def detect_objects_in(
    photos: Sequence[str], detector: Detector, image_size: int, resize: str
) -> list[list[dict[str, Any]]]:
    """Detect the objects of each photo; returns what `read_objects` does."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "objects.json"
        detect_objects(list(dict.fromkeys(photo_records(photos))), path, detector)
        return read_objects(photos, path, image_size, resize)


def photo_records(photos: Sequence[str]) -> list[ImageRecord]:
    """Return records of photos without captions; duplicates share one record."""
    files = [Path(os.path.abspath(photo)) for photo in photos]  # not resolved: a link may have the name in the file
    names = {file: display_name(file) for file in files}
    records = {file: ImageRecord(file, name, i, "", b"[]") for i, (file, name) in enumerate(names.items())}
    return [records[file] for file in files]


class PhotoRegions:
    """Region features of photos, from files of them (`preparation.region_features.RegionFeatures`).

    Raises InputError if a file does not fit, lacks photos or boxes that the captioner needs, or has features of another
    size than the captioner takes.
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
        """Read the features (B, R, F) float16 and boxes (B, R, 4) of B photos, padded with zeros.

        The boxes are those in the image that the model sees.
        """
        found = [self.features.read(self.records[i], self.image_size, self.resize) for i in indices]
        features, boxes = (pad_sequence(list(map(torch.from_numpy, part)), True) for part in zip(*found, strict=True))
        return features, boxes
