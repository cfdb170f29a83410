"""Photos of all common formats, upright, in RGB and square, as training and captioning both see them."""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

from utils import InputError, first_line

# Pillow knows more formats, and hands some of them to other programs (EPS to Ghostscript).
PHOTO_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000")
PAD_COLOR = (124, 116, 104)  # ImageNet's mean color, about zero after normalization


def open_photo(path: str | Path, min_side: int = 0) -> Image.Image:
    """Read a photo upright and in RGB: the first frame of an animation, white behind transparent pixels.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size as long as each side keeps `min_side` pixels; 0: at its full size.
    Raises InputError where the photo is missing, damaged, too large or of another format.
    """
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice as many pixels are an error
    try:
        with Image.open(path, formats=PHOTO_FORMATS) as photo:
            if min_side:
                photo.draft(None, (min_side, min_side))
            ImageOps.exif_transpose(photo, in_place=True)
            if photo.mode == "F":
                raise ValueError("its pixels are floating-point numbers of unknown range")
            converted = photo
            if photo.mode.startswith("I"):  # 16 bits per pixel, which Pillow would clip to 8 instead of scaling
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
        raise InputError(f"{path}: not a photo ({', '.join(PHOTO_FORMATS)})") from None
    except Image.DecompressionBombError:
        raise InputError(f"{path}: more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels, make it smaller") from None
    except Exception as error:  # a damaged file raises almost anything
        raise InputError(f"{path}: not a readable photo: {first_line(error)}") from None


def to_square(photo: Image.Image, side: int, resize: str) -> Tensor:
    """Make a photo a square image (3, side, side) uint8: squashed, its center (crop), or all of it on gray (pad).

    Uses torch's bicubic filter, which is three times as fast as Pillow's; one pixel in twenty is rounded differently.
    """
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)  # (3, h, w)
    height, width = pixels.shape[1:]
    new_height = new_width = side
    if resize == "crop":
        shortest = min(height, width)
        top, left = (height - shortest) // 2, (width - shortest) // 2
        pixels = pixels[:, top : top + shortest, left : left + shortest]
    elif resize == "pad":
        new_height, new_width = (max(1, round(side * length / max(height, width))) for length in (height, width))
    pixels = functional.interpolate(pixels[None], (new_height, new_width), mode="bicubic", antialias=True)[0]
    if resize == "pad":
        square = torch.tensor(PAD_COLOR, dtype=torch.uint8).view(3, 1, 1).repeat(1, side, side)
        top, left = (side - new_height) // 2, (side - new_width) // 2
        square[:, top : top + new_height, left : left + new_width] = pixels
        pixels = square
    return pixels.contiguous()


def load_image(path: str | Path, size: int, resize: str = "squash") -> np.ndarray:
    """A photo as the square image (3, size, size) uint8 that training and captioning both see.

    JPEGs may be decoded at a smaller size, yet not below 1.4 times `size`: from there on the filter blurs little.
    Raises InputError as `open_photo`.
    """
    return to_square(open_photo(path, round(1.4 * size)), size, resize).numpy()
