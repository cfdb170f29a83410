"""Photos: any that people have, upright, in RGB, and squared as training and captioning both see them."""

import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.nn import functional

from utils import InputError, first_line

# The formats of photos. Pillow knows more, and hands some of them to other programs (EPS to Ghostscript).
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000")
PAD_COLOR = (124, 116, 104)  # the mean of ImageNet's photos, so that networks see nothing there


def open_photo(path, min_side=0):
    """Read a photo upright and in RGB, as a Pillow image: of an animation the first, white behind what is transparent.

    A JPEG is decoded at half, a quarter or an eighth of its size where each side keeps `min_side` pixels so; 0 keeps
    its size. Raises InputError where the photo is missing, not whole, or too large.
    """
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice as many pixels are an error
    try:
        with Image.open(path, formats=FORMATS) as photo:
            if min_side:
                photo.draft(None, (min_side, min_side))
            ImageOps.exif_transpose(photo, in_place=True)
            if photo.mode == "F":
                raise ValueError("its pixels are floating-point numbers, of a range that nobody knows")
            if photo.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip to 8 instead of scaling
                pixels = np.asarray(photo).clip(0, 65535)
                photo = Image.fromarray((pixels // 256 if pixels.max() > 255 else pixels).astype(np.uint8))
            if photo.has_transparency_data:
                photo = photo.convert("RGBA")
                photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo)
            photo.load()
            return photo if photo.mode == "RGB" else photo.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise InputError(f"{path}: not a photo ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise InputError(f"{path}: more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels, make it smaller") from None
    except Exception as error:  # a damaged file raises almost anything
        raise InputError(f"{path}: not a readable photo: {first_line(error)}") from None


def to_square(photo, side, resize):
    """A Pillow image as a square, (3, side, side) uint8: squashed, its middle (crop), or whole on a gray ground (pad).

    torch's bicubic filter, which is three times as fast as Pillow's and rounds a pixel in twenty otherwise.
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


def load_image(path, size, resize="squash"):
    """A photo as training and captioning both see it: a square, (3, size, size) uint8. Raises as `open_photo`.

    JPEGs may be decoded smaller, yet not below 1.4 times the size: from there on, the filter has little to blur.
    """
    return to_square(open_photo(path, round(1.4 * size)), size, resize).numpy()
