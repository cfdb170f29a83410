"""Photos: any that people have, upright, in RGB, and squared as training and captioning both see them."""

import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from utils import InputError, first_line

# The formats of photos. Pillow knows more, and hands some of them to other programs (EPS to Ghostscript).
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000")
GREY = (124, 116, 104)  # the mean of ImageNet's photos, and so what networks hear nothing from


def open_photo(path, at_least=0):
    """Read a photo upright and in RGB, as a Pillow image; where it moves the first picture, where it is clear white.

    A JPEG of more than twice `at_least` pixels a side is decoded at half, a quarter or an eighth of its size, as
    far as it stays that large; 0 keeps its size. Raises InputError where the photo is missing, not whole, or too large.
    """
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it is an error at twice as many pixels
    try:
        with Image.open(path, formats=FORMATS) as photo:
            if at_least:
                photo.draft(None, (2 * at_least, 2 * at_least))
            ImageOps.exif_transpose(photo, in_place=True)
            if photo.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip to 8 instead of scaling
                photo = Image.fromarray((np.asarray(photo).clip(0, 65535) // 256).astype(np.uint8))
            if photo.has_transparency_data:
                photo = photo.convert("RGBA")
                photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo)
            return photo.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise InputError(f"{path}: not a photo ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise InputError(f"{path}: more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels, make it smaller") from None
    except Exception as error:  # a damaged file raises almost anything
        raise InputError(f"{path}: not a readable photo: {first_line(error)}") from None


def to_square(photo, side, resize):
    """A Pillow image as a square of `side` pixels: squashed, its middle (crop), or whole on a grey ground (pad)."""
    if resize == "squash":
        return photo.resize((side, side), Image.Resampling.BICUBIC)
    if resize == "crop":
        return ImageOps.fit(photo, (side, side), Image.Resampling.BICUBIC)
    longest = max(photo.size)
    inner = photo.resize([max(1, round(side * length / longest)) for length in photo.size], Image.Resampling.BICUBIC)
    square = Image.new("RGB", (side, side), GREY)
    square.paste(inner, ((side - inner.width) // 2, (side - inner.height) // 2))
    return square


def load_image(path, size, resize="squash"):
    """A photo as training and captioning both see it: a square, (3, size, size) uint8. Raises as `open_photo`."""
    return channels_first(to_square(open_photo(path, size), size, resize))


def channels_first(image):
    """The pixels of a Pillow image in RGB, (3, h, w) uint8."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
