"""Speed of preprocessing against a plain loop, speed of the loader, and peak memory: python benchmarks/bench_data.py

The plain loop is that of most tutorials: one process opens, converts and resizes a photo with Pillow and writes it as a
row of an HDF5 data set. Both sides read the same files, from the system's cache.
"""

import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import create_input_files
from common.files import write_json
from datasets import CaptionDataset, make_batches, make_loader, shuffled_indices
from preparation.records import ImageRecord, pack_captions
from preparation.storage import SPLITS, write_captions
from preparation.writing import write_folder, write_split
from text.vocabulary import SPECIAL_TOKENS, Vocabulary
from utils import BaseSettings, InputError, run_script


@dataclass(frozen=True, kw_only=True)
class Settings(BaseSettings):
    """Time preprocessing, the loader and the loading of captions; check that pixels agree with the plain loop's."""

    photos: str = ""  # folder of JPEGs of about 500 pixels; empty: generate them
    image_size: int = 256  # side of the square images in pixels
    num_photos: int = 200  # photos of 500 pixels; half as many have 2,000
    num_written: int = 20000  # images to write while measuring memory
    coco_images: int = 123287  # images to load five captions each for
    repeats: int = 3  # runs of each side of a comparison; the median is reported
    seed: int = 0  # seed of generated photos and captions


def generate_photo(generator: np.random.Generator, width: int, height: int) -> Image.Image:
    """Generate an image with structure at all scales, like a photo."""
    pixels = np.full((height, width, 3), 128.0)
    for cells in (8, 32, 128, width // 4):
        noise = generator.normal(size=(max(1, cells * height // width), cells, 3)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(noise[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            pixels[..., channel] += np.asarray(layer) * 60 * (8 / cells) ** 0.5
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def generate_photos(folder: Path, count: int, width: int, height: int, seed: int) -> list[Path]:
    """Generate JPEGs in a new folder and return their paths."""
    folder.mkdir()
    generator = np.random.default_rng(seed)
    paths = [folder / f"{i:05d}.jpg" for i in range(count)]
    for path in paths:
        generate_photo(generator, width, height).save(path, quality=90)
    return paths


def plain_loop(paths: list[Path], size: int, path: Path) -> None:
    """Write photos the way most tutorials do."""
    with h5py.File(path, "w") as file:
        images = file.create_dataset("images", (len(paths), 3, size, size), dtype="uint8")
        for i, photo in enumerate(paths):
            image = Image.open(photo).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
            images[i] = np.array(image).transpose(2, 0, 1)


def records_of(paths: list[Path]) -> list[ImageRecord]:
    """Return records of photos, all with the same caption."""
    captions = pack_captions([{"words": ["a", "photo"], "raw": "A photo."}])
    return [ImageRecord(path, path.name, i, "train", captions) for i, path in enumerate(paths)]


def compare(paths: list[Path], folder: Path, settings: Settings) -> tuple[float, float, float, float, float]:
    """Time both sides.

    Returns:
        The ratio, photos/s of the plain loop and of ours, the share of pixels within 1 of 255, the mean difference.
    """
    data_settings = create_input_files.Settings(dataset="benchmark", image_size=settings.image_size)
    records, seconds = records_of(paths), {"plain": [], "ours": []}
    for _ in range(settings.repeats):
        start = time.perf_counter()
        plain_loop(paths, settings.image_size, folder / "plain.hdf5")
        seconds["plain"].append(time.perf_counter() - start)
        start = time.perf_counter()
        write_split(folder, "train", records, data_settings)
        seconds["ours"].append(time.perf_counter() - start)
    with h5py.File(folder / "plain.hdf5") as plain_file, h5py.File(folder / "train_images.hdf5") as our_file:
        plain_images: Any = plain_file["images"]
        our_images: Any = our_file["images"]
        pairs = zip(plain_images, our_images, strict=True)
        differences = np.stack([abs(plain.astype(int) - ours) for plain, ours in pairs])
    assert differences.mean() < 3, "the two sides do not agree"
    plain, ours = (len(paths) / sorted(times)[len(times) // 2] for times in seconds.values())
    return ours / plain, plain, ours, float((differences <= 1).mean()), float(differences.mean())


def loader_speed(folder: Path, workers: int, in_memory: bool = False) -> float:
    """Return the photos/s of one shuffled epoch of a prepared folder's training split."""
    dataset = CaptionDataset(folder, "train", Vocabulary.load(folder))
    if in_memory:
        dataset.load_into_memory()
    batches = make_batches(shuffled_indices(len(dataset), seed=0, epoch=0), 32)
    start = time.perf_counter()
    for _ in make_loader(dataset, batches, workers):
        pass
    return len(dataset) / (time.perf_counter() - start)


def write_many(paths: list[Path], folder: Path, data_settings: create_input_files.Settings, count: int) -> None:
    """Write a prepared folder of `count` images, repeating the photos."""
    repeats = -(-count // len(paths))
    records = [replace(record, name=f"{i}") for i in range(repeats) for record in records_of(paths)]
    write_folder(folder, records[:count], data_settings, None)


def generate_captions(folder: Path, num_images: int, seed: int) -> None:
    """Write a prepared folder with captions of English word frequencies, and images that are never filled in."""
    generator = np.random.default_rng(seed)
    word_ids = generator.zipf(1.3, size=(num_images, 5, 40)) % 25_000
    lengths = generator.normal(10.5, 2.4, size=(num_images, 5)).round().clip(5, 40).astype(int)

    def entries() -> Iterator[dict[str, Any]]:
        for i in range(num_images):
            captions = []
            for caption, length in zip(word_ids[i], lengths[i], strict=True):
                words = [f"word{word_id}" for word_id in caption[:length]]
                captions.append({"words": words, "raw": " ".join(words)})
            yield {"image": f"train2014/COCO_train2014_{i:012d}.jpg", "image_id": i, "captions": captions}

    folder.mkdir()
    write_captions(folder / "train_captions.json", entries())
    with h5py.File(folder / "train_images.hdf5", "w") as file:
        file.create_dataset("images", (num_images, 3, 8, 8), np.uint8, chunks=(1, 3, 8, 8))
        file.attrs["digest"] = ""
    words = SPECIAL_TOKENS + [f"word{i}" for i in range(10_000)]
    write_json(folder / "word_map.json", {word: index for index, word in enumerate(words)})
    splits = {split: {"images": num_images if split == "train" else 0, "digest": ""} for split in SPLITS}
    write_json(
        folder / "dataset.json",
        {"image_size": 8, "resize": "squash", "splits": splits, "digest": "", "files": {}, "source": {}},
    )


def load_captions(folder: Path) -> tuple[float, int]:
    """Return the seconds to load a folder's captions as training does, and the number of captions."""
    start = time.perf_counter()
    dataset = CaptionDataset(folder, "train", Vocabulary.load(folder))
    return time.perf_counter() - start, dataset.captions.num_captions()


def peak_memory() -> float:
    """Return this process's peak memory in GB."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, getrusage also counts the memory of the parent process
        match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert match
        return int(match[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def measure_memory(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float, float]:
    """Return a function's result, the GB by which it raised this process's peak memory, and that peak in GB."""
    before = peak_memory()
    result = function(*arguments)
    return result, peak_memory() - before, peak_memory()


def in_new_process(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float, float]:
    """Run `measure_memory` in a new process, so that nothing else counts."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure_memory, function, *arguments).result()


def bench_preprocessing(settings: Settings, folder: Path) -> tuple[dict[str, float], list[Path]]:
    """Print the table of preprocessing and return its ratios and the small photos."""
    if settings.photos:
        small = sorted(Path(settings.photos).glob("*.jpg"))[: settings.num_photos]
        if not small:
            raise InputError(f"--photos {settings.photos}: contains no .jpg files")
    else:
        small = generate_photos(folder / "small", settings.num_photos, 500, 375, settings.seed)
    large = generate_photos(folder / "large", max(1, settings.num_photos // 2), 2000, 1500, settings.seed)
    print(f"preprocessing to {settings.image_size} pixels, {os.cpu_count()} cores")
    print("| photos | plain loop, photos/s | ours, photos/s | ratio | pixels within 1 of 255 | mean difference |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    ratios = {}
    for name, paths in {"500": small, "2000": large}.items():
        ratio, plain, ours, within, difference = compare(paths, folder, settings)
        ratios[f"ratio_{name}"] = ratio
        print(f"| {name} pixels | {plain:.0f} | {ours:.0f} | {ratio:.1f} | {within:.2%} | {difference:.3f} |")
    return ratios, small


def bench_writing_and_loading(settings: Settings, folder: Path, photos: list[Path]) -> dict[str, float]:
    """Print and return the peak memory of writing many images, and the speed of loading them."""
    data_settings = create_input_files.Settings(dataset="benchmark", image_size=settings.image_size, min_word_freq=1)
    many, results = folder / "many", {}
    many.mkdir()
    _, _, peak = in_new_process(write_many, photos, many, data_settings, settings.num_written)
    results["peak_gb_of_writing"] = peak
    print(f"writing {settings.num_written} images: peak memory {peak:.2f} GB")
    for workers in (0, 2, 4):
        results[f"loader_{workers}_workers"] = loader_speed(many, workers)
        print(f"loader, {workers} workers: {results[f'loader_{workers}_workers']:.0f} photos/s")
    results["loader_in_memory"] = loader_speed(many, 0, in_memory=True)
    print(f"loader, 0 workers, in memory: {results['loader_in_memory']:.0f} photos/s")
    return results


def bench_captions(settings: Settings, folder: Path) -> dict[str, float]:
    """Print and return the time and memory to load as many captions as COCO has."""
    generate_captions(folder / "captions", settings.coco_images, settings.seed)
    (seconds, num_captions), raised, peak = in_new_process(load_captions, folder / "captions")
    print(f"loading {num_captions} captions: {seconds:.1f} s, {raised:.2f} GB at peak (process: {peak:.2f} GB)")
    return {"seconds_to_load_captions": seconds, "gb_of_captions": raised}


def main(settings: Settings) -> None:
    """Print tables and one line of JSON."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        results, photos = bench_preprocessing(settings, folder)
        results |= bench_writing_and_loading(settings, folder, photos)
        results |= bench_captions(settings, folder)
    print(json.dumps(results))


if __name__ == "__main__":
    run_script(main, Settings)
