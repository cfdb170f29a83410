"""Caption formats that are folders: photos with text files beside them, and data prepared by the PyTorch tutorial."""

from pathlib import Path
from typing import Any

from common.files import read_json
from preparation.records import ImageRecord, pack_captions, records_of
from preparation.storage import SPLITS, open_images
from preparation.text_formats import read_lines
from text.vocabulary import SPECIAL_TOKENS
from utils import InputError

PHOTO_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".gif",
    ".bmp",
    ".webp",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".jp2",
    ".avif",
    ".heic",
    ".heif",
)


def read_folder(path: Path, _: Path) -> list[ImageRecord]:
    """Read a folder and its subfolders: photos with captions beside them, dog.jpg and dog.txt, one caption per line.

    Hidden files and folders are skipped. Raises InputError if there is no photo, or if a name is not UTF-8.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file())
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    texts = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
    captions, unpaired = {}, set(texts.values())
    for file in files:
        if file.suffix.lower() in PHOTO_SUFFIXES:
            name, text = file.relative_to(path).as_posix(), texts.get(file.with_suffix(""))
            try:
                name.encode()
            except UnicodeError:
                raise InputError(f"{name!r}: its name is not UTF-8, rename it") from None
            captions[name] = [line for line in read_lines(text) if line.strip()] if text else []
            unpaired.discard(text)
    if not captions:
        raise InputError(f"{path} has no photos ({' '.join(PHOTO_SUFFIXES)})")
    if unpaired:
        print(f"{len(unpaired)} .txt files have no photo beside them, such as {min(unpaired).name!r}")
    return records_of(captions, path)


# ------------------------------------------------------------------------------------------------ the tutorial's


def read_tutorial(path: Path, _: Path) -> list[ImageRecord]:
    """Read a folder written by the create_input_files.py of the widely used PyTorch tutorial; its <unk> are kept.

    Raises InputError if the folder is incomplete or damaged, or holds several data sets.
    """
    name, word2idx = read_word_map(path)
    idx2word = {index: word for word, index in word2idx.items()}
    records = []
    for split in SPLITS:
        records += _read_tutorial_split(path, name, split, idx2word, first_id=len(records))
    if not records:
        raise InputError(f"{path} has a word map, but no images in TRAIN_IMAGES_{name}.hdf5 and the like")
    return records


def _read_tutorial_split(
    path: Path, name: str, split: str, idx2word: dict[int, str], first_id: int
) -> list[ImageRecord]:
    """Read the records of a split, with ids counted from `first_id`; [] if the folder lacks the split."""
    suffixes = {"IMAGES": "hdf5", "CAPTIONS": "json", "CAPLENS": "json"}
    files = [path / f"{split.upper()}_{kind}_{name}.{suffix}" for kind, suffix in suffixes.items()]
    if not any(file.is_file() for file in files):
        return []
    if missing := [file for file in files if not file.is_file()]:
        raise InputError(f"{path} has only part of its {split} split: {missing[0].name} is missing")
    images_path, captions_path, lengths_path = files
    num_images, per_image = _read_tutorial_images(images_path)
    encoded, lengths = read_json(captions_path), read_json(lengths_path)
    try:
        if per_image < 1 or not len(encoded) == len(lengths) == num_images * per_image:
            raise TypeError
        words = [  # without <start> and <end>
            [idx2word[word_id] for word_id in caption[1 : length - 1]]
            for caption, length in zip(encoded, lengths, strict=True)
        ]
    except (KeyError, TypeError):
        raise InputError(f"{captions_path}, {images_path.name} and the word map do not belong together") from None
    captions = [{"words": caption, "raw": " ".join(caption)} for caption in words]
    records = []
    for row in range(num_images):
        kept = [caption for caption in captions[row * per_image : (row + 1) * per_image] if caption["words"]]
        name = f"{split} {row}"
        records.append(ImageRecord(images_path, name, first_id + row, split, pack_captions(kept), row=row))
    return records


def _read_tutorial_images(path: Path) -> tuple[int, int]:
    """Read the number of images, and of captions per image, of one of the tutorial's HDF5 files."""
    try:
        with open_images(path) as images:
            per_image: Any = images.file.attrs["captions_per_image"]
            shape, per_image = images.shape, int(per_image)
            is_square = len(shape) == 4 and shape[1] == 3 and shape[2] == shape[3] > 0
            if images.dtype != "uint8" or not is_square:
                raise TypeError
    except InputError:
        raise
    except (OSError, KeyError, TypeError, AttributeError, ValueError, OverflowError):
        raise InputError(f"{path} is damaged, or has no square uint8 images and captions_per_image") from None
    return shape[0], per_image


def read_word_map(path: Path) -> tuple[str, dict[str, int]]:
    """Read the name of the tutorial's data set and its word map. Raises InputError if there is none, or several."""
    found = sorted(path.glob("WORDMAP_*.json"))
    if len(found) != 1:
        raise InputError(f"{path} has {len(found)} files WORDMAP_*.json: a folder must hold one data set")
    word2idx = read_json(found[0])
    if (
        not isinstance(word2idx, dict)
        or not word2idx.keys() >= set(SPECIAL_TOKENS)
        or not all(isinstance(index, int) for index in word2idx.values())
    ):
        raise InputError(f"{found[0]} is not a word map that contains {' '.join(SPECIAL_TOKENS)}")
    return found[0].stem.removeprefix("WORDMAP_"), word2idx


def tutorial_words(path: Path) -> list[str]:
    """Read the words of the tutorial's folder in the order of their ids, without special tokens."""
    word2idx = read_word_map(path)[1]
    return [word for word in sorted(word2idx, key=word2idx.__getitem__) if word not in SPECIAL_TOKENS]
