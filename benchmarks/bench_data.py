"""Photos/s of preprocessing against the plain loop, of the loader, and memory: python benchmarks/bench_data.py

The plain loop is the way of most tutorials: one process opens, converts and resizes a photo with Pillow and writes it
as a row of an HDF5 data set. Both sides read the same files, which lie in the system's cache.
"""

import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import create_input_files
from common.files import write_json
from datasets import CaptionDataset, make_batches, make_loader, shuffled_indices
from preparation.caption_formats import ImageRecord
from preparation.storage import SPLITS, write_captions
from text.vocabulary import SPECIAL_TOKENS, Vocabulary
from utils import InputError, run_script


@dataclass(frozen=True)
class Settings:
    """Time preprocessing, which must agree with the plain loop's pixels, reading, and the loading of captions."""

    photos: str = ""  # folder of JPEGs of about 500 pixels; empty: generated ones
    image_size: int = 256  # side of the square images in pixels
    number: int = 200  # photos of 500 pixels; half as many of 2,000
    written: int = 20000  # images to write while memory is measured
    coco_images: int = 123287  # images whose captions are loaded, five each
    repeats: int = 3  # counted runs of each side of a comparison, the median counts
    seed: int = 0  # of what is generated


def generate_photo(generator, width, height):
    """A picture with structure at all scales, as photos have it."""
    pixels = np.full((height, width, 3), 128.0)
    for cells in (8, 32, 128, width // 4):
        noise = generator.normal(size=(max(1, cells * height // width), cells, 3)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(noise[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            pixels[..., channel] += np.asarray(layer) * 60 * (8 / cells) ** 0.5
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def generate_photos(folder, number, width, height, seed):
    """Paths of generated JPEGs in a new folder."""
    folder.mkdir()
    generator = np.random.default_rng(seed)
    paths = [folder / f"{i:05d}.jpg" for i in range(number)]
    for path in paths:
        generate_photo(generator, width, height).save(path, quality=90)
    return paths


def plain_loop(paths, size, path):
    """What most tutorials do."""
    with h5py.File(path, "w") as file:
        images = file.create_dataset("images", (len(paths), 3, size, size), dtype="uint8")
        for i, photo in enumerate(paths):
            image = Image.open(photo).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
            images[i] = np.array(image).transpose(2, 0, 1)


def photos_of(paths):
    """Photos as create_input_files.py has them."""
    caption = {"words": ["a", "photo"], "raw": "A photo."}
    return [ImageRecord(path, path.name, i, "train", [caption]) for i, path in enumerate(paths)]


def compare(paths, folder, settings):
    """Photos/s of both sides, and how far their pixels differ: ratio, plain, ours, share within one step, mean."""
    plan = create_input_files.Settings(dataset="benchmark", image_size=settings.image_size)
    photos, seconds = photos_of(paths), {"plain": [], "ours": []}
    for _ in range(settings.repeats):
        start = time.perf_counter()
        plain_loop(paths, settings.image_size, folder / "plain.hdf5")
        seconds["plain"].append(time.perf_counter() - start)
        start = time.perf_counter()
        create_input_files.write_split(folder, "train", photos, plan)
        seconds["ours"].append(time.perf_counter() - start)
    with h5py.File(folder / "plain.hdf5") as plain, h5py.File(folder / "train_images.hdf5") as ours:
        gaps = [abs(one.astype(int) - other) for one, other in zip(plain["images"], ours["images"], strict=True)]
    gaps = np.stack(gaps)
    assert gaps.mean() < 3, "the two sides do not agree"
    plain, ours = (len(paths) / sorted(times)[len(times) // 2] for times in seconds.values())
    return ours / plain, plain, ours, float((gaps <= 1).mean()), float(gaps.mean())


def loader_speed(folder, workers, in_memory=False):
    """Photos/s of one shuffled epoch of a prepared folder's training split."""
    dataset = CaptionDataset(folder, "train", Vocabulary.load(folder))
    if in_memory:
        dataset.read_all()
    batches = make_batches(shuffled_indices(len(dataset), seed=0, epoch=0), 32)
    start = time.perf_counter()
    for _ in make_loader(dataset, batches, workers):
        pass
    return len(dataset) / (time.perf_counter() - start)


def write_many(paths, folder, plan, number):
    """Write images as create_input_files.py does, with all that belongs to a folder."""
    many = [replace(one, name=f"{i}") for i in range(-(-number // len(paths))) for one in photos_of(paths)][:number]
    create_input_files.write_folder(folder, many, plan, None)


def generate_captions(folder, images, seed):
    """A prepared folder with captions of the words of English's frequencies, and images that were never written."""
    generator = np.random.default_rng(seed)
    numbers = generator.zipf(1.3, size=(images, 5, 40)) % 25_000
    lengths = generator.normal(10.5, 2.4, size=(images, 5)).round().clip(5, 40).astype(int)

    def entries():
        for i in range(images):
            told = [[f"word{n}" for n in one[:length]] for one, length in zip(numbers[i], lengths[i], strict=True)]
            captions = [{"words": words, "raw": " ".join(words)} for words in told]
            yield {"image": f"train2014/COCO_train2014_{i:012d}.jpg", "image_id": i, "captions": captions}

    folder.mkdir()
    write_captions(folder / "train_captions.json", entries())
    with h5py.File(folder / "train_images.hdf5", "w") as file:
        file.create_dataset("images", (images, 3, 8, 8), np.uint8, chunks=(1, 3, 8, 8))
        file.attrs["digest"] = ""
    words = SPECIAL_TOKENS + [f"word{n}" for n in range(10_000)]
    write_json(folder / "word_map.json", {word: number for number, word in enumerate(words)})
    splits = {split: {"images": images if split == "train" else 0, "digest": ""} for split in SPLITS}
    write_json(folder / "dataset.json", {"image_size": 8, "splits": splits, "source": {}})


def load_captions(folder):
    """Seconds to load a folder's captions as training does, and how many there are."""
    start = time.perf_counter()
    dataset = CaptionDataset(folder, "train", Vocabulary.load(folder))
    return time.perf_counter() - start, dataset.captions.num_captions()


def peak_memory():
    """This process's peak memory in GB."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux getrusage counts what the parent process had, too
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def measured(function, *arguments):
    """What a function returns, and by how many GB it raised this process's peak memory to what."""
    before = peak_memory()
    result = function(*arguments)
    return result, peak_memory() - before, peak_memory()


def in_a_new_process(function, *arguments):
    """`measured` of a function in a process of its own, so that nothing else counts."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measured, function, *arguments).result()


def main(settings):
    """Print tables and one line of JSON."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if settings.photos:
            small = sorted(Path(settings.photos).glob("*.jpg"))[: settings.number]
            if not small:
                raise InputError(f"--photos {settings.photos}: no .jpg there")
        else:
            small = generate_photos(folder / "small", settings.number, 500, 375, settings.seed)
        large = generate_photos(folder / "large", max(1, settings.number // 2), 2000, 1500, settings.seed)
        numbers = {}
        print(f"preprocessing to {settings.image_size} pixels, {os.cpu_count()} cores")
        print("| photos | plain loop, photos/s | ours, photos/s | ratio | pixels within 1 of 255 | mean gap |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        for name, paths in {"500": small, "2000": large}.items():
            ratio, plain, ours, within, gap = compare(paths, folder, settings)
            numbers[f"ratio_{name}"] = ratio
            print(f"| {name} pixels | {plain:.0f} | {ours:.0f} | {ratio:.1f} | {within:.2%} | {gap:.3f} |")

        plan = create_input_files.Settings(dataset="benchmark", image_size=settings.image_size, min_word_freq=1)
        many = folder / "many"
        many.mkdir()
        _, _, peak = in_a_new_process(write_many, small, many, plan, settings.written)
        numbers["peak_gb_of_writing"] = peak
        print(f"writing {settings.written} images: peak memory {peak:.2f} GB")
        for workers in (0, 2, 4):
            numbers[f"loader_{workers}_workers"] = loader_speed(many, workers)
            print(f"loader, {workers} workers: {numbers[f'loader_{workers}_workers']:.0f} photos/s")
        numbers["loader_in_memory"] = loader_speed(many, 0, in_memory=True)
        print(f"loader, 0 workers, in memory: {numbers['loader_in_memory']:.0f} photos/s")

        generate_captions(folder / "captions", settings.coco_images, settings.seed)
        (seconds, captions), raised, peak = in_a_new_process(load_captions, folder / "captions")
        numbers |= {"seconds_to_load_captions": seconds, "gb_of_captions": raised}
        print(f"{captions} captions: loaded in {seconds:.1f} s, {raised:.2f} GB at most (the process {peak:.2f} GB)")
    print(json.dumps(numbers))


if __name__ == "__main__":
    run_script(main, Settings)
