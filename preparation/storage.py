"""Prepared folders: what create_input_files.py writes and everything else reads."""

import contextlib
import hashlib
import itertools
import json
import math
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
METADATA_KEYS = {"image_size", "resize", "splits", "digest", "files", "source"}  # of dataset.json


def read_metadata(data_folder: str | Path) -> dict[str, Any]:
    """The dataset.json of a prepared folder: image_size, resize, source (the settings that it is made from), digest
    (of all images, captions and words; a copy has the same) and, for each split, images, captions and digest.

    It is written last, so a folder without it is incomplete. Raises InputError for that, and for another file.
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
    if not isinstance(metadata, dict) or not metadata.keys() >= METADATA_KEYS:
        raise InputError(
            f"{folder / 'dataset.json'} was not written by this create_input_files.py: run it again with --overwrite"
        )
    return metadata


class PackedCaptions:
    """The captions of a split in three arrays: item i is those of image i, each a list of word ids.

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
        """The number of captions of all images."""
        return len(self.caption_offsets) - 1

    def lengths(self) -> np.ndarray:
        """The number of words of each caption, (captions,)."""
        return np.diff(self.caption_offsets)

    def counts(self) -> Counter[str]:
        """How often each word occurs."""
        counts = np.bincount(self.word_ids, minlength=len(self.idx2word)).tolist()
        return Counter(dict(zip(self.idx2word, counts, strict=True)))

    def decode(self) -> list[list[list[str]]]:
        """For each image its captions as lists of strings."""
        return [[[self.idx2word[word_id] for word_id in caption] for caption in captions] for captions in self]

    def encode(self, vocabulary: Vocabulary) -> "PackedCaptions":
        """The same captions in a vocabulary's word ids, between <start> and <end>."""
        to_vocabulary = np.array([vocabulary.word_id(word) for word in self.idx2word], np.int32)
        offsets = self.caption_offsets + 2 * np.arange(self.num_captions() + 1)
        word_ids, is_word = np.empty(offsets[-1], np.int32), np.ones(offsets[-1], bool)
        for indices, token_id in ((offsets[:-1], START), (offsets[1:] - 1, END)):
            word_ids[indices], is_word[indices] = token_id, False
        word_ids[is_word] = to_vocabulary[self.word_ids]
        return PackedCaptions(vocabulary.idx2word, word_ids, offsets, self.image_offsets)


class PackedObjects:
    """The objects of a split in arrays: item i is the list of those of image i, as its entry in the captions file has
    them: dictionaries of "words", a "box" and, where it was detected, a "score".

    Lists of dictionaries take ten times the memory.
    """

    def __init__(self) -> None:
        self.words: list[list[str]] = []  # that name objects, each once
        self.known = True  # whether all images say which objects they have
        self._word_indices: dict[str, int] = {}
        self._names, self._boxes, self._scores = array("i"), array("d"), array("d")  # score nan: none
        self._offsets = array("q", [0])  # image i has the objects offsets[i] to offsets[i + 1]

    def append(self, objects: list[dict[str, Any]] | None) -> None:
        """Add the objects of the next image; None where they are not known."""
        self.known &= objects is not None
        for item in objects or []:
            name = " ".join(item["words"])
            if name not in self._word_indices:
                self._word_indices[name] = len(self.words)
                self.words.append(item["words"])
            self._names.append(self._word_indices[name])
            self._boxes.extend(item["box"])
            self._scores.append(item.get("score", math.nan))
        self._offsets.append(len(self._names))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        found = []
        for i in range(self._offsets[index], self._offsets[index + 1]):
            item = {"words": self.words[self._names[i]], "box": self._boxes[4 * i : 4 * i + 4].tolist()}
            found.append(item | ({} if math.isnan(self._scores[i]) else {"score": self._scores[i]}))
        return found

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        return map(self.__getitem__, range(len(self)))

    def any(self) -> bool:
        """Whether there is an object, and all images say which they have."""
        return self.known and len(self._names) > 0

    def boxes(self, index: int) -> np.ndarray:
        """The boxes of an image's objects, (N, 4) float32."""
        first, last = self._offsets[index], self._offsets[index + 1]
        return np.array(self._boxes[4 * first : 4 * last], np.float32).reshape(-1, 4)

    def names(self, index: int, of_words: list[Any], min_score: float) -> list[Any]:
        """For each of an image's objects the item of `of_words` at its index in `words`; [] for a lower score."""
        objects = range(self._offsets[index], self._offsets[index + 1])
        return [of_words[self._names[i]] if not self._scores[i] < min_score else [] for i in objects]


class SplitContent(NamedTuple):
    """What a split's captions file holds of its images, in order."""

    entries: list[dict[str, Any]]  # [{"image", "image_id"}]
    captions: PackedCaptions
    objects: PackedObjects


def read_captions(data_folder: str | Path, split: str, metadata: dict[str, Any] | None = None) -> SplitContent:
    """One split's images in order, their captions and their objects.

    `metadata` is the folder's where it is read already. Raises InputError where the split is empty or the files are
    not those that dataset.json describes.
    """
    metadata = metadata or read_metadata(data_folder)
    described = metadata["splits"][split]
    if not described["images"]:
        filled = " ".join(name for name in SPLITS if metadata["splits"][name]["images"])
        raise InputError(f"the {split} split of {data_folder} is empty (filled: {filled})")
    images_path = Path(data_folder) / f"{split}_images.hdf5"
    captions_path, entries, objects = Path(data_folder) / f"{split}_captions.json", [], PackedObjects()
    captions = PackedCaptions.pack(iter_captions(captions_path, entries, objects))
    try:
        with open_images(images_path) as images:
            stored = (images.shape[0], images.file.attrs.get("digest"))
    except (OSError, KeyError, AttributeError):
        raise InputError(
            f"{images_path} is missing or damaged: run create_input_files.py again with --overwrite"
        ) from None
    images_match = stored == (described["images"], described["digest"])
    captions_match = len(entries) == described["images"]
    for path, matches in ((images_path, images_match), (captions_path, captions_match)):
        if not matches:
            raise InputError(
                f"{path} is not the file that dataset.json describes: run create_input_files.py again with --overwrite"
            )
    return SplitContent(entries, captions, objects)


@contextlib.contextmanager
def open_images(path: Path) -> Iterator[h5py.Dataset]:
    """Open the data set `images` of an HDF5 file.

    Raises OSError or KeyError where there is none, and InputError where its content lies in other files: HDF5 would
    read any file that it names, and somebody's private file would become pixels.
    """
    with h5py.File(path) as file:
        yield own_array(file, "images")


def own_array(file: h5py.File, name: str) -> h5py.Dataset:
    """A data set of an HDF5 file; KeyError where there is none, InputError where its content lies in other files."""
    is_link = isinstance(file.get(name, getlink=True), (h5py.SoftLink, h5py.ExternalLink))
    array: Any = None if is_link else file[name]
    if is_link or (isinstance(array, h5py.Dataset) and (array.external or array.is_virtual)):
        raise InputError(f"{file.filename} is refused: its {name} are a link or lie in other files, copy them into it")
    return array


class RegionInfo(NamedTuple):
    """What a prepared folder's region features are."""

    feature_dim: int
    has_boxes: bool  # else every region has the box of the whole photo


def region_info(metadata: dict[str, Any]) -> RegionInfo | None:
    """What dataset.json says of region features; None where the folder has none. InputError where it is damaged."""
    if "region_features" not in metadata:
        return None
    try:
        return RegionInfo(**metadata["region_features"])
    except TypeError:
        raise InputError(
            "the region features in dataset.json were not written by this create_input_files.py: run it again with "
            "--overwrite"
        ) from None


class RegionWriter:
    """Writes the region features of a split, image by image; `StoredRegions` reads them."""

    def __init__(self, file: h5py.File, feature_dim: int) -> None:
        self.file, self.digest, self.offsets = file, hashlib.sha256(), [0]
        self.arrays = [
            file.create_dataset(name, (0, width), dtype, chunks=(CHUNK_REGIONS, width), maxshape=(None, width))
            for name, width, dtype in (("features", feature_dim, np.float16), ("boxes", 4, np.float32))
        ]

    def append(self, features: np.ndarray, boxes: np.ndarray) -> None:
        """Add the next image's features (N, F) float16 and boxes (N, 4) float32."""
        self.offsets.append(self.offsets[-1] + len(features))
        for stored, values in zip(self.arrays, (features, boxes), strict=True):
            stored.resize(self.offsets[-1], axis=0)
            stored[self.offsets[-2] :] = values
            self.digest.update(values.tobytes())

    def finish(self) -> str:
        """Write where the images begin; returns a digest of all, which the file has as well."""
        self.file["offsets"] = np.array(self.offsets)
        self.file.attrs["digest"] = self.digest.hexdigest()
        return self.digest.hexdigest()


class StoredRegions:
    """The region features of a split as `RegionWriter` wrote them: item i is of image i.

    An item has features (N, F) float16 and boxes (N, 4) float32 in fractions of the sides; N differs. `metadata` is
    the folder's. Raises InputError where the file is not the one that it describes.
    """

    def __init__(self, data_folder: str | Path, split: str, metadata: dict[str, Any]) -> None:
        path, described = Path(data_folder) / f"{split}_regions.hdf5", metadata["splits"][split]
        try:
            file = h5py.File(path)
            self.features, self.boxes, offsets = (own_array(file, name) for name in ("features", "boxes", "offsets"))
            self.offsets, digest = offsets[:], file.attrs.get("digest")
        except (OSError, KeyError, AttributeError):
            raise InputError(
                f"{path} is missing or damaged: run create_input_files.py again with --overwrite"
            ) from None
        if (len(self.offsets), digest) != (described["images"] + 1, described.get("regions_digest")):
            raise InputError(
                f"{path} is not the file that dataset.json describes: run create_input_files.py again with --overwrite"
            )

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        regions = slice(self.offsets[index], self.offsets[index + 1])
        return self.features[regions], self.boxes[regions]


def write_captions(path: str | Path, entries: Iterable[dict[str, Any]]) -> None:
    """Write the images of a split as JSON, one per line, so that they can be read one at a time."""
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write("[")
        for i, entry in enumerate(entries):
            file.write(f"{',' if i else ''}\n{json.dumps(entry, ensure_ascii=False)}")
        file.write("\n]\n")


def iter_captions(path: str | Path, entries: list[dict[str, Any]], objects: PackedObjects) -> Iterator[list[list[str]]]:
    """Yield each image's captions from what `write_captions` wrote; its objects and the rest of it are appended.

    Raises InputError where the file is missing or damaged.
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
        raise InputError(f"no such file: {path}: run create_input_files.py again with --overwrite") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(
            f"{path}, image {len(entries) + 1}: not valid JSON, run create_input_files.py again with --overwrite"
        ) from None
