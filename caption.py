"""Caption photos and plot the attention at each word: python caption.py photo.jpg --checkpoint best.pt"""

import contextlib
import functools
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from common.files import display_name, require_writable
from decoding.captions import ImageCaption, caption_batch
from decoding.settings import DecodingSettings
from evaluation.consensus import CaptionIndex, make_consensus
from evaluation.ensemble import Ensemble, combine, load_models
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
from tools.serve import CaptionServer, CardMaker
from utils import InputError, Runtime, choose_runtime, require_at_least, run_script
from visualization.gallery import Gallery
from visualization.report import Report

# Settings of photos that are named and of the files of their pictures; the page has its own choice of layers and heads.
NOT_SERVED = (
    *("objects", "region_features", "output_folder", "batch_size", "json", "report"),
    *("alpha_layer", "alpha_head", "graph_word", "show"),
)


@dataclass(frozen=True)
class Settings:
    """Caption photos and save a picture of each with the attention at every word."""

    # group: paths
    photos: tuple[str, ...]  # image files, folders of them, or - for names on standard input
    checkpoint: tuple[str, ...] = ("runs/shapes/best.pt",)  # what train.py wrote; several are one ensemble
    objects: str = ""  # objects in the photos, a detector's results as COCO has them, for models that look at objects
    detect: str = ""  # a detector of torchvision that finds the objects itself, such as fasterrcnn_resnet50_fpn_v2
    detector_weights: str = "coco"  # coco: downloaded; the path of a torchvision state dict; or empty for random ones
    region_features: tuple[str, ...] = ()  # features of the photos' regions, for models that were trained on such files
    output_folder: str = "captions"  # folder of the pictures, each named after its photo

    # group: beam search
    beam_size: int = 5  # beams; 1 is greedy decoding
    length_penalty: float = 0.5  # rank by log-probability / length ** this; 0 favors short captions
    max_length: int = 30  # maximum words of a caption
    min_length: int = 0  # minimum words of a caption
    no_repeat_ngram: int = 0  # no sequence of this many words occurs twice in a caption; 0: any may
    banned_endings: tuple[str, ...] = ()  # words that no caption may end with, such as: a with of
    num_beam_groups: int = 1  # diverse beam search: groups that share the beams, each unlike those before it
    diversity_penalty: float = 0.5  # what a word costs for each beam of earlier groups that chose it
    batch_size: int = 32  # photos decoded at once

    # group: sampling
    samples: int = 0  # captions sampled per photo in place of beams; 0: beam search
    temperature: float = 1.0  # below 1 samples favor probable words
    top_k: int = 0  # samples take only the k most probable words; 0: all
    top_p: float = 1.0  # samples take only the most probable words that together reach this probability
    seed: int = 0  # of the random numbers of samples, which depend on --batch_size as well

    # group: ensemble and consensus
    views: tuple[str, ...] = ("original",)  # views of a photo that caption together: original hflip crop
    consensus_index: str = ""  # index of tools/index_captions.py: prefer captions like those of similar photos
    consensus_weight: float = 10.0  # weight of the mean CIDEr-D (0 to 10) against the captions of similar photos
    similar_photos: int = 50  # similar photos whose captions count for the consensus

    # group: output
    n_best: int = 1  # captions per photo, up to beam_size or samples
    json: bool = False  # print a line of JSON for each photo: file, caption, log_prob and, from 2 on, n_best
    pictures: bool = True  # save pictures; without them captioning many photos is several times faster
    report: bool = False  # write report.html, a page to look through all captions with their attention
    alpha_layer: int = 0  # layer whose attention is drawn, from 1, of a transformer decoder; 0: the last
    alpha_head: int = 0  # head of that layer, from 1; 0: the mean of all heads
    graph_word: str = ""  # a word: where a caption has it, plot the graph's edges that mattered for it, too
    show: bool = False  # open each picture

    # group: page
    serve: bool = False  # a page in the browser, on this machine only, to drop photos on; none are named here then
    port: int = 8000  # of the page; 0: any free one

    # group: run
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 mixed precision where it is faster
    device: str = "auto"  # auto, cpu or cuda


def validate_settings(settings: Settings) -> DecodingSettings:
    """How captions are decoded. Raises InputError where a value is out of range or two do not go together."""
    validate_serve(settings)
    require_at_least(settings, 1, "n_best", "similar_photos")
    require_at_least(settings, 0, "consensus_weight")
    decoding = DecodingSettings.from_settings(settings)
    candidates = "samples" if settings.samples else "beam_size"
    if settings.n_best > getattr(settings, candidates):
        raise InputError(f"--n_best {settings.n_best}: more than --{candidates} {getattr(settings, candidates)}")
    for name in ("graph_word", "show", "alpha_layer", "alpha_head"):
        in_report = settings.report and name.startswith("alpha")
        if getattr(settings, name) and not (settings.pictures or in_report):
            raise InputError(f"--{name} needs pictures: leave --no-pictures out")
    if (settings.pictures or settings.report) and not settings.serve:
        require_writable(settings.output_folder)
    return decoding


def validate_serve(settings: Settings) -> None:
    """Raise InputError where photos are neither named nor served, or a setting has no effect on the page."""
    if not settings.serve:
        if not settings.photos:
            raise InputError("photos are missing: name files or folders, or give --serve for a page to drop them on")
        if settings.port != Settings.port:
            raise InputError(f"--port {settings.port}: is of --serve, give both")
        return
    if settings.photos:
        raise InputError(f"{settings.photos[0]}: --serve takes photos on its page, leave it out")
    for name in NOT_SERVED:
        if getattr(settings, name) != getattr(Settings, name):
            raise InputError(f"--{name} has no effect on the page of --serve, leave it out")
    require_at_least(settings, 0, "port")
    if settings.port > 65535:
        raise InputError(f"--port {settings.port}: must be at most 65535")


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
    """Raise InputError where --objects and --detect do not fit the model, or each other."""
    if settings.detector_weights != "coco" and not settings.detect:
        raise InputError(f"--detector_weights {settings.detector_weights}: is of --detect, give both")
    given = {name: getattr(settings, name) for name in ("objects", "detect") if getattr(settings, name)}
    if captioner.uses_objects and not given:
        of_files = "" if settings.serve else "give those that a detector found in the photos as --objects FILE, or "
        raise InputError(f"{' '.join(settings.checkpoint)} looks at objects: {of_files}find them with --detect NAME")
    if len(given) > 1:
        raise InputError("--objects and --detect: give one of them")
    for name, value in given.items():
        if not captioner.uses_objects:
            raise InputError(f"--{name} {value}: the model looks at no objects, leave it out")


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


def load(
    settings: Settings, decoding: DecodingSettings, runtime: Runtime
) -> tuple[Captioner | Ensemble, Callable[..., list[ImageCaption]]]:
    """The captioner of the settings, and `decoding.captions.caption_batch` with it and all that is the same for all.

    Raises InputError where a file cannot be read, or does not fit the others.
    """
    captioner = combine(load_models(settings.checkpoint, settings.views, runtime.device), settings.views)
    torch.manual_seed(decoding.seed)
    decoding.constraints(captioner.vocabulary)  # an unknown word is an error before all work
    rerank = None
    if settings.consensus_index:
        rerank = make_consensus(CaptionIndex.load(settings.consensus_index), captioner, settings, runtime).rerank
    return captioner, functools.partial(caption_batch, captioner, decoding=decoding, runtime=runtime, rerank=rerank)


def make_server(settings: Settings) -> CaptionServer:
    """The server of the page, which does not run yet. Raises InputError where it cannot caption photos as they are."""
    decoding = validate_settings(settings)
    runtime = choose_runtime(settings.device, settings.precision)
    captioner, caption = load(settings, decoding, runtime)
    checkpoint = " ".join(settings.checkpoint)
    if captioner.uses_region_features:
        raise InputError(f"--serve: {checkpoint} looks at the region features of a detector, not at photos")
    validate_objects(settings, captioner)
    detector = Detector(settings.detect, settings.detector_weights, runtime.device) if settings.detect else None
    report = Report("Image captioning", settings.checkpoint[:1], details={"checkpoint": checkpoint}, serve=True)
    return CaptionServer(report.page(), CardMaker(captioner, caption, detector, decoding.seed), settings.port)


def main(settings: Settings) -> None:
    """Print the caption of each photo with its log-probability and save its pictures, or serve the page.

    Photos that cannot be read are skipped, listed at the end, and make the exit status 1; a single one is an error.
    """
    if settings.serve:
        server = make_server(settings)
        print(f"{server.address} captions photos until Ctrl-C", flush=True)
        return server.run()
    decoding = validate_settings(settings)
    runtime = choose_runtime(settings.device, settings.precision)
    photos = collect_photos(settings.photos)
    captioner, caption = load(settings, decoding, runtime)
    captioner.decoder.choose_alpha(settings.alpha_layer, settings.alpha_head)
    if settings.graph_word:
        validate_graph_word(settings, captioner)
    objects = objects_of_photos(settings, captioner, photos, runtime.device)
    regions = regions_of_photos(settings, captioner, photos)
    gallery, with_attention = Gallery(settings, captioner, photos), settings.pictures or settings.report
    broken: list[str] = []
    progress = tqdm(total=len(photos), unit="photo", disable=len(photos) == 1)
    for indices, images in load_photos(photos, decoding.batch_size, captioner.image_size, captioner.resize, broken):
        inputs, boxes = regions.read(indices) if regions else (images, pad_boxes([objects[i] for i in indices]))
        captions = caption(
            inputs,
            is_features=regions is not None,
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
