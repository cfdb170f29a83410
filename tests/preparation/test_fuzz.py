"""Captions and photos with random errors: each run ends in a complete folder, or in one line and leaves nothing."""

import copy
import functools
import hashlib
import inspect
import io
import json
import os
import random
import re
import shutil
from collections import Counter
from contextlib import suppress

import h5py
import numpy as np
import pytest
from PIL import Image, features

import create_input_files
from caption_files import CAPTIONS, WRITERS
from preparation import writing
from preparation.caption_formats import FORMATS
from preparation.storage import SPLITS, read_captions, read_metadata
from text.vocabulary import Vocabulary

CASES = 250  # of each kind with --fuzz 1
RAW = {'"DEEP"': "[" * 200_000 + "]" * 200_000, '"HUGE"': "9" * 5000}  # JSON that json.dumps cannot write
TEXTS = (
    *("", " ", ".", "..", "/", "../a.jpg", "./a.jpg", "/none/a.jpg", "a.jpg", "d.webp", "train", "DEV", "<pad>", "%s"),
    *('"', "'", ",", ";", "|", "#", "#0", "a,b", 'a"b"c', "\\", "\t", "\n", "\r", "a\nb", "\0", "a.jpg\0", "\x1b[2J"),
    *("\ud800", "\ufeff", "e\u0301", "\u202e", "\u2028", "\u200d", "\u0643\u0644\u0628", "\u72ac", "\U0001f600"),
    *("\u72ac\u304c 2 \u30f6\u3099", "\u0e19\u0e49\u0e33\u0e32", "\u0e49", "\uff9e\U000e0100", "\u4e00\u200d\u4e01"),
    *("a " * 99, "x" * 300, "x" * 200_000),
)
VALUES = (None, True, 0, 7, -1, 2.5, 1e300, float("inf"), float("nan"), 10**40, [], {}, [[]], ["a"], {"a": 1}, [None])


# ------------------------------------------------------------------------------------------------------ errors


def spoil_bytes(content, generator):
    """Return bytes with one to four errors: flipped, overwritten, cut, inserted, deleted or repeated."""
    content = bytearray(content)
    for _ in range(generator.randint(1, 4)):
        start = generator.randrange(len(content) + 1)
        end = min(len(content), start + generator.choice((1, 1, 4, 30)))
        error = generator.randrange(6)
        if error == 0 and start < end:
            content[start] ^= 1 << generator.randrange(8)
        elif error == 1:
            content[start:end] = bytes([generator.choice((0, 1, 127, 128, 255))]) * (end - start)
        elif error == 2 and generator.random() < 0.3:
            del content[start:]
        elif error == 3:
            content[start:start] = generator.randbytes(end - start)
        elif error == 4:
            del content[start:end]
        elif error == 5:
            content[start:start] = content[start:end]
    return bytes(content)


def pick(value, generator):
    """Choose a random (container, key) in nested lists and dictionaries."""
    found = [value], 0
    while isinstance(value, (list, dict)) and value and generator.random() < 0.8:
        found = value, generator.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value = value[found[1]]
    return found


def unexpected_value(generator):
    """Return a JSON value of a kind that is not expected."""
    return copy.deepcopy(generator.choice(generator.choice((TEXTS, VALUES, ("\ud800",), ("\ud800", "DEEP", "HUGE")))))


def spoil_values(content, generator):
    """Drop, rename, copy, wrap, repeat or retype one to three values in nested lists and dictionaries."""
    whole = [content]
    for _ in range(generator.choice((1, 1, 3))):
        (container, key), (other, other_key) = pick(whole, generator), pick(whole, generator)
        error = generator.randrange(6)
        if error == 0:
            del container[key]
        elif error == 1 and isinstance(container, dict):
            container[generator.choice(("", "\ud800", "filepath"))] = container.pop(key)
        elif error == 2:
            container[key] = copy.deepcopy(other[other_key])
        elif error == 3:
            container[key] = generator.choice(([container[key]], {key: container[key]}, str(container[key])))
        elif error == 4 and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        else:
            container[key] = unexpected_value(generator)
    return whole[0] if whole else None


def spoil_text(text, generator):
    """Drop, repeat, shorten, lengthen or change one to three lines, or fields of lines."""
    rows = [re.split(r"([,;|#\t])", line) for line in text.split("\n")]
    for _ in range(generator.choice((1, 1, 3))):
        row = generator.choice(rows)
        column, error = generator.randrange(len(row) + 1), generator.randrange(6)
        if error == 0 and len(rows) > 1:
            rows.remove(row)
        elif error == 1:
            rows.insert(generator.randrange(len(rows)), list(row))
        elif error == 2:
            del row[column:]
        elif error == 3:
            row.insert(column, generator.choice(TEXTS))
        else:
            row[column : column + 1] = [generator.choice(TEXTS)]
    return "\n".join(map("".join, rows))


def write_text(path, text, generator, share):
    """Write text, a share of it with errors: blank lines, no quotes, other line ends, encodings and bytes."""
    error, encoding = (generator.randrange(3) if generator.random() < share else None), "utf-8"
    if error == 0:
        text = text.replace(*generator.choice((("\n", "\n\n"), ("\n", "\r\n"), ("\n", "\r"), ('"', ""), (",", ";"))))
    elif error == 1:
        encoding = generator.choice(("utf-8-sig", "utf-8-sig", "utf-16", "utf-32", "utf-7", "latin-1", "cp1252"))
    content = text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")
    path.write_bytes(spoil_bytes(content, generator) if error == 2 else content)


def spoil_hdf5(path, generator):
    """Give the tutorial's images another name, shape, type or place, or no number of captions."""
    name, shape, dtype, per_image = "images", (1, 3, 16, 16), "uint8", 2
    error = generator.randrange(7)
    if error == 0:
        name = generator.choice(("pictures", "images/images"))
    elif error == 1:
        shape = generator.choice(((1, 3, 9, 7), (1, 3, 9), (1, 3, 0, 0), (0, 3, 9, 9), (4, 3, 1, 1), (), None))
    elif error == 2:
        dtype = generator.choice(("float32", "int64", "S3"))
    elif error == 3:
        per_image = generator.choice((0, -1, 1, 2.5, np.nan, np.inf, 2**62, "2", "two", "", [2, 2], np.bool_(1)))
    with h5py.File(path, "w") as file:
        if error == 4:
            file[name] = generator.choice((h5py.ExternalLink("other.hdf5", "images"), h5py.SoftLink("/images")))
        else:
            external = [("other", 0, h5py.h5f.UNLIMITED)] if error == 5 else None
            file.create_dataset(name, shape, dtype, external=external)
        if error != 6:
            file.attrs["captions_per_image"] = per_image


def spoil_file(path, generator):
    """Spoil a file of captions or images by the kind of its content."""
    content = path.read_bytes()
    if path.suffix == ".hdf5" and generator.random() < 0.8:
        spoil_hdf5(path, generator)
    elif path.suffix in (".hdf5", ".jpg"):
        path.write_bytes(spoil_bytes(content, generator))
    elif content[:1] in (b"{", b"["):
        text = json.dumps(spoil_values(json.loads(content), generator), ensure_ascii=generator.random() < 0.9)
        for marker, raw in RAW.items():
            text = text.replace(marker, raw)
        write_text(path, text, generator, 0.2)
    else:
        write_text(path, spoil_text(content.decode(), generator), generator, 0.4)


# ------------------------------------------------------------------------- photos


@functools.cache
def seed_photos():
    """Photos of a dozen pixels a side, as bytes, in several formats and modes, one in HEIC and one empty."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    photo, other = Image.fromarray(pixels), Image.fromarray(255 - pixels)
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation
    forms = [
        *(("RGB", {"format": name}) for name in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")),
        *((mode, {"format": "JPEG", "progressive": True, "exif": turned}) for mode in ("L", "CMYK", "RGB")),
        *((mode, {"format": "PNG", "interlace": 1}) for mode in ("1", "L", "P", "LA", "RGBA", "I;16")),
        *((mode, {"format": "GIF", "save_all": True, "append_images": [other]}) for mode in ("1", "L", "P", "RGBA")),
        *((mode, {"format": "BMP"}) for mode in ("1", "L", "P", "RGBA")),
        *((mode, {"format": "WEBP", "lossless": mode == "RGB", "exif": turned}) for mode in ("RGB", "RGBA")),
        ("RGB", {"format": "WEBP", "save_all": True, "append_images": [other]}),
        *((mode, {"format": "TIFF"}) for mode in ("1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "F")),
        *(
            ("RGB", {"format": "TIFF", "compression": compression})
            for compression in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits")
        ),
        ("1", {"format": "TIFF", "compression": "group4"}),
        *((mode, {"format": "AVIF"}) for mode in ("RGB", "RGBA") if features.check("avif")),
    ]
    contents = []
    for mode, form in forms:
        file = io.BytesIO()
        photo.convert("L" if mode == "I;16" else mode).convert(mode).save(file, **form)
        contents.append(file.getvalue())
    return [*contents, b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", b""]


def odd_names(folder, generator):
    """A folder of photos with texts beside, names and texts with errors."""
    (folder / "inner.txt").mkdir(parents=True)
    names = ["a.jpg", "inner.txt/g.png", generator.choice(TEXTS) + ".jpg"]
    if generator.random() < 0.2:
        names.append(os.fsdecode(generator.randbytes(2)) + generator.choice((".png", ".txt")))
    for name in names:
        captions = [generator.choice(TEXTS) if generator.random() < 0.3 else "A dog." for _ in range(3)]
        path = folder / name
        with suppress(OSError, ValueError):  # a name that the file system does not take
            if generator.random() < 0.9:
                path.write_bytes(generator.choice(seed_photos()))
            if generator.random() < 0.9:
                write_text(path.with_suffix(".txt"), "\n".join(captions), generator, 0.1)


def write_case(kind, folder, generator):
    """Write photos and the captions of a kind into a folder, with errors; returns the paths of the captions."""
    photos = folder / "photos"
    if kind == "odd names":
        odd_names(photos, generator)
        return [photos]
    photos.mkdir()
    for name in CAPTIONS:
        (photos / name).write_bytes(seed_photos()[0] if kind != "photos" else generator.choice(seed_photos()))
    paths = WRITERS["folder" if kind == "photos" else kind](folder / "given", photos)
    files = sorted(photos.glob("*.jpg" if kind == "photos" else "*.txt")) or []
    if paths[0] != photos:
        files = sorted((folder / "given").iterdir())
    for path in generator.sample(files, generator.choice((0, 1, 1, 1, len(files)))):
        spoil_file(path, generator)
    if kind == "token" and generator.random() < 0.3:  # without split lists, or with some
        for path in generator.choice((files[:1], files[:3])):
            path.unlink()
    return paths


KINDS = (*WRITERS, "odd names", "photos")


# ----------------------------------------------------------------------------------------------------- the test


def more_flags(kind, generator):
    """Flags that any data set may be prepared with, most often --skip_broken."""
    more = ["--skip_broken"] if generator.random() < (0.9 if kind == "photos" else 0.5) else []
    for flag, values in {
        "--resize": ("squash", "crop", "pad"),
        "--max_train_images": (1, 2),
        "--captions_per_image": (1, 3),
        "--vocab_size": (1, 3),
        "--min_word_freq": (1, 2, 9),
        "--max_caption_length": (1, 2),
        "--long_captions": ("drop", "truncate"),
    }.items():
        if generator.random() < 0.2:
            more += [flag, generator.choice(values)]
    return more if generator.random() < 0.9 else [*more, "--format", generator.choice(FORMATS)]


def assert_complete(output):
    """Assert that train.py could read the folder and that it has nothing else."""
    metadata = read_metadata(output)
    filled = [split for split in SPLITS if metadata["splits"][split]["images"]]
    assert filled and len(Vocabulary.load(output)) == metadata["words"]
    for split in filled:
        entries, captions, _ = read_captions(output, split)
        described = metadata["splits"][split]
        assert len(entries) == len(captions) == described["images"] and captions.num_captions() == described["captions"]
        assert min(captions.lengths()) > 0
        with h5py.File(output / f"{split}_images.hdf5") as file:
            images = file["images"][:]
        assert images.shape == (len(entries), 3, 8, 8) and images.dtype == np.uint8
        assert hashlib.sha256(images.tobytes()).hexdigest() == described["digest"]
    assert not list(output.glob(".*"))


@pytest.fixture
def quick(monkeypatch):
    """Avoid progress bars, waiting for the disk and parsing the source of Settings in each run."""
    monkeypatch.setattr(writing, "tqdm", functools.partial(writing.tqdm, disable=True))
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(inspect, "getsource", functools.cache(inspect.getsource))


def run_case(command, folder, kind, generator):
    """Run a case in a new folder; returns the exit status."""
    folder.mkdir()
    captions, output = write_case(kind, folder, generator), folder / "out"
    given = set(folder.iterdir())
    arguments = ["--dataset", "own", "--captions", *captions, "--output_folder", output, "--image_size", 8]
    if captions[0].is_file():
        arguments += ["--images", folder / "photos"]
    status, _, err = command(create_input_files, *arguments, *more_flags(kind, generator))
    if status == 0:
        assert_complete(output)
    else:
        assert status == 2 and "Traceback" not in err
        assert err.rstrip("\n").split("\n")[-1].startswith("create_input_files.py: error: ")
    assert set(folder.iterdir()) - given == ({output} if status == 0 else set())
    shutil.rmtree(folder)
    return status


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged photos
@pytest.mark.parametrize("kind", KINDS)
def test_errors_end_in_a_complete_folder_or_in_one_line(command, request, tmp_path, quick, kind):
    cases = round(CASES * request.config.getoption("--fuzz", default=1 / 3))
    statuses = Counter()
    for case in range(cases):
        try:
            # A line break in the folder's name must not break a message into two lines.
            statuses[run_case(command, tmp_path / f"case\n{case}", kind, random.Random(f"{kind} {case}"))] += 1
        except Exception as error:
            raise AssertionError(f"case {case}, {kind}: {error!r}") from error
    assert min(statuses[0], statuses[2]) > cases / 20, f"the cases of {kind} all end alike: {statuses}"
