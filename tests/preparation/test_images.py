"""Every photo that people have becomes an upright RGB square, or is refused by its name."""

import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, features

from preparation.images import PAD_COLOR, PhotoBytes, load_image, open_photo
from utils import InputError

RED, GREEN, BLUE = (200, 30, 20), (20, 160, 40), (0, 0, 255)


def two_colors(width=40, height=20):
    """A photo whose left half is red and whose right half is green."""
    photo = Image.new("RGB", (width, height), RED)
    photo.paste(GREEN, (width // 2, 0, width, height))
    return photo


def colors(path, **options):
    """The colors in the middle of the left and of the right half of a photo, as a model sees it."""
    pixels = load_image(path, 8, **options)
    assert pixels.dtype == np.uint8 and pixels.shape == (3, 8, 8)
    return pixels[:, 4, 2].tolist(), pixels[:, 4, 6].tolist()


def near(found, expected, tolerance=6):
    return np.abs(np.array(found) - np.array(expected)).max() <= tolerance


@pytest.mark.parametrize(
    "name", ["a.jpg", "progressive.jpg", "a.png", "a.bmp", "a.webp", "a.tif", "a.ppm", "a.jp2", "a.avif"]
)
def test_formats(tmp_path, name):
    if name == "a.avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    options = {"progressive": True} if name == "progressive.jpg" else {}
    quality = {"quality": 95} if name.endswith(("jpg", "webp", "avif")) else {}
    two_colors().save(tmp_path / name, **options, **quality)
    assert near(colors(tmp_path / name), (RED, GREEN))


@pytest.mark.parametrize("mode", ["L", "1", "LA", "P", "CMYK", "RGBA"])
def test_modes(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    photo = two_colors().convert(mode, dither=Image.Dither.NONE)
    photo.save(path, **({"quality": 95} if mode == "CMYK" else {}))
    assert near(
        colors(path), [pixel[:3] for pixel in np.asarray(photo.convert("RGB"))[10, [10, 30]].tolist()], tolerance=8
    )


def test_transparent_pixels_become_white(tmp_path):
    photo = two_colors().convert("RGBA")
    photo.putalpha(Image.new("L", photo.size, 255))
    photo.paste((0, 0, 0, 0), (20, 0, 40, 20))  # the color behind a transparent pixel is often black
    photo.save(tmp_path / "rgba.png")
    gray = photo.convert("LA")
    gray.save(tmp_path / "gray.png")
    palette = two_colors().quantize(4)
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((30, 10)))
    palette.save(tmp_path / "palette.gif", transparency=palette.getpixel((30, 10)))
    for name in ("rgba.png", "gray.png", "palette.png", "palette.gif"):
        left, right = colors(tmp_path / name)
        assert near(right, (255, 255, 255)), name
        assert name == "gray.png" or near(left, RED), name


def test_pixels_of_more_bits_keep_their_brightness_or_are_refused(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    for name, pixels in {"a.png": ramp.astype(np.uint16), "b.tif": ramp.astype(np.int32)}.items():
        Image.fromarray(pixels).save(tmp_path / name)
        assert load_image(tmp_path / name, 8).mean() == pytest.approx(127, abs=2)
    Image.fromarray(np.full((8, 8), 200, np.int32)).save(tmp_path / "a.tif")  # 32 bits that use 8
    assert (load_image(tmp_path / "a.tif", 8) == 200).all()
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"a\.tif: not a readable photo: its pixels are floating-point"):
        load_image(tmp_path / "a.tif", 8)


@pytest.mark.parametrize(("orientation", "angle"), [(3, 180), (6, 90), (8, 270)])
def test_photos_stand_upright(tmp_path, orientation, angle):
    for name in ("a.jpg", "a.png"):
        photo = two_colors().rotate(angle, expand=True)  # as the camera was held
        exif = photo.getexif()
        exif[0x0112] = orientation
        photo.save(tmp_path / name, exif=exif, **({"quality": 95} if name == "a.jpg" else {}))
        assert near(colors(tmp_path / name), (RED, GREEN)), name


def test_the_first_frame_of_an_animation_counts(tmp_path):
    for name in ("a.gif", "a.webp", "a.png"):
        two_colors().save(tmp_path / name, save_all=True, append_images=[Image.new("RGB", (40, 20))], lossless=True)
        assert near(colors(tmp_path / name), (RED, GREEN), tolerance=12), name


def test_one_pixel_and_a_line_of_pixels_are_photos(tmp_path):
    for resize in ("squash", "crop", "pad"):
        for size in ((1, 1), (1, 3000), (3000, 1)):
            Image.new("RGB", size, RED).save(tmp_path / "small.png")
            assert load_image(tmp_path / "small.png", 8, resize).shape == (3, 8, 8)
    Image.new("RGB", (1, 1), RED).save(tmp_path / "small.png")
    assert colors(tmp_path / "small.png") == (list(RED), list(RED))


def test_crop_keeps_the_center_pad_and_squash_keep_all(tmp_path):
    photo = Image.new("RGB", (60, 20), BLUE)
    photo.paste(two_colors(20, 20), (20, 0))  # in the center, red on the left and green on the right
    photo.save(tmp_path / "a.png")
    assert near(colors(tmp_path / "a.png", resize="crop"), (RED, GREEN))
    padded, squashed = (load_image(tmp_path / "a.png", 24, resize) for resize in ("pad", "squash"))
    for pixels in (padded, squashed):
        assert near(pixels[:, 12, [2, 10, 14, 21]].T, [BLUE, RED, GREEN, BLUE])
    assert (padded[:, [0, 7, 16, 23]] == np.array(PAD_COLOR).reshape(3, 1, 1)).all()
    assert near(squashed[:, 1, 10], RED)


def test_the_pixels_are_those_of_pillow_within_rounding(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    photo = Image.fromarray(noise).resize((400, 300), Image.Resampling.BICUBIC)
    photo.save(tmp_path / "a.png")
    expected = np.asarray(photo.resize((64, 64), Image.Resampling.BICUBIC)).transpose(2, 0, 1).astype(int)
    difference = np.abs(load_image(tmp_path / "a.png", 64) - expected)
    assert (difference <= 1).mean() > 0.99 and difference.mean() < 0.2


def test_large_jpegs_are_decoded_smaller_and_look_the_same(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    photo = Image.fromarray(noise).resize((1600, 1200), Image.Resampling.BICUBIC)
    photo.save(tmp_path / "a.jpg", quality=95)
    assert open_photo(tmp_path / "a.jpg").size == (1600, 1200)
    assert open_photo(tmp_path / "a.jpg", 300).size == (400, 300)
    assert open_photo(tmp_path / "a.jpg", 301).size == (800, 600)
    expected = np.asarray(photo.resize((64, 64), Image.Resampling.BICUBIC)).transpose(2, 0, 1).astype(int)
    assert np.abs(load_image(tmp_path / "a.jpg", 64) - expected).mean() < 1


@pytest.mark.slow
def test_the_memory_of_the_largest_photos_is_bounded(tmp_path):
    """A large JPEG is decoded at a smaller size; what cannot be takes no more than a gigabyte, or is refused."""
    Image.new("RGB", (15_000, 11_800)).save(tmp_path / "a.jpg")
    Image.new("RGBA", (8000, 8000)).save(tmp_path / "a.png", compress_level=1)
    code = (
        "import resource, sys; from preparation.images import load_image\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; load_image(sys.argv[1], 8)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    peaks = [
        int(subprocess.run([sys.executable, "-c", code, tmp_path / name], capture_output=True, check=True).stdout)
        for name in ("a.jpg", "a.png")
    ]
    assert peaks[0] < 100e3 and peaks[1] < 1.1e6, peaks  # in kB


def png_header(width, height):
    """The beginning of a PNG that says it is this large."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + struct.pack(">I", 9) + b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"A dog runs.", "not a photo"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a photo"),  # Ghostscript would run it
        (png_header(20_000, 20_000), "more than 64,000,000 pixels"),
        (png_header(8000, 8001), "more than 64,000,000 pixels"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC, or AVIF that this Pillow cannot read: convert it to JPEG"),
        (png_header(0, 5), "not a"),
        (None, "not a readable photo"),
    ],
)
def test_other_files_and_damaged_photos_are_named(tmp_path, content, message):
    path = tmp_path / "my photo é.jpg"
    if content is None:  # a photo cut in half
        Image.effect_noise((64, 64), 50).save(path)
        content = path.read_bytes()[:800]
    path.write_bytes(content)
    for photo in (path, PhotoBytes("my photo é.jpg", content)):
        with pytest.raises(InputError, match=rf"my photo é\.jpg: {message}"):
            load_image(photo, 8)


def test_missing_photos_and_folders_are_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.jpg: no such file"):
        load_image(tmp_path / "none.jpg", 8)
    with pytest.raises(InputError, match="not a readable photo"):
        load_image(tmp_path, 8)
