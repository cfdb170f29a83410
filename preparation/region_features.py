"""Region features that a detector has computed, in the files in which people have them, recognized by their content.

- a folder with an array per photo, ID.npz with the key `feat` or ID.npy, and its boxes in the folder beside it
  (ruotianluo/ImageCaptioning.pytorch: cocobu_att, cocobu_box);
- tab-separated values with base64 (peteanderson80/bottom-up-attention);
- HDF5 with ID_features and ID_boxes (aimagelab/meshed-memory-transformer);
- HDF5 with one array of all photos (hengyuan-hu/bottom-up-attention-vqa), whose ids a JSON file gives.

Shapes: N regions of a photo, F features of a region. A box is left, top, right, bottom.
"""

import base64
import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import h5py
import numpy as np
from tqdm import tqdm

from common.files import did_you_mean, read_json
from preparation.images import place_objects
from preparation.photo_index import PhotoIndex, record_size
from preparation.records import ImageRecord
from preparation.storage import own_array
from utils import InputError, first_line

MAX_REGIONS = 1000  # of a photo
TOLERANCE = 0.02  # by how much of the photo's side boxes may reach beyond it: they are rounded
TSV_FIELDS = 6  # image_id, image_w, image_h, num_boxes, boxes, features
HDF5_START = b"\x89HDF\r\n\x1a\n"


class RegionSet(NamedTuple):
    """The regions of a photo."""

    features: np.ndarray  # (N, F) float32
    boxes: np.ndarray | None  # (N, 4) float32; None: the file has none
    size: tuple[float, float] | None = None  # what the boxes are fractions of, width and height; None: of the photo's


class Reader(Protocol):
    """A file of region features: what it calls its photos, and their regions."""

    path: Path

    def photos(self) -> Iterable[str]:
        """The ids or file names of the photos."""
        ...

    def read(self, key: str) -> RegionSet:
        """The regions of a photo. ValueError, OSError or KeyError where they are damaged or of another form."""
        ...


class FolderReader:
    """A folder with a file per photo: ID.npz or ID.npy, an array (N, F), (rows, columns, F) of a grid, or (F,)."""

    def __init__(self, path: Path) -> None:
        path = Path(os.path.abspath(path))  # "." has no name, and a link keeps its own
        inner = [each for each in sorted(path.glob("*_att")) if each.is_dir()]
        if len(inner) > 1:
            raise InputError(f"--region_features {path}: has {' and '.join(each.name for each in inner)}, give one")
        self.path = inner[0] if inner else path
        boxes = self.path.with_name(f"{self.path.name.removesuffix('_att')}_box")
        self.boxes = boxes if boxes.is_dir() and boxes != self.path else None
        self.files = {file.stem: file for file in self.path.iterdir() if file.suffix in (".npz", ".npy")}
        if not self.files:
            raise InputError(f"--region_features {path}: no .npz or .npy files in this folder")

    def photos(self) -> Iterable[str]:
        """As `Reader.photos`."""
        return self.files

    def read(self, key: str) -> RegionSet:
        """As `Reader.read`."""
        features = _load_array(self.files[key], "feat")
        if features.ndim == 3:
            rows, columns = features.shape[:2]
            return RegionSet(features.reshape(rows * columns, -1), _grid_boxes(rows, columns), (1, 1))
        if features.ndim == 1:
            return RegionSet(features[None], None)
        return RegionSet(features, _load_array(self.boxes / f"{key}.npy", "") if self.boxes else None)


class TsvReader:
    """Tab-separated values without a header, the boxes and features of a photo as base64 of float32."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offsets: dict[str, int] = {}  # of the photos' lines
        position, size = 0, path.stat().st_size
        with open(path, "rb") as file, tqdm(total=size, desc=path.name, unit="B", unit_scale=True, leave=False) as bar:
            for line_number, line in enumerate(file, start=1):
                if line.count(b"\t") != TSV_FIELDS - 1:
                    raise InputError(
                        f"--region_features {path}, line {line_number}: not {TSV_FIELDS} fields between tabs, "
                        f"is this a file of region features?"
                    )
                self.offsets.setdefault(line[: line.index(b"\t")].decode(errors="replace"), position)
                position += len(line)
                bar.update(len(line))

    def photos(self) -> Iterable[str]:
        """As `Reader.photos`."""
        return self.offsets

    def read(self, key: str) -> RegionSet:
        """As `Reader.read`."""
        with open(self.path, "rb") as file:
            file.seek(self.offsets[key])
            _, width, height, count, boxes, features = file.readline().split(b"\t")
        if min(int(width), int(height)) < 1:
            raise ValueError(f"a photo of {int(width)} x {int(height)} pixels")
        arrays = [np.frombuffer(base64.decodebytes(field), np.float32) for field in (boxes, features)]
        return RegionSet(arrays[1].reshape(int(count), -1), arrays[0].reshape(int(count), 4), (int(width), int(height)))


class KeyedReader:
    """HDF5 with two arrays per photo, ID_features (N, F) and ID_boxes (N, 4)."""

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path, self.file = path, file

    def photos(self) -> Iterable[str]:
        """As `Reader.photos`."""
        return [name.removesuffix("_features") for name in map(str, self.file) if name.endswith("_features")]

    def read(self, key: str) -> RegionSet:
        """As `Reader.read`."""
        features, boxes = own_array(self.file, f"{key}_features"), None
        if f"{key}_boxes" in self.file:
            boxes = own_array(self.file, f"{key}_boxes")[:]
        return RegionSet(features[:], boxes)


class StackedReader:
    """HDF5 with arrays of all photos: image_features (I, N, F), image_bb (I, N, 4), spatial_features (I, N, 6).

    The first four of the spatial features are the box in fractions of the sides. Which photo is which row stands in
    NAME.json or NAME_imgid2idx.json: an object from ids to rows, or a list of ids.
    """

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path = path
        self.features = own_array(file, "image_features")
        if self.features.ndim != 3:
            raise InputError(
                f"--region_features {path}: image_features has {self.features.ndim} axes, not photos, regions and "
                f"features; files with different numbers of regions (pos_boxes) are not read"
            )
        name = next((name for name in ("spatial_features", "image_bb") if name in file), None)
        self.boxes = own_array(file, name) if name else None
        self.size = (1, 1) if name == "spatial_features" else None
        names = [path.with_name(f"{path.stem}{end}") for end in (".json", "_imgid2idx.json")]
        found = next((each for each in names if each.is_file()), None)
        if not found:
            raise InputError(
                f"--region_features {path}: its rows have no ids, give them as {names[1].name} beside it, a JSON "
                f"object from ids to rows. A pickle of them is not read, it may run code: convert your own with "
                f'python -c \'import json, pickle, sys; json.dump(pickle.load(open(sys.argv[1], "rb")), '
                f'open(sys.argv[2], "w"))\' {names[1].stem}.pkl {names[1].name}'
            )
        rows = read_json(found)
        rows = {str(key): row for row, key in enumerate(rows)} if isinstance(rows, list) else rows
        valid = isinstance(rows, dict) and all(
            type(row) is int and 0 <= row < len(self.features) for row in rows.values()
        )
        if not valid:
            raise InputError(f"{found}: not a JSON object from ids to rows of {path.name}, below {len(self.features)}")
        self.rows = rows

    def photos(self) -> Iterable[str]:
        """As `Reader.photos`."""
        return self.rows

    def read(self, key: str) -> RegionSet:
        """As `Reader.read`."""
        row = self.rows[key]
        boxes = None if self.boxes is None else self.boxes[row][:, :4]
        return RegionSet(self.features[row], boxes, self.size)


def _load_array(path: Path, key: str) -> np.ndarray:
    """An array from .npy, or from .npz under a key; nothing in it can run code."""
    loaded = np.load(path, allow_pickle=False)
    return loaded if isinstance(loaded, np.ndarray) else loaded[key]


def _grid_boxes(rows: int, columns: int) -> np.ndarray:
    """As `modules.regions.grid_boxes`, which data must not import: (rows * columns, 4) in fractions of the sides."""
    top, left = np.mgrid[:rows, :columns].reshape(2, -1)
    return np.stack([left / columns, top / rows, (left + 1) / columns, (top + 1) / rows], axis=1)


def open_reader(path: Path) -> Reader:
    """Recognize a file or folder of region features. Raises InputError where there is none, or of an unknown form."""
    if path.is_dir():
        return FolderReader(path)
    if not path.is_file():
        raise InputError(f"--region_features {path}: no such file or folder{did_you_mean(str(path))}")
    with open(path, "rb") as file:
        is_hdf5 = file.read(len(HDF5_START)) == HDF5_START
    if not is_hdf5:
        return TsvReader(path)
    try:
        file = h5py.File(path)
        if "image_features" in file:
            return StackedReader(path, file)
        if any(str(name).endswith("_features") for name in file):
            return KeyedReader(path, file)
    except (OSError, KeyError) as error:
        raise InputError(f"--region_features {path}: a damaged HDF5 file: {error}") from None
    raise InputError(f"--region_features {path}: has neither image_features nor ID_features, whose features are these?")


class RegionFeatures:
    """The region features of photos, from one file or from several.

    Attributes: feature_dim F, has_boxes, and `missing`, the records that no file has.

    Raises InputError where a file is missing or of an unknown form, or where none of the photos is in the files.
    """

    def __init__(self, paths: Sequence[str], records: Sequence[ImageRecord]) -> None:
        self.paths, self.num_photos = paths, len(records)
        self.left_out = 0  # regions that were read and whose boxes have no area in the image
        index = PhotoIndex(records)
        found: dict[int, tuple[Reader, str]] = {}
        for reader in [open_reader(Path(path)) for path in paths]:
            keys = index.find_all(reader.photos(), f"--region_features {reader.path}")
            found = {i: (reader, key) for i, key in keys.items()} | found
        self.found = {(records[i].path, records[i].row): entry for i, entry in found.items()}
        self.missing = [record for i, record in enumerate(records) if i not in found]
        if not found:
            raise InputError(f"--region_features {paths[0]}: has none of the photos, such as {records[0].name}")
        first = self._first_readable([found[i] for i in sorted(found)])
        self.feature_dim, self.has_boxes = first.features.shape[1], first.boxes is not None
        self.bytes_of_first = len(first.features) * (2 * self.feature_dim + 16)  # as they are stored

    def _first_readable(self, entries: Sequence[tuple[Reader, str]]) -> RegionSet:
        """The first entry that is not damaged. Raises the InputError of the last one where all are."""
        for entry in entries[:-1]:
            with contextlib.suppress(InputError):
                return self._read(*entry)
        return self._read(*entries[-1])

    def has(self, record: ImageRecord) -> bool:
        """Whether a file has the record's photo."""
        return (record.path, record.row) in self.found

    def require_all(self) -> None:
        """Raise InputError, which lists the first ten, where photos are missing."""
        if self.missing:
            names = ", ".join(record.name for record in self.missing[:10])
            more = f" and {len(self.missing) - 10} more" if len(self.missing) > 10 else ""
            raise InputError(
                f"--region_features {' '.join(self.paths)}: {len(self.missing)} of {self.num_photos} photos are "
                f"missing: {names}{more}"
            )

    def read(self, record: ImageRecord, image_size: int, resize: str) -> tuple[np.ndarray, np.ndarray]:
        """Features (N, F) float16 of a record's photo, and boxes (N, 4) float32 in fractions of the square's sides.

        The square is that of `preparation.images.to_square`. Without boxes in the file, each is of the whole photo.
        Raises InputError where the features are damaged, of another size than the others', or of a larger photo.
        """
        reader, key = self.found[record.path, record.row]
        regions = self._read(reader, key)
        if regions.features.shape[1] != self.feature_dim or (regions.boxes is not None) != self.has_boxes:
            boxes = "boxes" if regions.boxes is not None else "no boxes"
            raise _damaged(reader, key, f"{regions.features.shape[1]} features and {boxes}, unlike the others")
        with np.errstate(over="ignore"):
            features = regions.features.astype(np.float16)
        if not np.isfinite(features).all():
            raise _damaged(reader, key, "features that are not finite, or too large for float16")
        if regions.boxes is None:
            return features, np.tile(np.array([0, 0, 1, 1], np.float32), (len(features), 1))
        photo_size = record_size(record)
        if not photo_size:
            raise _damaged(reader, key, f"boxes, and {record.path} is not readable")
        size = regions.size or photo_size
        boxes = regions.boxes.astype(np.float64) / [*size, *size]
        if not (boxes.min() >= -TOLERANCE and boxes.max() <= 1 + TOLERANCE):  # also true of nan
            problem = f"boxes beyond its {size[0]} x {size[1]} pixels: give the photos that they were found in"
            raise _damaged(reader, key, problem)
        items = [{"box": box, "row": row} for row, box in enumerate(boxes.tolist())]
        placed = place_objects(items, photo_size, image_size, resize)
        if not placed:
            raise _damaged(reader, key, "no box with an area in the image")
        self.left_out += len(items) - len(placed)
        return features[[item["row"] for item in placed]], np.array([item["box"] for item in placed], np.float32)

    def describe(self) -> str:
        """One line on the features that were read."""
        boxes = "with boxes" if self.has_boxes else "without boxes"
        left_out = f", {self.left_out} regions without area are left out" if self.left_out else ""
        return f"region features: {self.feature_dim} of each region, {boxes}{left_out}"

    def _read(self, reader: Reader, key: str) -> RegionSet:
        """As the file has them; InputError where they are damaged."""
        try:
            regions = reader.read(key)
        except InputError:
            raise
        except Exception as error:  # a damaged file raises almost anything
            raise _damaged(reader, key, f"a damaged entry: {first_line(error)}") from None
        features, boxes = regions.features, regions.boxes
        if (
            features.ndim != 2
            or not 0 < len(features) <= MAX_REGIONS
            or features.dtype.kind != "f"
            or not features.size
        ):
            problem = (
                f"features {features.dtype} {features.shape}, not 1 to {MAX_REGIONS} rows of floating-point numbers"
            )
            raise _damaged(reader, key, problem)
        if boxes is not None and (boxes.shape != (len(features), 4) or boxes.dtype.kind not in "fiu"):
            raise _damaged(reader, key, f"{len(features)} features, but boxes {boxes.dtype} {boxes.shape}")
        return regions


def _damaged(reader: Reader, key: str, problem: str) -> InputError:
    return InputError(f"--region_features {reader.path}: photo {key} has {problem}")
