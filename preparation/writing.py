"""Writing a prepared folder: what is chosen, decoded, written and put in place."""

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
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import h5py
import numpy as np
from PIL import Image
from tqdm import tqdm

from common.files import write_json
from preparation.images import load_image, to_square
from preparation.storage import SPLITS, write_captions
from text.vocabulary import SPECIAL_TOKENS, Vocabulary
from utils import InputError


def subsample_train(photos, settings):
    """The training photos with the captions that the settings leave of them; says what goes."""
    generator = random.Random(settings.seed)
    if 0 < settings.max_train_images < len(photos):
        print(f"{settings.max_train_images} of {len(photos)} training images, chosen with seed {settings.seed}")
        photos = [photos[place] for place in sorted(generator.sample(range(len(photos)), settings.max_train_images))]
    if most := settings.max_caption_length:
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
        return [caption for caption in captions if len(caption["words"]) <= settings.max_caption_length]
    return [{**caption, "words": caption["words"][: settings.max_caption_length]} for caption in captions]


def describe_split(split, photos, vocabulary):
    """A line on a split: its images, its captions and their lengths, the share of words not known."""
    lengths = sorted(len(caption["words"]) for photo in photos for caption in photo.captions)
    if not lengths:
        return f"{split}: no images"
    words = (word for photo in photos for caption in photo.captions for word in caption["words"])
    unknown = sum(word not in vocabulary.word2idx or word in SPECIAL_TOKENS for word in words)
    return (
        f"{split}: {len(photos)} images, {len(lengths)} captions of {lengths[0]} to {lengths[-1]} words "
        f"(median {statistics.median_low(lengths)}), {unknown / sum(lengths):.2%} <unk>"
    )


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
    chosen["train"] = subsample_train(chosen["train"], settings)
    total = sum(map(len, chosen.values()))
    require_space(folder, total, settings.image_size)
    splits, kept, bad = {}, {}, []
    for split in SPLITS:
        splits[split], kept[split], bad_of_split = write_split(folder, split, chosen[split], settings)
        bad += bad_of_split
    if bad:
        print("\n".join(bad), file=sys.stderr)
        if not settings.skip_broken:
            raise InputError(f"{len(bad)} of {total} photos are bad, listed above: --skip_broken leaves them out")
    if not any(kept.values()):
        raise InputError("no photo is left to write")
    if words is None:
        counts = Counter(word for photo in kept["train"] for caption in photo.captions for word in caption["words"])
        vocabulary = Vocabulary.from_counts(counts, settings.min_word_freq, settings.vocab_size)
        most = f", no more than {settings.vocab_size}" if settings.vocab_size else ""
        source = f"those at least {settings.min_word_freq} times in training{most}"
    else:
        vocabulary, source = Vocabulary(SPECIAL_TOKENS + words), "those of the word map"
    write_json(folder / "word_map.json", vocabulary.word2idx)
    write_json(
        folder / "dataset.json",
        {
            "dataset": settings.dataset,
            "image_size": settings.image_size,
            "resize": settings.resize,
            "words": len(vocabulary),
            "splits": splits,
            "source": fingerprint(settings, photos),
        },
        indent=1,
    )
    print(f"{len(vocabulary)} words: four special ones and {source}")
    for split in SPLITS:
        print(describe_split(split, kept[split], vocabulary))


def fingerprint(settings, photos):
    """What a prepared folder is made from: the settings that shape it and a digest of what the captions say."""
    source = asdict(settings)
    for name in ("output_folder", "overwrite", "preview", "captions", "format"):
        source.pop(name)
    if settings.dataset != "shapes":
        photos_path = Path(settings.images or next(iter(settings.captions), "")).resolve()
        source["images"] = os.fsencode(photos_path).decode(errors="replace")
        digest = hashlib.sha256()
        for photo in photos:
            digest.update(repr((photo.name, photo.image_id, photo.split, photo.captions)).encode())
        source["captions"] = digest.hexdigest()
    return source


def owned_files(folder):
    """What this program, and the feature cache, may have written into a folder."""
    names = ["dataset.json", "word_map.json", "features", "contact_sheet.png", "words.png"]
    names += [f"{split}_{kind}" for split in SPLITS for kind in ("images.hdf5", "captions.json")]
    if (folder / "dataset_shapes.json").exists():  # elsewhere photos are not ours
        names += ["photos", "dataset_shapes.json"]
    return names


def install_folder(made, output):
    """Let a complete folder take the place of what an earlier run wrote; dataset.json leaves first, comes last."""
    if not output.exists():
        os.replace(made, output)
        return
    for name in owned_files(output):
        if (output / name).is_dir():
            shutil.rmtree(output / name)
        else:
            (output / name).unlink(missing_ok=True)
    for source in sorted(made.iterdir(), key=lambda path: path.name == "dataset.json"):
        os.replace(source, output / source.name)


def require_space(folder, images, size):
    """Raise InputError where images, which are not compressed, will not fit on the disk of a folder."""
    needed, free = images * 3 * size * size, shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{images} images of {size} pixels take {needed / 1e9:.3g} GB, {folder.parent} has {free / 1e9:.3g} GB "
            f"left: give another --output_folder or a smaller --image_size"
        )


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
