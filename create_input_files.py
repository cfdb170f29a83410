"""Prepare photos with captions: python create_input_files.py --dataset NAME --captions FILE --images FOLDER"""

import shlex
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from common.files import did_you_mean, require_writable
from preparation.caption_formats import FORMATS, random_split, read_records
from preparation.folder_formats import tutorial_words
from preparation.images import RESIZE_MODES
from preparation.installation import installed_folder, lock_folder, owned_files
from preparation.json_formats import read_karpathy
from preparation.objects import add_objects, require_objects_file
from preparation.preview import plot_preview
from preparation.records import ImageRecord
from preparation.region_features import RegionFeatures
from preparation.shapes import MAX_SHAPES, draw_shapes
from preparation.storage import read_metadata
from preparation.writing import fingerprint, write_folder
from utils import BaseSettings, InputError, choose_device, require_needs, run_script, setting

LONG_CAPTIONS = ("truncate", "drop")


@dataclass(frozen=True, kw_only=True)
class Settings(BaseSettings):
    """Prepare a data set. Edit a value here or pass it as a flag: python create_input_files.py --image_size 224"""

    # group: paths
    dataset: str = "shapes"  # shapes draws its scenes itself; any other name reads --captions and --images
    captions: tuple[str, ...] = ()  # a file of any of the formats, several of COCO's, or a folder
    images: str = ""  # the folder of the photos; none where --captions is a folder
    format: str = setting("auto", choices=FORMATS)  # of the captions; auto detects it
    objects: str = ""  # objects in the photos: a detector's results, or annotations (instances_train2014.json), of COCO
    detect: str = setting("", needs="objects")  # detector to write --objects with (fasterrcnn_resnet50_fpn_v2)
    detector_weights: str = setting("coco", needs="detect")  # coco: downloaded; path of a state dict; empty: random
    region_features: tuple[str, ...] = ()  # features of a detector for each photo: files or a folder, of any known form
    output_folder: str = ""  # the folder to write; empty: data/<dataset>
    preview: str = ""  # a prepared folder: plot some of its photos and its words as PNG into it, and stop

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
    long_captions: str = setting("truncate", choices=LONG_CAPTIONS, needs="max_caption_length")  # longer captions

    # group: run
    overwrite: bool = False  # replace a folder that was prepared with other settings
    num_scenes: int = setting(4000, minimum=1)  # shapes: scenes for training; val and test have a tenth as many each
    num_shapes: tuple[int, ...] = setting((1, 2, 2), minimum=1, maximum=MAX_SHAPES)  # shapes: how many a scene may have
    device: str = "auto"  # of the detector: auto, cpu or cuda
    seed: int = 0  # of the shapes, random splits, --max_train_images and --captions_per_image


def validate_settings(settings: Settings) -> None:
    """Raise InputError for settings out of range, or that contradict each other."""
    require_needs(settings)
    if settings.dataset in ("", ".", "..") or set(settings.dataset) & set("/\\"):
        raise InputError(f"--dataset {settings.dataset!r} is not a name: --output_folder takes a path")
    if settings.dataset != "shapes":
        validate_paths(settings)
    elif settings.captions or settings.images or settings.objects or settings.region_features or settings.detect:
        raise InputError(
            "--dataset shapes reads no files: name the data set of --captions and --images, --objects, --detect or "
            "--region_features"
        )


def validate_paths(settings: Settings) -> None:
    """Raise InputError where --captions or --images are missing, do not exist or do not go together."""
    for path in filter(None, settings.captions):
        if not Path(path).exists():
            raise InputError(f"--captions {path}: no such file or folder{did_you_mean(path)}")
    has_folder = bool(settings.captions) and Path(settings.captions[0]).is_dir()
    if not settings.captions or not all(settings.captions) or not (settings.images or has_folder):
        raise InputError(
            f"--dataset {settings.dataset} needs --captions FILE and --images FOLDER, or a folder of both as --captions"
        )
    if settings.images and has_folder:
        raise InputError(f"--images {settings.images}: leave it out, --captions {settings.captions[0]} is a folder")
    if settings.objects and not settings.detect:
        require_objects_file(settings.objects)
    if settings.images and not Path(settings.images).is_dir():
        raise InputError(f"--images {settings.images}: no such folder{did_you_mean(settings.images)}")


def choose_min_word_freq(settings: Settings, records: list[ImageRecord]) -> Settings:
    """The settings with a --min_word_freq for the number of training photos, which is printed, where none is given."""
    if settings.min_word_freq:
        return settings
    num_photos = settings.num_scenes
    if settings.dataset != "shapes":
        num_photos = sum(record.split == "train" for record in records)
    num_photos = min(num_photos, settings.max_train_images or num_photos)
    settings = replace(settings, min_word_freq=5 if num_photos >= 1000 else 1)
    print(f"--min_word_freq {settings.min_word_freq}, the default for {num_photos} training photos")
    return settings


def read_dataset(settings: Settings) -> tuple[list[ImageRecord], list[str] | None]:
    """The records of --captions, each in a split, and the words of their word map; None where they have none."""
    records, kind = read_records(settings.captions, settings.images, settings.format)
    words = tutorial_words(Path(settings.captions[0])) if kind == "tutorial" else None
    if not all(record.split for record in records):
        records = random_split(records, settings.seed)
        sizes = Counter(record.split for record in records)
        print(f"no splits given: {sizes['val']} images for val and {sizes['test']} for test, seed {settings.seed}")
    return records, words


def find_region_features(records: list[ImageRecord], settings: Settings) -> tuple[list[ImageRecord], RegionFeatures]:
    """The records that have features in --region_features, and these. Raises InputError where photos have none."""
    features = RegionFeatures(settings.region_features, records)
    if settings.skip_broken:
        for record in features.missing:
            print(f"{record.name}: has no region features", file=sys.stderr)
        return [record for record in records if features.has(record)], features
    features.require_all()
    return records, features


def is_prepared(output: Path, settings: Settings, records: list[ImageRecord]) -> bool:
    """Whether a folder holds already what is asked for; InputError where it holds something else."""
    if not output.exists() or not any(output.iterdir()):
        return False
    if not (output / "dataset.json").is_file():
        if {path.name for path in output.iterdir()} <= set(owned_files(output)):
            return False  # a run was killed while it installed its files
        raise InputError(f"{output} holds other files: give another --output_folder")
    if settings.overwrite:
        return False
    metadata = read_metadata(output)
    if metadata["source"] != fingerprint(settings, records):
        raise InputError(
            f"{output} was made with other settings: --overwrite replaces it, or give another --output_folder"
        )
    for name, size in metadata["files"].items():
        if not (output / name).is_file() or (output / name).stat().st_size != size:
            raise InputError(f"{output / name} is missing or was changed: --overwrite prepares the folder again")
    return True


def main(settings: Settings) -> None:
    """Write {train,val,test}_images.hdf5 and _captions.json, word_map.json and dataset.json; or preview a folder."""
    if settings.preview:
        print(*plot_preview(settings.preview), sep="\n")
        return
    validate_settings(settings)
    output = Path(settings.output_folder or f"data/{settings.dataset}")
    require_writable(output)
    records, words = ([], None) if settings.dataset == "shapes" else read_dataset(settings)
    if settings.detect and Path(settings.objects).exists():
        print(f"{settings.objects} exists already and is read: --detect writes it where it does not")
    elif settings.detect:
        from preparation.detection import Detector, detect_objects  # torchvision takes a second to import

        detector = Detector(settings.detect, settings.detector_weights, choose_device(settings.device))
        if not detect_objects(records, Path(settings.objects), detector):
            Path(settings.objects).unlink()
            raise InputError(f"--detect {settings.detect}: found nothing in {len(records)} photos")
    if settings.objects:
        records = add_objects(records, Path(settings.objects))
        if not any(record.objects for record in records):
            raise InputError(
                f"--objects {settings.objects}: has no object of the {len(records)} photos, such as {records[0].name}"
            )
    region_features = None
    if settings.region_features:
        records, region_features = find_region_features(records, settings)
    if words is None:
        settings = choose_min_word_freq(settings, records)
    with lock_folder(output):
        if is_prepared(output, settings, records):
            print(f"{output} exists already, made with the same settings")
            return
        with installed_folder(output) as folder:
            if settings.dataset == "shapes":
                draw_shapes(folder, settings.num_scenes, settings.image_size, settings.seed, settings.num_shapes)
                records = read_karpathy(folder / "dataset_shapes.json", folder / "photos")
            write_folder(folder, records, settings, words, region_features)
    print(f"{output} is ready: python train.py --data_folder {shlex.quote(str(output))}")


if __name__ == "__main__":
    run_script(main, Settings)
