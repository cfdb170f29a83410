"""Prepared folders: create_input_files.py writes them, everything else reads them."""

import contextlib
import hashlib
import itertools
import json
import shlex
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from common.files import atomic_write, read_json
from text.vocabulary import END, START, Vocabulary
from utils import InputError

SPLITS = ("train", "val", "test")
CHUNK_REGIONS = 16  # of a file of region features: a photo has 10 to 100
MIN_SCORE = 0.3  # of a detected object that a noun may name; less certain ones are often wrong
METADATA_KEYS = {"image_size", "resize", "splits", "digest", "files", "source"}  # of dataset.json
AGAIN = "run create_input_files.py again with --overwrite"


def read_metadata(data_folder: str | Path) -> dict[str, Any]:
    """Read the dataset.json of a prepared folder.

    It has image_size, resize, source (the settings that the folder is made from), digest (of all images, captions and
    words, the same for a copy) and, for each split, images, captions and digest. It is written last: a folder without
    it is incomplete, an InputError. So is a file that create_input_files.py did not write.
    """
    folder = Path(data_folder)
    if not folder.is_dir():
        raise InputError(
            f"no data folder {folder}: run create_input_files.py --output_folder {shlex.quote(str(folder))} first"
        )
    if not (folder / "dataset.json").is_file():
        raise InputError(
            f"{folder} is not a complete data folder, it has no dataset.json: run create_input_files.py, or give the "
            f"folder that it wrote"
        )
    metadata = read_json(folder / "dataset.json")
    try:
        region_info(metadata)
        is_own = metadata.keys() >= METADATA_KEYS and metadata["splits"].keys() == set(SPLITS)
    except (TypeError, AttributeError):
        is_own = False
    if not is_own:
        raise InputError(f"{folder}: dataset.json is not one of create_input_files.py: run it again with --overwrite")
    return metadata


# ------------------------------------------------------------------------------------------------ captions, objects


class PackedCaptions:
    """The captions of a split in three arrays: item i has those of image i, each a list of word ids.

    Lists of strings take ten times the memory, which matters for COCO's 616,000 captions.
    """

    def __init__(
        self, idx2word: list[str], word_ids: np.ndarray, caption_offsets: np.ndarray, image_offsets: np.ndarray
    ) -> None:
        self.idx2word = idx2word  # the split's own words after `pack`, a vocabulary's after `encode`
        self.word_ids = word_ids  # of all captions, concatenated
        self.caption_offsets = caption_offsets  # caption j is word_ids[caption_offsets[j] : caption_offsets[j + 1]]
        self.image_offsets = image_offsets  # image i has the captions image_offsets[i] to image_offsets[i + 1]

    @classmethod
    def pack(cls, images: Iterable[list[list[str]]]) -> "PackedCaptions":
        """Pack the captions of each image, given as lists of strings."""
        word2idx, word_ids, caption_offsets, image_offsets = {}, array("i"), array("q", [0]), array("q", [0])
        for captions in images:
            for caption in captions:
                word_ids.extend([word2idx.setdefault(word, len(word2idx)) for word in caption])
                caption_offsets.append(len(word_ids))
            image_offsets.append(len(caption_offsets) - 1)
        return cls(list(word2idx), np.asarray(word_ids), np.asarray(caption_offsets), np.asarray(image_offsets))

    def __len__(self) -> int:
        return len(self.image_offsets) - 1

    def __getitem__(self, index: int) -> list[list[int]]:
        first, last = self.image_offsets[index], self.image_offsets[index + 1]
        offsets = self.caption_offsets[first : last + 1].tolist()
        return [self.word_ids[start:end].tolist() for start, end in itertools.pairwise(offsets)]

    def __iter__(self) -> Iterator[list[list[int]]]:
        return map(self.__getitem__, range(len(self)))

    def num_captions(self) -> int:
        """Return the number of captions of all images."""
        return len(self.caption_offsets) - 1

    def lengths(self) -> np.ndarray:
        """Return the number of words of each caption, (captions,)."""
        return np.diff(self.caption_offsets)

    def counts(self) -> Counter[str]:
        """Count the words."""
        counts = np.bincount(self.word_ids, minlength=len(self.idx2word)).tolist()
        return Counter(dict(zip(self.idx2word, counts, strict=True)))

    def decode(self) -> list[list[list[str]]]:
        """Return the captions of each image as lists of strings."""
        return [[[self.idx2word[word_id] for word_id in caption] for caption in captions] for captions in self]

    def encode(self, vocabulary: Vocabulary) -> "PackedCaptions":
        """Return the same captions in the word ids of a vocabulary, between <start> and <end>."""
        to_vocabulary = np.array([vocabulary.word_id(word) for word in self.idx2word], np.int32)
        offsets = self.caption_offsets + 2 * np.arange(self.num_captions() + 1)
        word_ids, is_word = np.empty(offsets[-1], np.int32), np.ones(offsets[-1], bool)
        for indices, token_id in ((offsets[:-1], START), (offsets[1:] - 1, END)):
            word_ids[indices], is_word[indices] = token_id, False
        word_ids[is_word] = to_vocabulary[self.word_ids]
        return PackedCaptions(vocabulary.idx2word, word_ids, offsets, self.image_offsets)


class PackedObjects:
    """The objects of a split, stored as JSON: item i is the list of those of image i, decoded at each access.

    An object is a dictionary with "words", a "box" and, if it was detected, a "score". Lists of dictionaries take ten
    times the memory.
    """

    def __init__(self) -> None:
        self._images: list[bytes] = []
        self._all_known, self._any = True, False

    def append(self, objects: list[dict[str, Any]] | None) -> None:
        """Add the objects of the next image; None if they are unknown."""
        self._all_known &= objects is not None
        self._any |= bool(objects)
        self._images.append(json.dumps(objects or []).encode())

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        return json.loads(self._images[index])

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        return map(json.loads, self._images)

    def any(self) -> bool:
        """Return True if there is an object and the objects of all images are known."""
        return self._all_known and self._any


class SplitContent(NamedTuple):
    """The content of a split's captions file."""

    entries: list[dict[str, Any]]  # [{"image", "image_id"}]
    captions: PackedCaptions
    objects: PackedObjects


def read_captions(data_folder: str | Path, split: str, metadata: dict[str, Any] | None = None) -> SplitContent:
    """Read the images of a split in order, with their captions and objects.

    `metadata` is that of the folder, if it has been read already. Raises InputError if the split is empty or if its
    files are not the ones that dataset.json describes.
    """
    folder, metadata = Path(data_folder), metadata or read_metadata(data_folder)
    described = metadata["splits"][split]
    if not described["images"]:
        filled = " ".join(name for name in SPLITS if metadata["splits"][name]["images"])
        raise InputError(f"the {split} split of {data_folder} is empty (filled: {filled})")
    images_path, captions_path = folder / f"{split}_images.hdf5", folder / f"{split}_captions.json"
    entries, objects = [], PackedObjects()
    captions = PackedCaptions.pack(iter_captions(captions_path, entries, objects))
    with _name_damage(images_path), open_images(images_path) as images:
        stored = (images.shape[0], images.file.attrs.get("digest"))
    _require_described(images_path, stored == (described["images"], described["digest"]))
    _require_described(captions_path, len(entries) == described["images"])
    return SplitContent(entries, captions, objects)


def write_captions(path: str | Path, entries: Iterable[dict[str, Any]]) -> None:
    """Write the images of a split as JSON, one per line, which `iter_captions` reads one at a time."""
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write("[")
        for i, entry in enumerate(entries):
            file.write(f"{',' if i else ''}\n{json.dumps(entry, ensure_ascii=False)}")
        file.write("\n]\n")


def iter_captions(path: str | Path, entries: list[dict[str, Any]], objects: PackedObjects) -> Iterator[list[list[str]]]:
    """Yield the captions of each image in a file of `write_captions`.

    Its objects are appended to `objects`, the rest of it to `entries`. Raises InputError for a missing or damaged file.
    """
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                if line in ("[\n", "]\n"):
                    continue
                entry = json.loads(line.rstrip(",\n"))
                captions = [caption["words"] for caption in entry.pop("captions")]
                objects.append(entry.pop("objects", None))
                entries.append(entry)
                yield captions
    except FileNotFoundError:
        raise InputError(f"no such file: {path}: {AGAIN}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path}, image {len(entries) + 1}: not valid JSON, {AGAIN}") from None


# ------------------------------------------------------------------------------------------------ HDF5


@contextlib.contextmanager
def open_images(path: Path) -> Iterator[h5py.Dataset]:
    """Open the data set `images` of an HDF5 file. Raises OSError or KeyError if there is none, and as `own_array`."""
    with h5py.File(path) as file:
        yield own_array(file, "images")


def own_array(file: h5py.File, name: str) -> h5py.Dataset:
    """Return a data set of an HDF5 file, a KeyError if there is none.

    Raises InputError if its content lies in other files: HDF5 reads any file that it names, and somebody's private
    file would become pixels.
    """
    is_link = isinstance(file.get(name, getlink=True), (h5py.SoftLink, h5py.ExternalLink))
    array: Any = None if is_link else file[name]
    if is_link or (isinstance(array, h5py.Dataset) and (array.external or array.is_virtual)):
        raise InputError(
            f"{file.filename} is refused: {name} is a link or lies in other files, copy its content into the file"
        )
    return array


@contextlib.contextmanager
def _name_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, KeyError, AttributeError):
        raise InputError(f"{path} is missing or damaged: {AGAIN}") from None


def _require_described(path: Path, is_described: bool) -> None:
    if not is_described:
        raise InputError(f"{path} is not the file that dataset.json describes: {AGAIN}")


class RegionInfo(NamedTuple):
    """The form of a prepared folder's region features."""

    feature_dim: int
    has_boxes: bool  # False: each region has the box of the whole photo


def region_info(metadata: dict[str, Any]) -> RegionInfo | None:
    """Return what dataset.json says about region features; None if the folder has none."""
    return RegionInfo(**metadata["region_features"]) if "region_features" in metadata else None


class RegionWriter:
    """Writes the region features of a split, image by image; `StoredRegions` reads them."""

    def __init__(self, file: h5py.File, feature_dim: int) -> None:
        self.file, self.digest, self.offsets = file, hashlib.sha256(), [0]
        self.arrays = [
            file.create_dataset(name, (0, width), dtype, chunks=(CHUNK_REGIONS, width), maxshape=(None, width))
            for name, width, dtype in (("features", feature_dim, np.float16), ("boxes", 4, np.float32))
        ]

    def append(self, features: np.ndarray, boxes: np.ndarray) -> None:
        """Add the features (N, F) float16 and boxes (N, 4) float32 of the next image."""
        self.offsets.append(self.offsets[-1] + len(features))
        for stored, values in zip(self.arrays, (features, boxes), strict=True):
            stored.resize(self.offsets[-1], axis=0)
            stored[self.offsets[-2] :] = values
            self.digest.update(values.tobytes())

    def finish(self) -> str:
        """Write the offsets of the images and return a digest of the regions, which is also stored in the file."""
        self.file["offsets"] = np.array(self.offsets)
        self.file.attrs["digest"] = self.digest.hexdigest()
        return self.digest.hexdigest()


class StoredRegions:
    """The region features of a split, written by `RegionWriter`.

    Item i has the features (N, F) float16 and boxes (N, 4) float32, in fractions of the sides, of image i; N differs
    between images. Raises InputError if the file is not the one that the folder's `metadata` describes.
    """

    def __init__(self, data_folder: str | Path, split: str, metadata: dict[str, Any]) -> None:
        path, described = Path(data_folder) / f"{split}_regions.hdf5", metadata["splits"][split]
        with _name_damage(path):
            file = h5py.File(path)
            self.features, self.boxes = own_array(file, "features"), own_array(file, "boxes")
            self.offsets = own_array(file, "offsets")[:]
            stored = (len(self.offsets), file.attrs.get("digest"))
        _require_described(path, stored == (described["images"] + 1, described.get("regions_digest")))

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        regions = slice(self.offsets[index], self.offsets[index + 1])
        return self.features[regions], self.boxes[regions]
