"""The photos to caption: named one by one, by their folder or on standard input, and loaded in batches."""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from preparation.images import PHOTO_SUFFIXES, PhotoBytes, load_image
from utils import InputError
from visualization.photos import is_our_picture, open_for_picture


def collect_photos(arguments: Sequence[str]) -> list[str]:
    """Return the photos that arguments name: a file, a folder with its subfolders, or - for names on standard input.

    Raises InputError if a folder or standard input names no photo.
    """
    photos: list[str] = []
    for argument in arguments:
        names = read_names() if argument == "-" else [argument]
        for name in names:
            photos += photos_of_folder(name) if os.path.isdir(name) else [name]
    return photos


def read_names() -> list[str]:
    """Read file names from standard input, one a line. Raises InputError if there are none."""
    lines = (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer)
    names = [os.path.expanduser(line) for line in lines if line]
    if not names:
        raise InputError("-: no file names on standard input")
    return names


def photos_of_folder(folder: str) -> list[str]:
    """Return the photos of a folder and its subfolders, sorted, without hidden files and pictures of caption.py.

    Raises InputError if there are none.
    """
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in PHOTO_SUFFIXES and path.is_file())
    visible = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    photos = [str(path) for path in visible if not is_our_picture(path)]
    if not photos:
        raise InputError(f"{folder} has no photos ({' '.join(PHOTO_SUFFIXES)})")
    return photos


def load_photos(
    photos: Sequence[str],
    batch_size: int,
    image_size: int,
    resize: str,
    broken: list[str],
    *,
    with_pictures: bool = False,
) -> Iterator[tuple[list[int], Tensor, dict[int, Image.Image]]]:
    """Yield batches of photos, each file read once: their indices, their images (B, 3, S, S) uint8, and pictures.

    Pictures are the photos by index, as `visualization.photos.open_for_picture` returns them, if `with_pictures`.
    Photos that cannot be read are left out; a line that says why is appended to `broken`.
    """
    for start in range(0, len(photos), batch_size):
        images: dict[int, np.ndarray] = {}
        pictures: dict[int, Image.Image] = {}
        for i in range(start, min(start + batch_size, len(photos))):
            try:
                photo = read_photo(photos[i])
                image = load_image(photo, image_size, resize)
                if with_pictures:
                    pictures[i] = open_for_picture(photo, resize)
                images[i] = image
            except InputError as error:
                broken.append(str(error))
        if images:
            yield list(images), torch.from_numpy(np.stack(list(images.values()))), pictures


def read_photo(path: str) -> PhotoBytes:
    """Read the file of a photo. Raises InputError if it cannot be read."""
    try:
        return PhotoBytes(path, Path(path).read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: not a readable photo: {error.strerror}") from None
