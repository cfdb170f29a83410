"""Prepare photos with captions: python create_input_files.py --dataset NAME --captions FILE --images FOLDER"""

import codecs
import csv
import hashlib
import math
import os
import random
import re
import shutil
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import h5py
import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from datasets import SPLITS, load_image, read_card
from utils import InputError, read_json, require_at_least, require_writable, run_script, write_json
from vocabulary import Vocabulary


@dataclass(frozen=True)
class Settings:
    """Prepare a data set. Edit a value here or give it as flag: python create_input_files.py --image_size 224"""

    dataset: str = "shapes"  # shapes draws its own scenes; any other name reads --captions and --images
    captions: str = ""  # Karpathy's JSON (Flickr8k, Flickr30k, COCO) or Kaggle's captions.txt
    images: str = ""  # the folder that the photos lie in
    output: str = ""  # the folder to write; empty: data/<dataset>
    image_size: int = 256  # side of the square images in pixels
    min_word_freq: int = 5  # training captions must hold a word at least so often, or it becomes <unk>
    max_words: int = 0  # and only so many words are kept, the most frequent ones; 0: all
    limit: int = 0  # training images at most, chosen with the seed; 0: all
    skip_bad: bool = False  # leave broken and missing photos out, listed, instead of stopping
    overwrite: bool = False  # replace a folder that was prepared otherwise
    scenes: int = 4000  # shapes to draw for training; a tenth as many each for val and test
    seed: int = 0  # of the shapes, of the split where the captions have none, and of what limit chooses


@dataclass(frozen=True)
class Photo:
    """One image of a data set: where it is, which split it belongs to and what is said of it."""

    path: Path
    name: str  # as the captions file spells it
    image_id: int
    split: str
    captions: list  # [{"words": [...], "raw": "..."}]
    objects: list | None = None  # [{"words": [...], "box": [left, top, right, bottom]}] where they are known


# ------------------------------------------------------------------------------------------- captions that exist


def tokenize(caption):
    """A caption to lower-case words without punctuation."""
    return re.findall(r"\w+", caption.lower())


def read_karpathy(path, images):
    """Photos of Karpathy's JSON (dataset_flickr8k.json, dataset_flickr30k.json, dataset_coco.json)."""
    content, photos = read_json(path), []
    try:
        for number, image in enumerate(content["images"]):
            name = f"{image['filepath']}/{image['filename']}" if image.get("filepath") else image["filename"]
            split = "train" if image["split"] == "restval" else image["split"]
            if split not in SPLITS:
                raise InputError(f"{path}: {name} has the split {split!r}, not one of {' '.join(SPLITS)} restval")
            captions = [{"words": one["tokens"], "raw": one["raw"]} for one in image["sentences"] if one["tokens"]]
            for one in captions:
                if not isinstance(one["words"], list) or not all(
                    isinstance(x, str) for x in (one["raw"], *one["words"])
                ):
                    raise TypeError
            image_id = image.get("cocoid", image.get("imgid", number))
            photos.append(Photo(images / name, name, image_id, split, captions, image.get("objects")))
    except KeyError as error:
        raise InputError(f"{path}: no key {error} in images[{len(photos)}], is this Karpathy's JSON?") from None
    except (TypeError, AttributeError):
        raise InputError(f"{path}: images[{len(photos)}] has another form, is this Karpathy's JSON?") from None
    return photos


def read_kaggle(path, images, seed):
    """Photos of Kaggle's captions.txt, a CSV of image,caption; a tenth each of them for val and for test."""
    captions = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if rows.fieldnames is None or not {"image", "caption"} <= set(rows.fieldnames):
                raise InputError(f"{path} is neither JSON nor a CSV whose first line is image,caption")
            for row in rows:
                if None in row:
                    raise InputError(f"{path}, line {rows.line_num}: a caption with commas must stand in quotes")
                if not row["caption"]:
                    raise InputError(f"{path}, line {rows.line_num}: no caption for {row['image']!r}")
                raw = row["caption"].strip()
                words = tokenize(raw)
                of_image = captions.setdefault(row["image"], [])
                if words:
                    of_image.append({"words": words, "raw": raw})
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a CSV in UTF-8: {error}") from None
    names = sorted(captions)
    random.Random(seed).shuffle(names)
    tenth = math.ceil(len(names) / 10)
    split = dict.fromkeys(names, "train") | dict.fromkeys(names[:tenth], "val")
    split |= dict.fromkeys(names[tenth : 2 * tenth], "test")
    print(f"{path} has no splits: {tenth} images each for val and test, chosen with seed {seed}")
    return [Photo(images / name, name, i, split[name], captions[name]) for i, name in enumerate(captions)]


# ---------------------------------------------------------------------------------------------- shapes, drawn here

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 40),
    "orange": (245, 140, 30),
    "purple": (140, 60, 170),
}
BACKGROUNDS = {"white": (245, 245, 245), "grey": (130, 130, 130), "black": (20, 20, 20)}
KINDS = ("circle", "square", "triangle", "cross")
RADII = {"small": 0.16, "large": 0.22}  # shares of the image's side
POSITIONS = {(0, 0): "top left", (1, 0): "top right", (0, 1): "bottom left", (1, 1): "bottom right"}  # (column, row)


def outline(kind, x, y, radius):
    """The corners of a shape around its centre, `radius` from it to each side; a circle is a polygon of many."""
    third = radius / 3
    corners = {
        "circle": [(radius * math.sin(turn), radius * math.cos(turn)) for turn in np.linspace(0, 2 * math.pi, 60)],
        "square": [(-radius, -radius), (radius, -radius), (radius, radius), (-radius, radius)],
        "triangle": [(0, -radius), (radius, radius), (-radius, radius)],
        "cross": [
            (-third, -radius), (third, -radius), (third, -third), (radius, -third), (radius, third), (third, third),
            (third, radius), (-third, radius), (-third, third), (-radius, third), (-radius, -third), (-third, -third),
        ],
    }  # fmt: skip
    return [(x + dx, y + dy) for dx, dy in corners[kind]]


def draw_scene(generator, size):
    """Draw one or two shapes; returns the picture, five captions and the objects with their boxes.

    A box is left, top, right, bottom as shares of the image's side.
    """
    background = generator.choice(list(BACKGROUNDS))
    picture = Image.new("RGB", (4 * size, 4 * size), BACKGROUNDS[background])  # drawn large for smooth edges
    pencil = ImageDraw.Draw(picture)
    cells = sorted(generator.sample(list(POSITIONS), generator.choice((1, 2, 2))))
    looks = generator.sample([(colour, kind) for colour in COLOURS for kind in KINDS], len(cells))
    things, objects = [], []
    for (column, row), (colour, kind) in zip(cells, looks, strict=True):
        size_word = generator.choice(list(RADII))
        x, y = (0.26 + 0.48 * place + generator.uniform(-0.02, 0.02) for place in (column, row))
        radius = RADII[size_word]
        points = [(4 * size * px, 4 * size * py) for px, py in outline(kind, x, y, radius)]
        pencil.polygon(points, fill=COLOURS[colour])
        things.append((size_word, f"{colour} {kind}", POSITIONS[column, row], (column, row)))
        box = [x - radius, y - radius, x + radius, y + radius]
        objects.append({"words": [size_word, colour, kind], "box": box})
    picture = picture.resize((size, size), Image.Resampling.BOX)
    return picture, describe(things, background), objects


def describe(things, background):
    """Five captions of one or two shapes, given as (size, colour and kind, position words, (column, row))."""
    full = [f"a {size} {name}" for size, name, _, _ in things]
    short = [f"an {name}" if name.startswith("o") else f"a {name}" for _, name, _, _ in things]
    if len(things) == 1:
        position = things[0][2]
        return [
            f"{full[0]} at the {position}",
            f"{short[0]} at the {position}",
            f"{full[0]} on {background}",
            f"{short[0]} on {background}",
            f"just {full[0]}",
        ]
    columns = [column for *_, (column, _) in things]
    if columns[0] < columns[1]:  # the cells are sorted by column
        relation, inverse = "left of", "right of"
    else:
        relation, inverse = "above", "below"
    return [
        f"{full[0]} {relation} {full[1]}",
        f"{full[1]} {inverse} {full[0]}",
        f"{full[0]} and {full[1]}",
        f"{short[0]} {relation} {short[1]}",
        f"{short[0]} and {short[1]} on {background}",
    ]


def draw_shapes(folder, scenes, size, seed):
    """Draw a data set of shapes into a folder: photos/ and dataset_shapes.json in Karpathy's format, with boxes."""
    generator = random.Random(seed)
    (folder / "photos").mkdir()
    held_out = max(1, scenes // 10)
    splits = ["train"] * scenes + ["val"] * held_out + ["test"] * held_out
    images = []
    for number, split in enumerate(tqdm(splits, desc="drawing shapes", unit="scene")):
        picture, captions, objects = draw_scene(generator, size)
        name = f"{split}_{number:05d}.png"
        picture.save(folder / "photos" / name)
        sentences = [{"tokens": tokenize(caption), "raw": caption} for caption in captions]
        images.append({"filename": name, "imgid": number, "split": split, "sentences": sentences, "objects": objects})
    write_json(folder / "dataset_shapes.json", {"dataset": "shapes", "images": images})


# --------------------------------------------------------------------------------------------- prepared folders


def decode_all(photos, size, description):
    """Decode photos on all cores, in order: yields (photo, uint8 pixels (3, S, S) or an InputError).

    Pillow lets go of the interpreter while it decodes and resizes, so threads use every core; a few hundred photos
    at a time keep the memory flat.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=len(photos), desc=description, unit="photo") as bar:

        def decode(photo):
            try:
                return load_image(photo.path, size)
            except InputError as error:
                return error

        for start in range(0, len(photos), 256):
            part = photos[start : start + 256]
            for photo, pixels in zip(part, pool.map(decode, part), strict=True):
                yield photo, pixels
                bar.update()


def write_split(folder, split, photos, size):
    """Write one split's images and captions; returns its line of dataset.json, the photos kept and what is bad."""
    if not photos:
        return {"images": 0, "captions": 0, "digest": ""}, [], []
    kept, bad, digest = [], [], hashlib.sha256()
    with h5py.File(folder / f"{split}_images.hdf5", "w") as file:
        shape = (len(photos), 3, size, size)
        images = file.create_dataset("images", shape, np.uint8, chunks=(1, *shape[1:]), maxshape=shape)
        for photo, pixels in decode_all(photos, size, f"{split} photos"):
            if isinstance(pixels, InputError):
                bad.append(str(pixels))
            elif not photo.captions:
                bad.append(f"{photo.path}: has no captions")
            else:
                images[len(kept)] = pixels
                digest.update(pixels.tobytes())
                kept.append(photo)
        images.resize(len(kept), axis=0)
        file.attrs["digest"] = digest.hexdigest()
    entries = [
        {"image": photo.name, "image_id": photo.image_id, "captions": photo.captions}
        | ({"objects": photo.objects} if photo.objects else {})
        for photo in kept
    ]
    write_json(folder / f"{split}_captions.json", entries)
    captions = sum(len(photo.captions) for photo in kept)
    return {"images": len(kept), "captions": captions, "digest": digest.hexdigest()}, kept, bad


def write_folder(folder, photos, settings):
    """Write a whole prepared folder, dataset.json last. Raises InputError where photos are bad."""
    splits, kept, bad = {}, {}, []
    for split in SPLITS:
        of_split = [photo for photo in photos if photo.split == split]
        if split == "train" and 0 < settings.limit < len(of_split):
            chosen = sorted(random.Random(settings.seed).sample(range(len(of_split)), settings.limit))
            print(f"{settings.limit} of {len(of_split)} training images, chosen with seed {settings.seed}")
            of_split = [of_split[place] for place in chosen]
        splits[split], kept[split], bad_of_split = write_split(folder, split, of_split, settings.image_size)
        bad += bad_of_split
    if bad:
        print("\n".join(bad), file=sys.stderr)
        if not settings.skip_bad:
            raise InputError(f"{len(bad)} of {len(photos)} photos are bad, listed above: --skip_bad leaves them out")
    if not any(kept.values()):
        raise InputError("no photo is left to write")
    counts = {
        split: Counter(word for photo in kept[split] for caption in photo.captions for word in caption["words"])
        for split in SPLITS
    }
    vocabulary = Vocabulary.from_counts(counts["train"], settings.min_word_freq, settings.max_words)
    write_json(folder / "word_map.json", vocabulary.numbers)
    write_json(
        folder / "dataset.json",
        {
            "dataset": settings.dataset,
            "image_size": settings.image_size,
            "words": len(vocabulary),
            "splits": splits,
            "made_from": fingerprint(settings),
        },
        indent=1,
    )
    most = f", no more than {settings.max_words}" if settings.max_words else ""
    frequency = settings.min_word_freq
    print(f"{len(vocabulary)} words: four special ones and those at least {frequency} times in training{most}")
    for split in SPLITS:
        unknown = sum(n for word, n in counts[split].items() if word not in vocabulary.numbers)
        share = unknown / max(1, counts[split].total())
        print(f"{split}: {splits[split]['images']} images, {splits[split]['captions']} captions, {share:.2%} <unk>")


def fingerprint(settings):
    """What a prepared folder is made from: the settings that shape it and the captions file's digest."""
    made_from = asdict(settings)
    for name in ("output", "overwrite"):
        made_from.pop(name)
    if settings.captions:
        made_from["captions_digest"] = hashlib.sha256(Path(settings.captions).read_bytes()).hexdigest()
    return made_from


def read_photos(settings):
    """The photos of a captions file, told apart by its content."""
    captions, images = Path(settings.captions), Path(settings.images)
    if not settings.captions or not settings.images:
        raise InputError(f"--dataset {settings.dataset} needs --captions FILE and --images FOLDER")
    if not captions.is_file():
        raise InputError(f"--captions {captions}: no such file")
    if not images.is_dir():
        raise InputError(f"--images {images}: no such folder")
    with open(captions, "rb") as file:
        is_json = file.read(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"{", b"[")
    photos = read_karpathy(captions, images) if is_json else read_kaggle(captions, images, settings.seed)
    if not photos:
        raise InputError(f"{captions} names no images")
    return photos


def move_into_place(made, output):
    """Let a complete folder take the place of what an earlier run wrote; dataset.json leaves first, comes last."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "dataset.json").unlink(missing_ok=True)
    shutil.rmtree(output / "features", ignore_errors=True)  # they belong to the images that go
    for source in sorted(made.iterdir(), key=lambda path: path.name == "dataset.json"):
        if source.is_dir():
            shutil.rmtree(output / source.name, ignore_errors=True)
        os.replace(source, output / source.name)


def main(settings):
    """Write {train,val,test}_images.hdf5 and _captions.json, word_map.json and dataset.json."""
    require_at_least(settings, 1, "image_size", "min_word_freq", "scenes")
    require_at_least(settings, 0, "max_words", "limit")
    if settings.dataset == "shapes" and (settings.captions or settings.images):
        raise InputError("--dataset shapes draws its own scenes: name the data set that --captions and --images are of")
    output = Path(settings.output or f"data/{settings.dataset}")
    require_writable(output)
    photos = [] if settings.dataset == "shapes" else read_photos(settings)
    if output.exists() and any(output.iterdir()) and not settings.overwrite:
        if not (output / "dataset.json").is_file():
            raise InputError(f"{output} holds other files: give another --output, or --overwrite to write into it")
        made_from = fingerprint(Settings()) | read_card(output)["made_from"]  # an older folder may lack newer settings
        if made_from == fingerprint(settings):
            print(f"{output} is there already, made with the same settings")
            return
        raise InputError(f"{output} was made with other settings: --overwrite replaces it, or give another --output")
    partial = output.resolve().with_name(f".{output.resolve().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        if settings.dataset == "shapes":
            draw_shapes(partial, settings.scenes, settings.image_size, settings.seed)
            photos = read_karpathy(partial / "dataset_shapes.json", partial / "photos")
        write_folder(partial, photos, settings)
        move_into_place(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{output} is ready: python train.py --data_folder {output}")


if __name__ == "__main__":
    run_script(main, Settings)
