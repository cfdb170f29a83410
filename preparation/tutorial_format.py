"""The prepared folder of the widely used PyTorch tutorial: images in HDF5, captions as word ids in JSON."""

from pathlib import Path
from typing import Any

from common.files import read_json
from preparation.records import ImageRecord, pack_captions
from preparation.storage import SPLITS, open_images
from text.vocabulary import SPECIAL_TOKENS
from utils import InputError


def read_tutorial(path: Path, _: Path) -> list[ImageRecord]:
    """Read a folder written by the create_input_files.py of the tutorial; its <unk> are kept.

    Raises InputError if the folder is incomplete or damaged, or holds several data sets.
    """
    name, word2idx = read_word_map(path)
    idx2word = {index: word for word, index in word2idx.items()}
    records = []
    for split in SPLITS:
        if any(path.glob(f"{split.upper()}_*_{name}.*")):
            records += _read_split(path, name, split, idx2word, first_id=len(records))
    if not records:
        raise InputError(f"{path} has a word map, but no images in TRAIN_IMAGES_{name}.hdf5 and the like")
    return records


def _read_split(path: Path, name: str, split: str, idx2word: dict[int, str], first_id: int) -> list[ImageRecord]:
    """Read the records of a split, with ids counted from `first_id`."""
    images_path = path / f"{split.upper()}_IMAGES_{name}.hdf5"
    encoded, lengths = (read_json(path / f"{split.upper()}_{kind}_{name}.json") for kind in ("CAPTIONS", "CAPLENS"))
    try:
        with open_images(images_path) as images:
            shape, dtype = images.shape, images.dtype
            per_image: Any = images.file.attrs["captions_per_image"]
        if dtype != "uint8" or len(shape) != 4 or shape[1] != 3 or not shape[2] == shape[3] > 0:
            raise TypeError
        if not len(encoded) == len(lengths) == shape[0] * int(per_image):
            raise TypeError
        captions = [  # without <start> and <end>
            [idx2word[word_id] for word_id in caption[1 : length - 1]]
            for caption, length in zip(encoded, lengths, strict=True)
        ]
    except InputError:
        raise
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise InputError(f"{images_path} is damaged, or does not belong to the captions and words beside it") from None
    records = []
    for row in range(shape[0]):
        kept = [words for words in captions[row * int(per_image) : (row + 1) * int(per_image)] if words]
        packed = pack_captions([{"words": words, "raw": " ".join(words)} for words in kept])
        records.append(ImageRecord(images_path, f"{split} {row}", first_id + row, split, packed, row=row))
    return records


def read_word_map(path: Path) -> tuple[str, dict[str, int]]:
    """Read the name of the tutorial's data set and its word map. Raises InputError if there is none, or several."""
    found = sorted(path.glob("WORDMAP_*.json"))
    if len(found) != 1:
        raise InputError(f"{path} has {len(found)} files WORDMAP_*.json: a folder must hold one data set")
    word2idx = read_json(found[0])
    is_map = isinstance(word2idx, dict) and word2idx.keys() >= set(SPECIAL_TOKENS)
    if not is_map or not all(isinstance(index, int) for index in word2idx.values()):
        raise InputError(f"{found[0]} is not a word map that contains {' '.join(SPECIAL_TOKENS)}")
    return found[0].stem.removeprefix("WORDMAP_"), word2idx


def tutorial_words(path: Path) -> list[str]:
    """Read the words of the tutorial's folder in the order of their ids, without special tokens."""
    word2idx = read_word_map(path)[1]
    return [word for word in sorted(word2idx, key=word2idx.__getitem__) if word not in SPECIAL_TOKENS]
