"""Write a prepared folder: sample the training data, decode the photos, write the files."""

import contextlib
import hashlib
import json
import os
import random
import shutil
import statistics
import sys
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image
from tqdm import tqdm

from common.files import write_json
from preparation.images import MIN_DECODED, RESIZE_MODES, open_photo, place_objects, to_square
from preparation.records import ImageRecord
from preparation.region_features import RegionFeatures
from preparation.storage import SPLITS, RegionInfo, RegionWriter, open_images, write_captions
from text.vocabulary import SPECIAL_TOKENS, Vocabulary
from utils import BaseSettings, InputError, setting


@dataclass(frozen=True, kw_only=True)
class FolderSettings(BaseSettings):
    """Photos, words and captions of a prepared folder."""

    # group: photos
    image_size: int = setting(256, minimum=1)  # side of the square images in pixels
    resize: str = setting("squash", choices=RESIZE_MODES)  # make photos square: squashed, their center, or padded
    skip_broken: bool = False  # skip and list photos that are broken, missing or without captions, instead of stopping

    # group: words and captions
    min_word_freq: int = setting(0, minimum=0)  # rarer words become <unk>; 0: 5, or 1 below 1,000 training photos
    vocab_size: int = setting(0, minimum=0)  # most frequent words to keep, special tokens not counted; 0: all
    max_train_images: int = setting(0, minimum=0)  # training images to keep at most, chosen with the seed; 0: all
    captions_per_image: int = setting(0, minimum=0)  # captions per training image to keep at most; 0: all
    max_caption_length: int = setting(0, minimum=0)  # words of a training caption at most; 0: any number
    long_captions: str = setting(
        "truncate", choices=("truncate", "drop"), needs="max_caption_length"
    )  # longer captions

    # group: run
    seed: int = 0  # of the shapes, random splits, --max_train_images and --captions_per_image


# ------------------------------------------------------------------------------------------------ training data


def subsample_train(records: list[ImageRecord], settings: FolderSettings) -> list[ImageRecord]:
    """Sample the training records and captions that the settings keep; print what is left out."""
    generator = random.Random(settings.seed)
    if 0 < settings.max_train_images < len(records):
        print(f"{settings.max_train_images} of {len(records)} training images, chosen with seed {settings.seed}")
        records = [records[i] for i in sorted(generator.sample(range(len(records)), settings.max_train_images))]
    if settings.max_caption_length:
        records = limit_caption_length(records, settings.max_caption_length, settings.long_captions == "drop")
    if max_captions := settings.captions_per_image:
        samples = (generator.sample(record.captions, min(max_captions, len(record.captions))) for record in records)
        records = [record.with_captions(sample) for record, sample in zip(records, samples, strict=True)]
    return records


def limit_caption_length(records: list[ImageRecord], max_length: int, drop: bool) -> list[ImageRecord]:
    """Truncate or drop captions of more than `max_length` words, with the images that have no other; print counts."""
    kept, long = [], 0
    for record in records:
        captions = record.captions
        short = [caption for caption in captions if len(caption["words"]) <= max_length]
        long += len(captions) - len(short)
        if not drop:
            short = [{**caption, "words": caption["words"][:max_length]} for caption in captions]
        if short or not captions:
            kept.append(record.with_captions(short))
    print(f"{long} training captions of more than {max_length} words are {'dropped' if drop else 'truncated'}")
    if len(kept) < len(records):
        print(f"{len(records) - len(kept)} training images have no other captions, they are left out")
    return kept


# ------------------------------------------------------------------------------------------------ images


def load_record(record: ImageRecord, size: int, resize: str) -> tuple[ImageRecord, np.ndarray]:
    """Load a record's image (3, size, size) uint8; returns it behind the record with boxes placed in the square.

    Raises InputError if the record has no captions or its photo is unreadable.
    """
    if not record.captions:
        raise InputError(f"{record.path}: has no captions")
    if record.row < 0:
        photo = open_photo(record.path, round(MIN_DECODED * size))
    else:
        try:
            with open_images(record.path) as images:
                photo = Image.fromarray(images[record.row].transpose(1, 2, 0))
        except OSError as error:
            raise InputError(f"{record.path}, image {record.row}: {error}") from None
    if record.objects:
        record = replace(record, objects=place_objects(record.objects, photo.size, size, resize))
    return record, to_square(photo, size, resize).numpy()


def load_records(
    records: list[ImageRecord], size: int, resize: str, description: str
) -> Iterator[Future[tuple[ImageRecord, np.ndarray]]]:
    """Yield a future of `load_record` for each record in order, under a progress bar.

    Threads use all cores, since Pillow and torch release the interpreter lock while they decode and resize. Only a few
    images are loaded ahead, so memory stays constant.
    """
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(records), desc=description, unit="photo") as bar:
        futures = (pool.submit(load_record, record, size, resize) for record in records)
        queue = deque(islice(futures, 8 * workers))
        while queue:
            yield queue.popleft()
            queue.extend(islice(futures, 1))
            bar.update()


# ------------------------------------------------------------------------------------------------ files


def write_split(
    folder: Path,
    split: str,
    records: list[ImageRecord],
    settings: FolderSettings,
    region_features: RegionFeatures | None = None,
) -> tuple[dict[str, Any], list[ImageRecord], list[str]]:
    """Write the images, captions and region features of a split.

    Returns its metadata, the records written and the errors of the others.
    """
    if not records:
        return {"images": 0, "captions": 0, "digest": ""}, [], []
    metadata: dict[str, Any] = {}
    kept, errors, digest, size = [], [], hashlib.sha256(), settings.image_size
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(h5py.File(folder / f"{split}_images.hdf5", "w"))
        regions = None
        if region_features:
            regions_file = stack.enter_context(h5py.File(folder / f"{split}_regions.hdf5", "w"))
            regions = RegionWriter(regions_file, region_features.feature_dim)
        shape = (len(records), 3, size, size)
        images = file.create_dataset("images", shape, np.uint8, chunks=(1, *shape[1:]), maxshape=shape)
        for future in load_records(records, size, settings.resize, f"{split} photos"):
            try:
                record, image = future.result()
                if regions and region_features:
                    regions.append(*region_features.read(record, size, settings.resize))
            except InputError as error:
                errors.append(str(error))
                continue
            content = image.tobytes()
            images.id.write_direct_chunk((len(kept), 0, 0, 0), content)  # at least twice as fast as images[i] = ...
            digest.update(content)
            kept.append(record)
        images.resize(len(kept), axis=0)
        file.attrs["digest"] = digest.hexdigest()
        if regions:
            metadata["regions_digest"] = regions.finish()
    write_captions(folder / f"{split}_captions.json", map(captions_entry, kept))
    num_captions = sum(len(record.captions) for record in kept)
    metadata |= {"images": len(kept), "captions": num_captions, "digest": digest.hexdigest()}
    return metadata, kept, errors


def captions_entry(record: ImageRecord) -> dict[str, Any]:
    """Return what the captions file says about an image."""
    entry = {"image": record.name, "image_id": record.image_id, "captions": record.captions}
    if record.objects is not None:
        entry["objects"] = record.objects
    return entry


def write_folder(
    folder: Path,
    records: list[ImageRecord],
    settings: FolderSettings,
    words: list[str] | None,
    region_features: RegionFeatures | None = None,
    source: dict[str, Any] | None = None,
) -> None:
    """Write all files of a prepared folder, dataset.json last.

    Args:
        words: the vocabulary's, special tokens excluded; None: those of the training captions that the settings keep.
        region_features: features of all records, if any.
        source: settings and data that the folder is made from, for dataset.json.

    Raises InputError if photos are unusable and not to be skipped, if none is left, or if the disk is too small.
    """
    by_split = {split: [record for record in records if record.split == split] for split in SPLITS}
    by_split["train"] = subsample_train(by_split["train"], settings)
    total = sum(map(len, by_split.values()))
    image_bytes = 3 * settings.image_size**2 + (region_features.bytes_of_first if region_features else 0)
    needed, free = total * image_bytes, shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{total} images of {settings.image_size} pixels take {needed / 1e9:.3g} GB, {folder.parent} has "
            f"{free / 1e9:.3g} GB left: give another --output_folder or a smaller --image_size"
        )
    splits, kept, errors = {}, {}, []
    for split in SPLITS:
        splits[split], kept[split], found = write_split(folder, split, by_split[split], settings, region_features)
        errors += found
    if errors:
        print("\n".join(errors), file=sys.stderr)
        if not settings.skip_broken:
            raise InputError(f"{len(errors)} of {total} photos are unusable, listed above: --skip_broken skips them")
    if not any(kept.values()):
        raise InputError("no usable photos")
    vocabulary, origin = choose_vocabulary(kept["train"], settings, words)
    write_json(folder / "word_map.json", vocabulary.word2idx)
    metadata = {
        "dataset": (source or {}).get("dataset", ""),
        "image_size": settings.image_size,
        "resize": settings.resize,
        "words": len(vocabulary),
        "splits": splits,
        "digest": content_digest(folder, splits),
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()},
        "source": source or {},
    }
    if region_features:
        metadata["region_features"] = RegionInfo(region_features.feature_dim, region_features.has_boxes)._asdict()
        print(region_features.describe())
    write_json(folder / "dataset.json", metadata, indent=1)
    print(f"{len(vocabulary)} words: four special tokens and {origin}")
    for split in SPLITS:
        print(describe_split(split, kept[split], vocabulary))


def content_digest(folder: Path, splits: dict[str, Any]) -> str:
    """Compute a digest of the images, captions and words of a prepared folder; a copy has the same."""
    digest = hashlib.sha256(json.dumps(splits).encode())  # with the digest of each split's images
    for name in ("word_map.json", *(f"{split}_captions.json" for split in SPLITS if splits[split]["images"])):
        with open(folder / name, "rb") as file:
            while content := file.read(2**20):  # all of COCO's captions are 150 MB
                digest.update(content)
    return digest.hexdigest()


def choose_vocabulary(
    records: list[ImageRecord], settings: FolderSettings, words: list[str] | None
) -> tuple[Vocabulary, str]:
    """Make the vocabulary of given words or of training records; returns it with a description of its origin.

    Raises InputError if the training captions have words and the settings keep none.
    """
    if words is not None:
        return Vocabulary(SPECIAL_TOKENS + words), "those of the word map"
    counts = Counter(word for record in records for caption in record.captions for word in caption["words"])
    limit = f", {settings.vocab_size} at most" if settings.vocab_size else ""
    origin = f"those at least {settings.min_word_freq} times in the training captions{limit}"
    vocabulary = Vocabulary.from_counts(counts, settings.min_word_freq, settings.vocab_size)
    if counts and len(vocabulary) == len(SPECIAL_TOKENS):
        raise InputError(
            f"no word occurs {settings.min_word_freq} times in the training captions: give a smaller --min_word_freq"
        )
    return vocabulary, origin


def describe_split(split: str, records: list[ImageRecord], vocabulary: Vocabulary) -> str:
    """Describe a split in one line: its images, the lengths of its captions, and the share of <unk>."""
    lengths, unknown = [], 0
    for record in records:
        for caption in record.captions:
            lengths.append(len(caption["words"]))
            unknown += sum(word not in vocabulary.word2idx or word in SPECIAL_TOKENS for word in caption["words"])
    if not lengths:
        return f"{split}: no images"
    hint = ""
    if statistics.median(lengths) <= 1:
        hint = "; most captions have one word: if they are sentences, separate their words by spaces"
    return (
        f"{split}: {len(records)} images, {len(lengths)} captions of {min(lengths)} to {max(lengths)} words "
        f"(median {statistics.median_low(lengths)}), {unknown / sum(lengths):.2%} <unk>{hint}"
    )
