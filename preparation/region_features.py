"""Region features that a detector has computed, in the common file formats, recognized by their content.

- a folder with an array per photo, ID.npz with the key `feat` or ID.npy, and its boxes in the folder beside it
  (ruotianluo/ImageCaptioning.pytorch: cocobu_att, cocobu_box);
- tab-separated values with base64 (peteanderson80/bottom-up-attention);
- HDF5 with ID_features and ID_boxes (aimagelab/meshed-memory-transformer);
- HDF5 with one array of all photos (hengyuan-hu/bottom-up-attention-vqa), whose ids are in a JSON file.

Shapes: N regions of a photo, F features of a region. A box is left, top, right, bottom.
"""

import base64
import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from tqdm import tqdm

from common.files import did_you_mean, read_json
from preparation.images import place_objects
from preparation.photo_index import PhotoIndex
from preparation.records import ImageRecord
from preparation.storage import own_array
from utils import InputError, first_line

MAX_REGIONS = 1000  # of a photo
TOLERANCE = 0.02  # fraction of the photo's side by which rounded boxes may exceed it
TSV_FIELDS = 6  # image_id, image_w, image_h, num_boxes, boxes, features


class Regions(NamedTuple):
    """The regions of a photo."""

    features: np.ndarray  # (N, F) float32
    boxes: np.ndarray | None  # (N, 4) float32; None: the file has none
    size: tuple[float, float] | None = None  # width and height that the boxes are in; None: the photo's, in pixels


# Each layout maps the ids or names of its photos to functions that read their regions. These may raise any exception
# for damaged data.
Layout = dict[str, Callable[[], Regions]]


# ------------------------------------------------------------------------------------------------ layouts


def folder_layout(path: Path) -> Layout:
    """Open a folder with a file per photo: ID.npz or ID.npy, of (N, F), a grid (rows, columns, F) or a vector (F,)."""
    path = Path(os.path.abspath(path))  # "." has no name; a link keeps its own
    inner = [each for each in sorted(path.glob("*_att")) if each.is_dir()]
    if len(inner) > 1:
        raise InputError(f"--region_features {path}: has {' and '.join(each.name for each in inner)}, give one")
    path = inner[0] if inner else path
    boxes = path.with_name(f"{path.name.removesuffix('_att')}_box")
    has_boxes = boxes.is_dir() and boxes != path
    return {
        file.stem: functools.partial(_read_arrays, file, boxes / f"{file.stem}.npy" if has_boxes else None)
        for file in path.iterdir()
        if file.suffix in (".npz", ".npy")
    }


def _read_arrays(path: Path, boxes_path: Path | None) -> Regions:
    loaded = np.load(path, allow_pickle=False)
    features = loaded if isinstance(loaded, np.ndarray) else loaded["feat"]
    if features.ndim == 3:
        rows, columns = features.shape[:2]
        top, left = np.mgrid[:rows, :columns].reshape(2, -1)
        boxes = np.stack([left / columns, top / rows, (left + 1) / columns, (top + 1) / rows], axis=1)
        return Regions(features.reshape(rows * columns, -1), boxes, (1, 1))
    if features.ndim == 1:
        return Regions(features[None], None)
    return Regions(features, None if boxes_path is None else np.load(boxes_path, allow_pickle=False))


def tsv_layout(path: Path) -> Layout:
    """Open tab-separated values without a header, with boxes and features as base64 of float32."""
    layout, position = {}, 0
    with open(path, "rb") as file:
        for line_number, line in enumerate(tqdm(file, desc=path.name, unit="photo", leave=False), start=1):
            if line.count(b"\t") != TSV_FIELDS - 1:
                raise InputError(
                    f"--region_features {path}, line {line_number}: not {TSV_FIELDS} fields between tabs, "
                    f"is this a file of region features?"
                )
            key = line[: line.index(b"\t")].decode(errors="replace")
            layout.setdefault(key, functools.partial(_read_tsv_line, path, position))
            position += len(line)
    return layout


def _read_tsv_line(path: Path, position: int) -> Regions:
    with open(path, "rb") as file:
        file.seek(position)
        _, width, height, count, boxes, features = file.readline().split(b"\t")
    boxes, features = (np.frombuffer(base64.decodebytes(field), np.float32) for field in (boxes, features))
    return Regions(features.reshape(int(count), -1), boxes.reshape(int(count), 4), (int(width), int(height)))


def keyed_layout(file: h5py.File) -> Layout:
    """Open HDF5 with two arrays per photo, ID_features (N, F) and ID_boxes (N, 4)."""
    ids = [name.removesuffix("_features") for name in map(str, file) if name.endswith("_features")]
    return {each: functools.partial(_read_keyed, file, each) for each in ids}


def _read_keyed(file: h5py.File, key: str) -> Regions:
    boxes = own_array(file, f"{key}_boxes")[:] if f"{key}_boxes" in file else None
    return Regions(own_array(file, f"{key}_features")[:], boxes)


def stacked_layout(path: Path, file: h5py.File) -> Layout:
    """Open HDF5 with arrays of all photos: image_features (I, N, F), image_bb (I, N, 4), spatial_features (I, N, 6).

    The first four spatial features are the box in fractions of the sides. NAME.json or NAME_imgid2idx.json has the
    photos of the rows: an object from ids to rows, or a list of ids.
    """
    features = own_array(file, "image_features")
    if features.ndim != 3:
        raise InputError(
            f"--region_features {path}: image_features has {features.ndim} axes, not photos, regions and features; "
            f"files with different numbers of regions (pos_boxes) are not supported"
        )
    name = next((name for name in ("spatial_features", "image_bb") if name in file), None)
    boxes, size = own_array(file, name) if name else None, (1, 1) if name == "spatial_features" else None
    names = [path.with_name(f"{path.stem}{end}") for end in (".json", "_imgid2idx.json")]
    found = next((each for each in names if each.is_file()), None)
    if not found:
        raise InputError(
            f"--region_features {path}: its rows have no ids, give them as {names[1].name} beside it, a JSON object "
            f"from ids to rows. A pickle of them is not read, it may run code: convert your own with "
            f'python -c \'import json, pickle, sys; json.dump(pickle.load(open(sys.argv[1], "rb")), '
            f'open(sys.argv[2], "w"))\' {names[1].stem}.pkl {names[1].name}'
        )
    rows = read_json(found)
    if isinstance(rows, list):
        rows = {str(key): row for row, key in enumerate(rows)}
    if not isinstance(rows, dict) or not all(type(row) is int and 0 <= row < len(features) for row in rows.values()):
        raise InputError(f"{found}: not a JSON object from ids to rows of {path.name}, below {len(features)}")

    def read(row: int) -> Regions:
        return Regions(features[row], None if boxes is None else boxes[row][:, :4], size)

    return {key: functools.partial(read, row) for key, row in rows.items()}


def open_layout(path: Path) -> Layout:
    """Recognize a file or folder of region features. Raises InputError for a missing path and an unknown layout."""
    if not path.exists():
        raise InputError(f"--region_features {path}: no such file or folder{did_you_mean(str(path))}")
    try:
        if path.is_dir():
            layout = folder_layout(path)
        elif not h5py.is_hdf5(path):
            layout = tsv_layout(path)
        else:
            file = h5py.File(path)
            layout = stacked_layout(path, file) if "image_features" in file else keyed_layout(file)
    except (OSError, RuntimeError, KeyError) as error:
        raise InputError(f"--region_features {path}: damaged: {error}") from None
    if not layout:
        raise InputError(
            f"--region_features {path}: has no features of a photo (ID.npz, ID.npy, image_features or ID_features)"
        )
    return layout


# ------------------------------------------------------------------------------------------------ features of photos


class Entry(NamedTuple):
    """The regions of a photo in a file."""

    path: str  # of the file
    key: str  # the photo's name in it
    read_regions: Callable[[], Regions]

    def damaged(self, problem: str) -> InputError:
        """Make the error for a problem of this entry."""
        return InputError(f"--region_features {self.path}: photo {self.key} has {problem}")

    def read(self) -> Regions:
        """Read the regions. Raises InputError if they are damaged."""
        try:
            regions = self.read_regions()
        except InputError:
            raise
        except Exception as error:  # damaged files raise almost anything
            raise self.damaged(f"a damaged entry: {first_line(error)}") from None
        features, boxes = regions.features, regions.boxes
        is_valid = features.ndim == 2 and features.size and len(features) <= MAX_REGIONS and features.dtype.kind == "f"
        if not is_valid or (boxes is not None and (boxes.shape != (len(features), 4) or boxes.dtype.kind not in "fiu")):
            shapes = f"features {features.dtype} {features.shape}"
            shapes += "" if boxes is None else f" and boxes {boxes.dtype} {boxes.shape}"
            raise self.damaged(f"{shapes}, not 1 to {MAX_REGIONS} rows of numbers, with four for each box")
        return regions


class RegionFeatures:
    """The region features of photos, from one file or several.

    Attributes: feature_dim F, has_boxes, and `found` and `missing`, the records that a file has and that none has.

    Raises InputError if a file is missing or of an unknown layout, or if none of the photos is in the files.
    """

    def __init__(self, paths: Sequence[str], records: Sequence[ImageRecord]) -> None:
        self.paths, self.num_photos = paths, len(records)
        self.left_out = 0  # regions read whose boxes have no area in the image
        index = PhotoIndex(records)
        entries: dict[int, Entry] = {}  # by the index of the record; the first file that has a photo counts
        for path in paths:
            layout = open_layout(Path(path))
            for i, key in index.match_alike(layout, f"--region_features {path}").items():
                entries.setdefault(i, Entry(path, key, layout[key]))
        if not entries:
            raise InputError(f"--region_features {paths[0]}: has none of the photos, such as {records[0].name}")
        self.entries = {(records[i].path, records[i].row): entries[i] for i in sorted(entries)}
        self.found = [record for i, record in enumerate(records) if i in entries]
        self.missing = [record for i, record in enumerate(records) if i not in entries]
        first = self._first_readable()
        self.feature_dim, self.has_boxes = first.features.shape[1], first.boxes is not None
        self.bytes_of_first = len(first.features) * (2 * self.feature_dim + 16)  # in the prepared folder

    def _first_readable(self) -> Regions:
        """Read the first entry that is not damaged. Raises the InputError of the first if all are."""
        for entry in self.entries.values():
            with contextlib.suppress(InputError):
                return entry.read()
        return next(iter(self.entries.values())).read()

    def require_all(self) -> None:
        """Raise InputError, which lists the first ten, if photos are missing."""
        if self.missing:
            names = ", ".join(record.name for record in self.missing[:10])
            more = f" and {len(self.missing) - 10} more" if len(self.missing) > 10 else ""
            raise InputError(
                f"--region_features {' '.join(self.paths)}: {len(self.missing)} of {self.num_photos} photos are "
                f"missing: {names}{more}"
            )

    def read(self, record: ImageRecord, image_size: int, resize: str) -> tuple[np.ndarray, np.ndarray]:
        """Read features (N, F) float16 and boxes (N, 4) float32 of a photo.

        Boxes are in fractions of the sides of the square that `preparation.images.to_square` makes. If the file has
        none, each is that of the whole photo. Raises InputError if the features are damaged, of another size than the
        others, or of a larger photo.
        """
        entry = self.entries[record.path, record.row]
        regions = entry.read()
        if regions.features.shape[1] != self.feature_dim or (regions.boxes is not None) != self.has_boxes:
            boxes = "boxes" if regions.boxes is not None else "no boxes"
            raise entry.damaged(f"{regions.features.shape[1]} features and {boxes}, unlike the others")
        with np.errstate(over="ignore"):
            features = regions.features.astype(np.float16)
        if not np.isfinite(features).all():
            raise entry.damaged("features that are not finite, or too large for float16")
        if regions.boxes is None:
            return features, np.tile(np.array([0, 0, 1, 1], np.float32), (len(features), 1))
        photo_size = record.photo_size()
        if not photo_size:
            raise entry.damaged(f"boxes, and {record.path} is not readable")
        size = regions.size or photo_size
        with np.errstate(divide="ignore", invalid="ignore"):
            boxes = regions.boxes.astype(np.float64) / [*size, *size]
        if not (boxes.min() >= -TOLERANCE and boxes.max() <= 1 + TOLERANCE):  # also true of nan
            problem = f"boxes beyond its {size[0]} x {size[1]} pixels: give the photos that they were found in"
            raise entry.damaged(problem)
        items = [{"box": box, "row": row} for row, box in enumerate(boxes.tolist())]
        placed = place_objects(items, photo_size, image_size, resize)
        if not placed:
            raise entry.damaged("no box with an area in the image")
        self.left_out += len(items) - len(placed)
        return features[[item["row"] for item in placed]], np.array([item["box"] for item in placed], np.float32)

    def describe(self) -> str:
        """Describe the features that were read in one line."""
        boxes = "with boxes" if self.has_boxes else "without boxes"
        left_out = f", {self.left_out} regions without area are left out" if self.left_out else ""
        return f"region features: {self.feature_dim} of each region, {boxes}{left_out}"
