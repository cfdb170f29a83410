"""Load photos of all common formats upright, in RGB and square, the same for training and captioning."""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from utils import InputError, first_line

# Pillow knows more formats, and hands some of them to other programs (EPS to Ghostscript).
PHOTO_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF")
PHOTO_SUFFIXES = (  # of the files that are photos in a folder
    *(".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".jp2", ".avif", ".heic", ".heif"),
)
MAX_PIXELS = 64_000_000  # of a decoded photo, which takes up to 1 GB of memory
MIN_DECODED = 1.4  # JPEGs are decoded at no less than this multiple of an image's size, so the filter blurs little
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"avif", b"avis")
RESIZE_MODES = ("squash", "crop", "pad")  # of `to_square`
PAD_COLOR = (124, 116, 104)  # ImageNet's mean color, about zero after normalization


class PhotoBytes(NamedTuple):
    """The content of a photo's file, opened like a file on the disk."""

    name: str  # in messages
    content: bytes

    def __str__(self) -> str:
        return self.name


def open_photo(path: str | Path | PhotoBytes | Image.Image, min_side: int = 0) -> Image.Image:
    """Open a photo, a file or a Pillow image, upright and in RGB.

    An animation gives its first frame; transparent pixels become white. A JPEG is decoded at 1/2, 1/4 or 1/8 of its
    size if each side keeps `min_side` pixels; 0: at its full size. Raises InputError if the photo is missing, damaged,
    too large or of another format.
    """
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is the limit
    try:
        with _open_file(path) as photo:
            if min_side:
                photo.draft(None, (min_side, min_side))
            if photo.width * photo.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            ImageOps.exif_transpose(photo, in_place=True)
            if photo.mode == "F":
                raise ValueError("its pixels are floating-point numbers of unknown range")
            converted = photo
            if photo.mode.startswith("I"):  # 16 bits per pixel: Pillow would clip to 8 bits, not scale
                pixels = np.asarray(photo).clip(0, 65535)
                converted = Image.fromarray((pixels // 256 if pixels.max() > 255 else pixels).astype(np.uint8))
            if converted.has_transparency_data:
                converted = converted.convert("RGBA")
                converted = Image.alpha_composite(Image.new("RGBA", converted.size, "white"), converted)
            converted.load()
            return converted if converted.mode == "RGB" else converted.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        assert not isinstance(path, Image.Image)
        raise InputError(f"{path}: {describe_other_file(path)}") from None
    except Image.DecompressionBombError:  # Pillow has its own limit for JPEGs decoded at a smaller size
        raise InputError(f"{path}: more than {MAX_PIXELS:,} pixels, make it smaller") from None
    except Exception as error:  # damaged files raise almost anything
        raise InputError(f"{path}: not a readable photo: {first_line(error)}") from None


def _open_file(path: str | Path | PhotoBytes | Image.Image) -> Image.Image:
    """Open a photo of PHOTO_FORMATS without decoding it, or copy a Pillow image. Raises Pillow's errors."""
    if isinstance(path, Image.Image):
        return path.copy()
    Image.init()  # or no format is registered yet
    file = io.BytesIO(path.content) if isinstance(path, PhotoBytes) else path
    return Image.open(file, formats=[name for name in PHOTO_FORMATS if name in Image.OPEN])


def photo_size(photo: str | Path | Image.Image) -> tuple[int, int]:
    """Return width and height in pixels of a photo, upright as from `open_photo`. Raises InputError if it is damaged.

    Only PNGs are decoded: their orientation may be at the end of the file.
    """
    try:
        with _open_file(photo) as file:
            is_turned = file.format != "TIFF" and file.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            return (file.height, file.width) if is_turned else file.size
    except Exception as error:  # damaged files raise almost anything
        raise InputError(f"{photo}: not a readable photo: {first_line(error)}") from None


def describe_other_file(path: str | Path | PhotoBytes) -> str:
    """Describe why a file is not of PHOTO_FORMATS."""
    with io.BytesIO(path.content) if isinstance(path, PhotoBytes) else open(path, "rb") as file:
        start = file.read(16)
    if not start:
        return "an empty file"
    if start[4:8] == b"ftyp" and start[8:12] in HEIF_BRANDS:
        return "HEIC, or AVIF that this Pillow cannot read: convert it to JPEG, for example with heif-convert"
    return f"not a photo ({', '.join(PHOTO_FORMATS)})"


def to_square(photo: Image.Image, side: int, resize: str) -> Tensor:
    """Make a photo a square image (3, side, side) uint8: squashed, its center (crop), or all of it on gray (pad).

    torch's bicubic filter is three times as fast as Pillow's and rounds one pixel in twenty differently.
    """
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)  # (3, h, w)
    (left, top, width, height), (new_left, new_top, new_width, new_height) = crop_and_target(photo.size, side, resize)
    pixels = pixels[:, top : top + height, left : left + width]
    pixels = functional.interpolate(pixels[None], (new_height, new_width), mode="bicubic", antialias=True)[0]
    if resize == "pad":
        square = torch.tensor(PAD_COLOR, dtype=torch.uint8).view(3, 1, 1).repeat(1, side, side)
        square[:, new_top : new_top + new_height, new_left : new_left + new_width] = pixels
        pixels = square
    return pixels.contiguous()


def crop_and_target(size: tuple[int, int], side: int, resize: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the part of a photo (width, height) that `to_square` keeps and its place in the square.

    Both are (left, top, width, height) in pixels.
    """
    width, height = size
    if resize == "crop":
        shortest = min(size)
        return ((width - shortest) // 2, (height - shortest) // 2, shortest, shortest), (0, 0, side, side)
    if resize == "pad":
        new_width, new_height = (max(1, round(side * length / max(size))) for length in size)
        return (0, 0, width, height), ((side - new_width) // 2, (side - new_height) // 2, new_width, new_height)
    return (0, 0, width, height), (0, 0, side, side)


def place_objects(objects: list[dict[str, Any]], size: tuple[int, int], side: int, resize: str) -> list[dict[str, Any]]:
    """Move the boxes of a photo's objects to their place in the image of `to_square` and clip them.

    A box is [left, top, right, bottom] in fractions of the sides, `size` the photo's (width, height). Objects without
    area in the image are left out.
    """
    kept, target = crop_and_target(size, side, resize)
    placed = []
    for item in objects:
        box = [min(1.0, max(0.0, edge)) for edge in item["box"]]
        if resize != "squash":
            for i, edge in enumerate(item["box"]):
                axis = i % 2
                share = (edge * size[axis] - kept[axis]) / kept[axis + 2]
                box[i] = (target[axis] + min(1.0, max(0.0, share)) * target[axis + 2]) / side
        if box[0] < box[2] and box[1] < box[3]:
            placed.append({**item, "box": box})
    return placed


def boxes_of(objects: list[dict[str, Any]]) -> Tensor:
    """Return the boxes of an image's objects, (N, 4) float32."""
    return torch.tensor([item["box"] for item in objects], dtype=torch.float32).view(-1, 4)


def pad_boxes(objects: Sequence[list[dict[str, Any]]]) -> Tensor:
    """Stack the boxes of B images' objects, padded with boxes without area: (B, N, 4)."""
    return pad_sequence(list(map(boxes_of, objects)), batch_first=True)


def flip_boxes(boxes: Tensor) -> Tensor:
    """Mirror boxes (..., 4) horizontally; padding stays without area."""
    left, top, right, bottom = boxes.unbind(dim=-1)
    return torch.stack([1 - right, top, 1 - left, bottom], dim=-1)


def load_image(photo: str | Path | PhotoBytes | Image.Image, size: int, resize: str = "squash") -> np.ndarray:
    """Load a photo, a file or a Pillow image, as a square image (3, size, size) uint8.

    Raises the InputError of `open_photo`.
    """
    return to_square(open_photo(photo, round(MIN_DECODED * size)), size, resize).numpy()
