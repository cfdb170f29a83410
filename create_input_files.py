"""Prepare photos with captions: python create_input_files.py --dataset NAME --captions FILE --images FOLDER"""

import hashlib
import shlex
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.files import did_you_mean, path_text, require_writable
from preparation.caption_formats import FORMATS, random_split, read_karpathy, read_records
from preparation.installation import installed_folder, is_prepared, lock_folder
from preparation.objects import add_objects, require_objects_file
from preparation.preview import plot_preview
from preparation.records import ImageRecord
from preparation.region_features import RegionFeatures
from preparation.shapes import MAX_SHAPES, draw_shapes
from preparation.tutorial_format import tutorial_words
from preparation.writing import FolderSettings, write_folder
from utils import InputError, choose_device, require_needs, run_script, setting


@dataclass(frozen=True, kw_only=True)
class Settings(FolderSettings):
    """Prepare a data set. Edit a value here or pass it as a flag: python create_input_files.py --image_size 224"""

    # group: paths
    dataset: str = "shapes"  # shapes: draw its scenes; any other name: read --captions and --images
    captions: tuple[str, ...] = ()  # a file of any of the formats, several COCO files, or a folder
    images: str = ""  # folder of the photos; not needed if --captions is a folder
    format: str = setting("auto", choices=FORMATS)  # format of the captions; auto: detect it
    objects: str = ""  # objects in the photos: a detector's results or COCO annotations (instances_train2014.json)
    detect: str = setting("", needs="objects")  # detector to write --objects with (fasterrcnn_resnet50_fpn_v2)
    detector_weights: str = setting("coco", needs="detect")  # coco: download; path of a state dict; empty: random
    region_features: tuple[str, ...] = ()  # region features of a detector: files or a folder, in any known layout
    output_folder: str = ""  # folder to write; empty: data/<dataset>
    preview: str = ""  # a prepared folder: plot some of its photos and its words as PNG into it, and stop

    # group: run
    overwrite: bool = False  # replace a folder that was prepared with other settings
    num_scenes: int = setting(4000, minimum=1)  # shapes: scenes for training; val and test have a tenth as many each
    num_shapes: tuple[int, ...] = setting((1, 2, 2), minimum=1, maximum=MAX_SHAPES)  # shapes: numbers per scene
    device: str = setting("auto", needs="detect")  # of the detector: auto, cpu or cuda


# Settings that do not shape a prepared folder, or that affect it only through the records.
NOT_IN_SOURCE = ("output_folder", "overwrite", "preview", "device", "format", "objects", "detect", "detector_weights")


def validate_settings(settings: Settings) -> None:
    """Raise InputError for settings that contradict each other and for paths that do not exist."""
    require_needs(settings)
    if settings.dataset in ("", ".", "..") or set(settings.dataset) & set("/\\"):
        raise InputError(f"--dataset {settings.dataset!r} is not a name: --output_folder takes a path")
    captions, images = settings.captions, settings.images
    if settings.dataset == "shapes":
        if captions or images or settings.objects or settings.region_features or settings.detect:
            raise InputError(
                "--dataset shapes reads no files: give another --dataset name for your --captions, --images, "
                "--objects, --detect or --region_features"
            )
        return
    for path in filter(None, captions):
        if not Path(path).exists():
            raise InputError(f"--captions {path}: no such file or folder{did_you_mean(path)}")
    has_folder = bool(captions) and Path(captions[0]).is_dir()
    if not captions or not all(captions) or not (images or has_folder):
        raise InputError(
            f"--dataset {settings.dataset} requires --captions FILE and --images FOLDER, or --captions FOLDER with both"
        )
    if images and has_folder:
        raise InputError(f"--images {images}: leave it out, --captions {captions[0]} is a folder")
    if images and not Path(images).is_dir():
        raise InputError(f"--images {images}: no such folder{did_you_mean(images)}")
    if settings.objects and not settings.detect:
        require_objects_file(settings.objects)


def choose_min_word_freq(settings: Settings, records: list[ImageRecord]) -> Settings:
    """Set --min_word_freq by the number of training photos, unless it is given, and print it."""
    if settings.min_word_freq:
        return settings
    num_photos = settings.num_scenes
    if settings.dataset != "shapes":
        num_photos = sum(record.split == "train" for record in records)
    num_photos = min(num_photos, settings.max_train_images or num_photos)
    settings = settings.replace(min_word_freq=5 if num_photos >= 1000 else 1)
    print(f"--min_word_freq {settings.min_word_freq}, the default for {num_photos} training photos")
    return settings


def read_dataset(settings: Settings) -> tuple[list[ImageRecord], list[str] | None]:
    """Read the records of --captions, each in a split, and the words of their word map, None without one."""
    records, kind = read_records(settings.captions, settings.images, settings.format)
    if not all(record.split for record in records):
        records = random_split(records, settings.seed)
        sizes = Counter(record.split for record in records)
        print(f"no splits given: {sizes['val']} images for val and {sizes['test']} for test, seed {settings.seed}")
    return records, tutorial_words(Path(settings.captions[0])) if kind == "tutorial" else None


def write_objects(settings: Settings, records: list[ImageRecord]) -> None:
    """Write the file of --objects with the detector of --detect, unless it exists."""
    path = Path(settings.objects)
    if path.exists():
        print(f"{path} exists and is used: delete it to run --detect again")
        return
    from preparation.detection import Detector, detect_objects  # importing torchvision takes a second

    detector = Detector(settings.detect, settings.detector_weights, choose_device(settings.device))
    if not detect_objects(records, path, detector):
        path.unlink()
        raise InputError(f"--detect {settings.detect}: found nothing in {len(records)} photos")


def fingerprint(settings: Settings, records: list[ImageRecord]) -> dict[str, Any]:
    """Return what a prepared folder is made from: its settings, the photos' folder and a digest of the records.

    The shapes are made from settings alone.
    """
    source = {name: value for name, value in asdict(settings).items() if name not in NOT_IN_SOURCE}
    source.pop("captions")  # their content counts
    source["num_shapes"] = list(settings.num_shapes)  # JSON has no tuples
    source["region_features"] = [path_text(path) for path in settings.region_features]
    if settings.dataset != "shapes":
        source["images"] = path_text(settings.images or next(iter(settings.captions), ""))
        digest = hashlib.sha256()
        for record in records:
            content = (record.name, record.image_id, record.split, record.captions, record.objects)
            digest.update(repr(content).encode())
        source["captions"] = digest.hexdigest()
    return source


def main(settings: Settings) -> None:
    """Write {train,val,test}_images.hdf5 and _captions.json, word_map.json and dataset.json; or preview a folder."""
    if settings.preview:
        print(*plot_preview(settings.preview), sep="\n")
        return
    validate_settings(settings)
    output = Path(settings.output_folder or f"data/{settings.dataset}")
    require_writable(output)
    records, words = ([], None) if settings.dataset == "shapes" else read_dataset(settings)
    if settings.detect:
        write_objects(settings, records)
    if settings.objects:
        records = add_objects(records, Path(settings.objects))
        if not any(record.objects for record in records):
            raise InputError(
                f"--objects {settings.objects}: has no objects for any of the {len(records)} photos, such as "
                f"{records[0].name}"
            )
    region_features = None
    if settings.region_features:
        region_features = RegionFeatures(settings.region_features, records)
        if not settings.skip_broken:
            region_features.require_all()
        for record in region_features.missing:
            print(f"{record.name}: has no region features", file=sys.stderr)
        records = region_features.found
    if words is None:
        settings = choose_min_word_freq(settings, records)
    source = fingerprint(settings, records)
    with lock_folder(output):
        if is_prepared(output, source, settings.overwrite):
            print(f"{output} exists already, made with the same settings")
            return
        with installed_folder(output) as folder:
            if settings.dataset == "shapes":
                draw_shapes(folder, settings.num_scenes, settings.image_size, settings.seed, settings.num_shapes)
                records = read_karpathy(folder / "dataset_shapes.json", folder / "photos")
            write_folder(folder, records, settings, words, region_features, source)
    print(f"{output} is ready: python train.py --data_folder {shlex.quote(str(output))}")


if __name__ == "__main__":
    run_script(main, Settings)
