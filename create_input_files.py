"""Prepare photos with captions: python create_input_files.py --dataset NAME --captions FILE --images FOLDER"""

import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from preparation.caption_formats import FORMATS

from common.files import require_writable
from preparation.caption_formats import random_split, read_karpathy, read_records, tutorial_words
from preparation.preview import plot_preview
from preparation.shapes import draw_shapes
from preparation.storage import read_metadata
from preparation.writing import disk_errors_in_one_line, fingerprint, install_folder, owned_files, write_folder
from utils import InputError, require_at_least, run_script


@dataclass(frozen=True)
class Settings:
    """Prepare a data set. Edit a value here or give it as flag: python create_input_files.py --image_size 224"""

    dataset: str = "shapes"  # shapes draws its own scenes; any other name reads --captions and --images
    captions: tuple[str, ...] = ()  # a file of any of the formats, COCO's own two, or a folder
    images: str = ""  # the folder that the photos lie in; none where --captions is a folder
    format: Literal[FORMATS] = "auto"  # of the captions; auto tells it by their content
    output_folder: str = ""  # the folder to write; empty: data/<dataset>
    preview: str = ""  # a prepared folder: draw some of its photos and its words as PNG into it, and stop

    image_size: int = 256  # side of the square images in pixels
    resize: Literal["squash", "crop", "pad"] = "squash"  # make photos square: squashed, their middle, or on gray ground
    skip_broken: bool = False  # leave broken and missing photos out, listed, instead of stopping

    min_word_freq: int = 5  # training captions must hold a word at least so often, or it becomes <unk>
    vocab_size: int = 0  # words to keep at most, the most frequent ones; 0: all
    max_train_images: int = 0  # training images at most, chosen with the seed; 0: all
    captions_per_image: int = 0  # captions of a training image at most, chosen with the seed; 0: all
    max_caption_length: int = 0  # words of a training caption at most; 0: any number
    long_captions: Literal["truncate", "drop"] = "truncate"  # what becomes of longer ones

    overwrite: bool = False  # replace a folder that was prepared otherwise
    num_scenes: int = 4000  # shapes to draw for training; a tenth as many each for val and test
    seed: int = 0  # of the shapes, of splits where the captions have none, of limit and captions_per_image


# ------------------------------------------------------------------------------------------------ what to write


# --------------------------------------------------------------------------------------------- prepared folders


def check_output(output, settings, photos):
    """Whether a folder holds already what is asked for; InputError where something else is in the way."""
    if not output.exists() or not any(output.iterdir()):
        return False
    if not (output / "dataset.json").is_file():
        if {path.name for path in output.iterdir()} <= set(owned_files(output)):
            return False  # a killed run was just moving its files there
        raise InputError(f"{output} holds other files: give another --output_folder")
    if settings.overwrite:
        return False
    found, wanted = read_metadata(output)["source"], fingerprint(settings, photos)
    defaults = asdict(Settings())  # of settings that an earlier version did not know
    if all(found.get(name, defaults.get(name)) == value for name, value in wanted.items()):
        print(f"{output} is there already, made with the same settings")
        return True
    raise InputError(f"{output} was made with other settings: --overwrite replaces it, or give another --output_folder")


def validate_settings(settings):
    """Raise InputError for settings out of range, or that do not go together."""
    require_at_least(settings, 1, "image_size", "min_word_freq", "num_scenes")
    require_at_least(settings, 0, "vocab_size", "max_train_images", "captions_per_image", "max_caption_length")
    if settings.long_captions == "drop" and not settings.max_caption_length:
        raise InputError("--long_captions drop needs --max_caption_length: how long is long?")
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
    if settings.preview:
        print(*plot_preview(settings.preview), sep="\n")
        return
    validate_settings(settings)
    output = Path(settings.output_folder or f"data/{settings.dataset}")
    require_writable(output)
    photos, words = [], None
    if settings.dataset != "shapes":
        photos, kind = read_records(settings.captions, settings.images, settings.format)
        words = tutorial_words(Path(settings.captions[0])) if kind == "tutorial" else None
        if not all(photo.split for photo in photos):
            photos = random_split(photos, settings.seed)
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
                draw_shapes(partial, settings.num_scenes, settings.image_size, settings.seed)
                photos = read_karpathy(partial / "dataset_shapes.json", partial / "photos")
            write_folder(partial, photos, settings, words)
            install_folder(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{output} is ready: python train.py --data_folder {output}")


if __name__ == "__main__":
    run_script(main, Settings)
