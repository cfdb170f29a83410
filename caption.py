"""Caption photos and plot the attention at each word: python caption.py photo.jpg --checkpoint best.pt"""

import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from common.files import display_name, require_writable
from decoding.captions import ImageCaption
from evaluation.consensus import load_captioning
from evaluation.ensemble import Ensemble, EnsembleSettings
from evaluation.photos import (
    PhotoRegions,
    collect_photos,
    find_objects,
    load_photos,
    photo_records,
)
from models import Captioner
from preparation.detection import Detector, detect_objects
from preparation.images import pad_boxes
from preparation.objects import require_objects_file
from utils import InputError, choose_runtime, require_needs, run_script, setting
from visualization.gallery import Gallery


@dataclass(frozen=True, kw_only=True)
class Settings(EnsembleSettings):
    """Caption photos and save a picture of each with the attention at every word."""

    # group: paths
    photos: tuple[str, ...]  # image files, folders of them, or - for names on standard input
    objects: str = setting("", needs="not detect")  # objects in the photos: a detector's results in COCO's format
    detect: str = ""  # a detector of torchvision that finds the objects, such as fasterrcnn_resnet50_fpn_v2
    detector_weights: str = setting("coco", needs="detect")  # coco: downloaded; path of a state dict; empty: random
    region_features: tuple[str, ...] = ()  # features of the photos' regions, for models that were trained on such files
    output_folder: str = "captions"  # folder of the pictures, each named after its photo

    # group: output
    n_best: int = setting(1, minimum=1)  # captions per photo, up to beam_size or samples
    json: bool = False  # print a line of JSON for each photo: file, caption, log_prob and, from 2 on, n_best
    pictures: bool = True  # save pictures; captioning many photos is several times faster without
    report: bool = False  # write report.html, a page to look through all captions with their attention
    alpha_layer: int = setting(0, needs="pictures or report")  # transformer layer whose attention is drawn; 0: last
    alpha_head: int = setting(0, needs="pictures or report")  # attention head of that layer; 0: mean of all heads
    graph_word: str = setting("", needs="pictures")  # plot the graph's edges that mattered for this word of a caption
    show: bool = setting(False, needs="pictures")  # open each picture


def validate_settings(settings: Settings) -> None:
    """Raise InputError if two settings do not go together, or the pictures cannot be written."""
    require_needs(settings)
    if not settings.photos:
        raise InputError("photos are missing: name files or folders, or drop photos on the page of tools/serve.py")
    candidates = "samples" if settings.samples else "beam_size"
    if settings.n_best > getattr(settings, candidates):
        raise InputError(f"--n_best {settings.n_best}: more than --{candidates} {getattr(settings, candidates)}")
    if settings.pictures or settings.report:
        require_writable(settings.output_folder)


def validate_graph_word(settings: Settings, captioner: Captioner | Ensemble) -> None:
    """Raise InputError where the model cannot show the edges for --graph_word."""
    if not (captioner.graph.layers and captioner.decoder.has_attention):
        raise InputError(
            f"--graph_word {settings.graph_word}: {settings.checkpoint[0]} has no graph to plot, train with "
            f"--graph_layers"
        )
    if settings.graph_word not in captioner.vocabulary.word2idx:
        raise InputError(f"--graph_word {settings.graph_word}: {settings.checkpoint[0]} does not know this word")


def format_caption(photo: str, caption: ImageCaption, settings: Settings) -> str:
    """What is printed of a photo: its captions with their log-probabilities, as text or as a line of JSON."""
    file = display_name(photo)
    n_best = [(" ".join(each.words), each.log_prob) for each in caption.n_best[: settings.n_best]]
    if not settings.json:
        (best, *others) = [f"{words} (log-probability {log_prob:.2f})" for words, log_prob in n_best]
        return "\n  ".join([f"{file}: {best}", *others])
    rows = [{"caption": words, "log_prob": round(log_prob, 4)} for words, log_prob in n_best]
    return json.dumps({"file": file} | rows[0] | ({"n_best": rows} if settings.n_best > 1 else {}))


def validate_objects(settings: Settings, captioner: Captioner | Ensemble) -> None:
    """Raise InputError if --objects and --detect do not fit the model."""
    given = {name: getattr(settings, name) for name in ("objects", "detect") if getattr(settings, name)}
    if captioner.uses_objects and not given:
        raise InputError(
            f"{' '.join(settings.checkpoint)} looks at objects: give those that a detector found in the photos as "
            f"--objects FILE, or find them with --detect NAME"
        )
    for name, value in given.items():
        if not captioner.uses_objects:
            raise InputError(f"--{name} {value}: the model does not look at objects, leave it out")


def objects_of_photos(
    settings: Settings, captioner: Captioner | Ensemble, photos: Sequence[str], device: torch.device
) -> list[list[dict[str, Any]]]:
    """The objects of each photo, none where the model looks at none. Raises InputError where flags do not fit."""
    validate_objects(settings, captioner)
    if not captioner.uses_objects:
        return [[] for _ in photos]
    size = captioner.image_size, captioner.resize
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:  # JSON has stdout to itself
        if settings.objects:
            require_objects_file(settings.objects)
            return find_objects(photos, settings.objects, *size)
        detector = Detector(settings.detect, settings.detector_weights, device)
        found = Path(folder) / "objects.json"
        detect_objects(list(dict.fromkeys(photo_records(photos))), found, detector)
        return find_objects(photos, found, *size)


def regions_of_photos(
    settings: Settings, captioner: Captioner | Ensemble, photos: Sequence[str]
) -> PhotoRegions | None:
    """The region features of the photos; None for a model that looks at the photos themselves.

    Raises InputError where --region_features do not fit.
    """
    if captioner.uses_region_features and not settings.region_features:
        raise InputError(
            f"{' '.join(settings.checkpoint)} has no encoder, it was trained on the region features of a detector: "
            f"give those of the photos as --region_features"
        )
    if settings.region_features and not captioner.uses_region_features:
        raise InputError(f"--region_features {settings.region_features[0]}: the model has an encoder, leave it out")
    if not settings.region_features:
        return None
    return PhotoRegions(photos, settings.region_features, captioner)


def main(settings: Settings) -> None:
    """Print the caption of each photo with its log-probability and save its pictures.

    Photos that cannot be read are skipped, listed at the end, and make the exit status 1; a single one is an error.
    """
    validate_settings(settings)
    runtime = choose_runtime(settings.device, settings.precision)
    photos = collect_photos(settings.photos)
    captioner, caption = load_captioning(settings, runtime)
    captioner.decoder.choose_alpha(settings.alpha_layer, settings.alpha_head)
    if settings.graph_word:
        validate_graph_word(settings, captioner)
    objects = objects_of_photos(settings, captioner, photos, runtime.device)
    regions = regions_of_photos(settings, captioner, photos)
    gallery, with_attention = Gallery(settings, captioner, photos), settings.pictures or settings.report
    broken: list[str] = []
    progress = tqdm(total=len(photos), unit="photo", disable=len(photos) == 1)
    for indices, images in load_photos(photos, settings.batch_size, captioner.image_size, captioner.resize, broken):
        inputs, boxes = regions.read(indices) if regions else (images, pad_boxes([objects[i] for i in indices]))
        captions = caption(
            inputs,
            boxes=boxes,
            with_attention=with_attention,
            with_heads=settings.report,
        )
        for i, found in zip(indices, captions, strict=True):
            tqdm.write(format_caption(photos[i], found, settings))
            if with_attention:
                gallery.add(i, found, objects[i])
            progress.update(i + 1 - progress.n)  # with those skipped
    progress.close()
    if broken and len(photos) == 1:
        raise InputError(broken[0])
    gallery.finish()
    if broken:
        print("\n  ".join([f"{len(broken)} of {len(photos)} photos were skipped:", *broken]), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_script(main, Settings)
