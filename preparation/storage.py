"""Prepared folders: what create_input_files.py writes, and everything else reads."""

import itertools
import json
from array import array
from collections import Counter
from pathlib import Path

import h5py
import numpy as np

from common.files import atomic_write, read_json
from text.vocabulary import END, START
from utils import InputError

SPLITS = ("train", "val", "test")


def read_metadata(data_folder):
    """The dataset.json of a prepared folder: image_size and, for each split, images, captions and digest.

    It is written last, so a folder without it is half-made. Raises InputError.
    """
    folder = Path(data_folder)
    if not folder.is_dir():
        raise InputError(f"no data folder {folder}: run create_input_files.py --output_folder {folder} first")
    if not (folder / "dataset.json").is_file():
        raise InputError(f"{folder} is not a complete data folder, it has no dataset.json: run create_input_files.py")
    metadata = read_json(folder / "dataset.json")
    if not isinstance(metadata, dict) or not metadata.keys() >= {"image_size", "splits", "source"}:
        raise InputError(f"{folder / 'dataset.json'} was not written by create_input_files.py: run it again")
    return {"resize": "squash"} | metadata  # a folder of an earlier version knew no other


class PackedCaptions:
    """The captions of a split in three arrays: item i is those of image i, each a list of word numbers.

    A list of strings a caption takes ten times the memory, which counts with COCO's 616,000 captions. The numbers are
    those of `words`, the split's own; `encoded` gives them as a vocabulary's.
    """

    def __init__(self, words, numbers, caption_offsets, image_offsets):
        self.words = words  # of this split
        self.word_ids = numbers  # of all words, one behind the other
        self.caption_offsets = caption_offsets  # places in numbers, a 0 first
        self.image_offsets = image_offsets  # places in caption_offsets, a 0 first

    @classmethod
    def pack(cls, images):
        """Of any iterable that yields, for each image, its captions as lists of strings."""
        known, numbers, caption_offsets, image_offsets = {}, array("i"), array("q", [0]), array("q", [0])
        for captions in images:
            for caption in captions:
                numbers.extend([known.setdefault(word, len(known)) for word in caption])
                caption_offsets.append(len(numbers))
            image_offsets.append(len(caption_offsets) - 1)
        return cls(list(known), *map(np.asarray, (numbers, caption_offsets, image_offsets)))

    def __len__(self):
        return len(self.image_offsets) - 1

    def __getitem__(self, index):
        first, last = self.image_offsets[index], self.image_offsets[index + 1]
        ends = self.caption_offsets[first : last + 1].tolist()
        return [self.word_ids[start:end].tolist() for start, end in itertools.pairwise(ends)]

    def __iter__(self):
        return map(self.__getitem__, range(len(self)))

    def num_captions(self):
        """The number of captions."""
        return len(self.caption_offsets) - 1

    def lengths(self):
        """The number of words of each caption, an array."""
        return np.diff(self.caption_offsets)

    def counts(self):
        """How often each word occurs, a Counter."""
        times = np.bincount(self.word_ids, minlength=len(self.words)).tolist()
        return Counter(dict(zip(self.words, times, strict=True)))

    def decode(self):
        """For each image its captions as lists of strings."""
        return [[[self.words[number] for number in caption] for caption in captions] for captions in self]

    def encode(self, vocabulary):
        """The same captions in a vocabulary's numbers, between <start> and <end>."""
        to_vocabulary = np.array([vocabulary.word_id(word) for word in self.words], np.int32)
        ends = self.caption_offsets + 2 * np.arange(self.num_captions() + 1)
        numbers, is_word = np.empty(ends[-1], np.int32), np.ones(ends[-1], bool)
        for places, number in ((ends[:-1], START), (ends[1:] - 1, END)):
            numbers[places], is_word[places] = number, False
        numbers[is_word] = to_vocabulary[self.word_ids]
        return PackedCaptions(vocabulary.idx2word, numbers, ends, self.image_offsets)


def read_captions(data_folder, split):
    """One split's images in order: [{"image", "image_id", and "objects" where known}], and their PackedCaptions.

    Raises InputError where the split is empty or the files are not those that dataset.json describes.
    """
    metadata = read_metadata(data_folder)
    if not metadata["splits"][split]["images"]:
        filled = " ".join(name for name in SPLITS if metadata["splits"][name]["images"])
        raise InputError(f"the {split} split of {data_folder} is empty (filled: {filled})")
    images_path = Path(data_folder) / f"{split}_images.hdf5"
    captions_path, entries = Path(data_folder) / f"{split}_captions.json", []
    captions = PackedCaptions.pack(iter_captions(captions_path, entries))
    try:
        with h5py.File(images_path) as file:
            found = (file["images"].shape[0], file.attrs.get("digest"))
    except (OSError, KeyError) as error:
        raise InputError(f"{images_path} is missing or damaged ({error}): run create_input_files.py again") from None
    images, digest = (metadata["splits"][split][name] for name in ("images", "digest"))
    for path, fits in ((images_path, found == (images, digest)), (captions_path, len(entries) == images)):
        if not fits:
            raise InputError(f"{path} is not the file that dataset.json describes: run create_input_files.py again")
    return entries, captions


def write_captions(path, entries):
    """Write the images of a split as JSON, each in a line of its own, so that one can be read at a time."""
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write("[")
        for i, entry in enumerate(entries):
            file.write(f"{',' if i else ''}\n{json.dumps(entry, ensure_ascii=False)}")
        file.write("\n]\n")


def iter_captions(path, entries):
    """Yield each image's captions from what `write_captions` wrote, and append all else of it to `entries`."""
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                if line in ("[\n", "]\n"):
                    continue
                content = json.loads(line.rstrip(",\n"))
                for entry in content if isinstance(content, list) else [content]:  # earlier versions: all in one line
                    captions = [caption["words"] for caption in entry.pop("captions")]
                    entries.append(entry)
                    yield captions
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(
            f"{path}, image {len(entries) + 1}: not valid JSON as create_input_files.py writes it, run it again"
        ) from None
