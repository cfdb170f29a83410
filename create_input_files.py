"""Prepare photos with captions: python create_input_files.py --dataset NAME --captions FILE --images FOLDER"""

import contextlib
import errno
import hashlib
import os
import random
import re
import shutil
import statistics
import sys
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
from PIL import Image
from tqdm import tqdm

from contact_sheet import draw_folder
from formats import FORMATS, read_karpathy, read_photos, split_by_seed, tutorial_words
from photos import load_image, to_square
from prepared import SPLITS, read_card, write_captions
from shapes import draw_shapes
from utils import InputError, require_at_least, require_writable, run_script, write_json
from vocabulary import SPECIAL_WORDS, Vocabulary


@dataclass(frozen=True)
class Settings:
    """Prepare a data set. Edit a value here or give it as flag: python create_input_files.py --image_size 224"""

    dataset: str = "shapes"  # shapes draws its own scenes; any other name reads --captions and --images
    captions: tuple[str, ...] = ()  # a file of any of the formats, COCO's own two, or a folder
    images: str = ""  # the folder that the photos lie in; none where --captions is a folder
    format: Literal[FORMATS] = "auto"  # of the captions; auto tells it by their content
    output: str = ""  # the folder to write; empty: data/<dataset>
    look: str = ""  # a prepared folder: draw some of its photos and its words as PNG into it, and stop

    image_size: int = 256  # side of the square images in pixels
    resize: Literal["squash", "crop", "pad"] = "squash"  # make photos square: squashed, their middle, or on grey ground
    skip_bad: bool = False  # leave broken and missing photos out, listed, instead of stopping

    min_word_freq: int = 5  # training captions must hold a word at least so often, or it becomes <unk>
    max_words: int = 0  # words to keep at most, the most frequent ones; 0: all
    limit: int = 0  # training images at most, chosen with the seed; 0: all
    captions_per_image: int = 0  # captions of a training image at most, chosen with the seed; 0: all
    max_length: int = 0  # words of a training caption at most; 0: any number
    long_captions: Literal["truncate", "drop"] = "truncate"  # what becomes of longer ones

    overwrite: bool = False  # replace a folder that was prepared otherwise
    scenes: int = 4000  # shapes to draw for training; a tenth as many each for val and test
    seed: int = 0  # of the shapes, of splits where the captions have none, of limit and captions_per_image


# ------------------------------------------------------------------------------------------------ what to write


def choose_training(photos, settings):
    """The training photos with the captions that the settings leave of them; says what goes."""
    generator = random.Random(settings.seed)
    if 0 < settings.limit < len(photos):
        print(f"{settings.limit} of {len(photos)} training images, chosen with seed {settings.seed}")
        photos = [photos[place] for place in sorted(generator.sample(range(len(photos)), settings.limit))]
    if most := settings.max_length:
        long = sum(len(caption["words"]) > most for photo in photos for caption in photo.captions)
        verb = {"truncate": "truncated", "drop": "dropped"}[settings.long_captions]
        print(f"{long} training captions of more than {most} words are {verb}")
        shortened = [replace(photo, captions=shorten(photo.captions, settings)) for photo in photos]
        left = [new for new, photo in zip(shortened, photos, strict=True) if new.captions or not photo.captions]
        if len(left) < len(photos):
            print(f"{len(photos) - len(left)} training images have no other captions, they are left out")
        photos = left
    if most := settings.captions_per_image:
        photos = [
            replace(photo, captions=generator.sample(photo.captions, min(most, len(photo.captions))))
            for photo in photos
        ]
    return photos


def shorten(captions, settings):
    """Captions of max_length words at most, longer ones truncated or left out."""
    if settings.long_captions == "drop":
        return [caption for caption in captions if len(caption["words"]) <= settings.max_length]
    return [{**caption, "words": caption["words"][: settings.max_length]} for caption in captions]


def describe_split(split, photos, vocabulary):
    """A line on a split: its images, its captions and their lengths, the share of words not known."""
    lengths = sorted(len(caption["words"]) for photo in photos for caption in photo.captions)
    if not lengths:
        return f"{split}: no images"
    words = (word for photo in photos for caption in photo.captions for word in caption["words"])
    unknown = sum(word not in vocabulary.numbers or word in SPECIAL_WORDS for word in words)
    return (
        f"{split}: {len(photos)} images, {len(lengths)} captions of {lengths[0]} to {lengths[-1]} words "
        f"(median {statistics.median_low(lengths)}), {unknown / sum(lengths):.2%} <unk>"
    )


# --------------------------------------------------------------------------------------------- prepared folders


def decode(photo, size, resize):
    """A photo's pixels (3, S, S) uint8, or the InputError that says what is wrong with it."""
    if not photo.captions:
        return InputError(f"{photo.path}: has no captions")
    try:
        if photo.row < 0:
            return load_image(photo.path, size, resize)
        with h5py.File(photo.path) as file:
            image = Image.fromarray(file["images"][photo.row].transpose(1, 2, 0))
        return to_square(image, size, resize).numpy()
    except InputError as error:
        return error
    except OSError as error:
        return InputError(f"{photo.path}, image {photo.row}: {error}")


def decode_all(photos, size, resize, description):
    """Decode photos on all cores: yields (photo, what `decode` returns) in their order.

    Pillow lets go of the interpreter while it decodes and resizes, so threads use every core. Few are ahead of what is
    written, so that memory stays flat.
    """
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(photos), desc=description, unit="photo") as bar:
        futures = ((photo, pool.submit(decode, photo, size, resize)) for photo in photos)
        waiting = deque(islice(futures, 8 * workers))
        while waiting:
            photo, pixels = waiting.popleft()
            yield photo, pixels.result()
            waiting.extend(islice(futures, 1))
            bar.update()


def write_split(folder, split, photos, settings):
    """Write one split's images and captions; returns its line of dataset.json, the photos kept and what is bad."""
    if not photos:
        return {"images": 0, "captions": 0, "digest": ""}, [], []
    kept, bad, digest, size = [], [], hashlib.sha256(), settings.image_size
    with h5py.File(folder / f"{split}_images.hdf5", "w") as file:
        shape = (len(photos), 3, size, size)
        images = file.create_dataset("images", shape, np.uint8, chunks=(1, *shape[1:]), maxshape=shape)
        for photo, pixels in decode_all(photos, size, settings.resize, f"{split} photos"):
            if isinstance(pixels, InputError):
                bad.append(str(pixels))
            else:
                content = pixels.tobytes()
                images.id.write_direct_chunk((len(kept), 0, 0, 0), content)  # twice as fast as images[...] =, or faster
                digest.update(content)
                kept.append(photo)
        images.resize(len(kept), axis=0)
        file.attrs["digest"] = digest.hexdigest()
    entries = (
        {"image": photo.name, "image_id": photo.image_id, "captions": photo.captions}
        | ({"objects": photo.objects} if photo.objects else {})
        for photo in kept
    )
    write_captions(folder / f"{split}_captions.json", entries)
    captions = sum(len(photo.captions) for photo in kept)
    return {"images": len(kept), "captions": captions, "digest": digest.hexdigest()}, kept, bad


def write_folder(folder, photos, settings, words):
    """Write a whole prepared folder, dataset.json last. Raises InputError where photos are bad, or space is short.

    `words` are those of the vocabulary; None counts them in the training captions.
    """
    chosen = {split: [photo for photo in photos if photo.split == split] for split in SPLITS}
    chosen["train"] = choose_training(chosen["train"], settings)
    total = sum(map(len, chosen.values()))
    require_space(folder, total, settings.image_size)
    splits, kept, bad = {}, {}, []
    for split in SPLITS:
        splits[split], kept[split], bad_of_split = write_split(folder, split, chosen[split], settings)
        bad += bad_of_split
    if bad:
        print("\n".join(bad), file=sys.stderr)
        if not settings.skip_bad:
            raise InputError(f"{len(bad)} of {total} photos are bad, listed above: --skip_bad leaves them out")
    if not any(kept.values()):
        raise InputError("no photo is left to write")
    if words is None:
        counts = Counter(word for photo in kept["train"] for caption in photo.captions for word in caption["words"])
        vocabulary = Vocabulary.from_counts(counts, settings.min_word_freq, settings.max_words)
        most = f", no more than {settings.max_words}" if settings.max_words else ""
        source = f"those at least {settings.min_word_freq} times in training{most}"
    else:
        vocabulary, source = Vocabulary(SPECIAL_WORDS + words), "those of the word map"
    write_json(folder / "word_map.json", vocabulary.numbers)
    write_json(
        folder / "dataset.json",
        {
            "dataset": settings.dataset,
            "image_size": settings.image_size,
            "resize": settings.resize,
            "words": len(vocabulary),
            "splits": splits,
            "made_from": fingerprint(settings, photos),
        },
        indent=1,
    )
    print(f"{len(vocabulary)} words: four special ones and {source}")
    for split in SPLITS:
        print(describe_split(split, kept[split], vocabulary))


def fingerprint(settings, photos):
    """What a prepared folder is made from: the settings that shape it and a digest of what the captions say."""
    made_from = asdict(settings)
    for name in ("output", "overwrite", "look", "captions", "format"):
        made_from.pop(name)
    if settings.dataset != "shapes":
        source = Path(settings.images or next(iter(settings.captions), "")).resolve()
        made_from["images"] = os.fsencode(source).decode(errors="replace")
        digest = hashlib.sha256()
        for photo in photos:
            digest.update(repr((photo.name, photo.image_id, photo.split, photo.captions)).encode())
        made_from["captions"] = digest.hexdigest()
    return made_from


def written_names(folder):
    """What this program, and the feature cache, may have written into a folder."""
    names = ["dataset.json", "word_map.json", "features", "contact_sheet.png", "words.png"]
    names += [f"{split}_{kind}" for split in SPLITS for kind in ("images.hdf5", "captions.json")]
    if (folder / "dataset_shapes.json").exists():  # elsewhere photos are not ours
        names += ["photos", "dataset_shapes.json"]
    return names


def check_output(output, settings, photos):
    """Whether a folder holds already what is asked for; InputError where something else is in the way."""
    if not output.exists() or not any(output.iterdir()):
        return False
    if not (output / "dataset.json").is_file():
        if {path.name for path in output.iterdir()} <= set(written_names(output)):
            return False  # a killed run was just moving its files there
        raise InputError(f"{output} holds other files: give another --output")
    if settings.overwrite:
        return False
    found, wanted = read_card(output)["made_from"], fingerprint(settings, photos)
    defaults = asdict(Settings())  # of settings that an earlier version did not know
    if all(found.get(name, defaults.get(name)) == value for name, value in wanted.items()):
        print(f"{output} is there already, made with the same settings")
        return True
    raise InputError(f"{output} was made with other settings: --overwrite replaces it, or give another --output")


def move_into_place(made, output):
    """Let a complete folder take the place of what an earlier run wrote; dataset.json leaves first, comes last."""
    if not output.exists():
        os.replace(made, output)
        return
    for name in written_names(output):
        if (output / name).is_dir():
            shutil.rmtree(output / name)
        else:
            (output / name).unlink(missing_ok=True)
    for source in sorted(made.iterdir(), key=lambda path: path.name == "dataset.json"):
        os.replace(source, output / source.name)


@contextlib.contextmanager
def disk_errors_in_one_line(output):
    """Turn what h5py raises in several parts where the disk is full, or fails otherwise, into one InputError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = re.search(r"error message = '([^']*)'", str(error))
        if reason or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InputError(f"{output} cannot be written: {reason[1] if reason else error.strerror}") from None
        raise


def require_space(folder, images, size):
    """Raise InputError where images, which are not compressed, will not fit on the disk of a folder."""
    needed, free = images * 3 * size * size, shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{images} images of {size} pixels take {needed / 1e9:.3g} GB, {folder.parent} has {free / 1e9:.3g} GB "
            f"left: give another --output or a smaller --image_size"
        )


def check(settings):
    """Raise InputError for settings out of range, or that do not go together."""
    require_at_least(settings, 1, "image_size", "min_word_freq", "scenes")
    require_at_least(settings, 0, "max_words", "limit", "captions_per_image", "max_length")
    if settings.long_captions == "drop" and not settings.max_length:
        raise InputError("--long_captions drop needs --max_length: how long is long?")
    if settings.dataset == "shapes":
        if settings.captions or settings.images:
            raise InputError(
                "--dataset shapes draws its own scenes: name the data set that --captions and --images are of"
            )
    elif (
        not all(settings.captions)
        or not settings.captions
        or not (settings.images or Path(settings.captions[0]).is_dir())
    ):
        raise InputError(
            f"--dataset {settings.dataset} needs --captions FILE and --images FOLDER, or a folder of both as --captions"
        )
    elif settings.images and Path(settings.captions[0]).is_dir():
        raise InputError(f"--images {settings.images}: leave it out, --captions {settings.captions[0]} is a folder")
    elif settings.images and not Path(settings.images).is_dir():
        raise InputError(f"--images {settings.images}: no such folder")


def main(settings):
    """Write {train,val,test}_images.hdf5 and _captions.json, word_map.json and dataset.json; or look at them."""
    if settings.look:
        print(*draw_folder(settings.look), sep="\n")
        return
    check(settings)
    output = Path(settings.output or f"data/{settings.dataset}")
    require_writable(output)
    photos, words = [], None
    if settings.dataset != "shapes":
        photos, kind = read_photos(settings.captions, settings.images, settings.format)
        words = tutorial_words(Path(settings.captions[0])) if kind == "tutorial" else None
        if not all(photo.split for photo in photos):
            photos = split_by_seed(photos, settings.seed)
            sizes = Counter(photo.split for photo in photos)
            print(f"no splits given: {sizes['val']} images for val and {sizes['test']} for test, seed {settings.seed}")
    if check_output(output, settings, photos):
        return
    partial = output.resolve().with_name(f".{output.resolve().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with disk_errors_in_one_line(output):
            if settings.dataset == "shapes":
                draw_shapes(partial, settings.scenes, settings.image_size, settings.seed)
                photos = read_karpathy(partial / "dataset_shapes.json", partial / "photos")
            write_folder(partial, photos, settings, words)
            move_into_place(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{output} is ready: python train.py --data_folder {output}")


if __name__ == "__main__":
    run_script(main, Settings)
