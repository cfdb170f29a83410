"""Caption photos and plot the attention at each word: python caption.py photo.jpg --checkpoint best.pt"""

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from common.files import display_name, require_writable
from decoding.captions import ImageCaption
from evaluation.consensus import load_captioning
from evaluation.ensemble import Ensemble, EnsembleSettings
from evaluation.photos import collect_photos, load_photos
from models import Captioner
from preparation.images import pad_boxes
from utils import InputError, choose_runtime, require_needs, run_script, setting
from visualization.photos import picture_paths

# Modules that only some flags need are imported where they are needed; matplotlib alone takes half a second.


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
    """Raise InputError if settings do not go together, or the output folder cannot be written."""
    require_needs(settings)
    if not settings.photos:
        raise InputError("photos are missing: name files or folders, or drop photos on the page of tools/serve.py")
    candidates = "samples" if settings.samples else "beam_size"
    if settings.n_best > getattr(settings, candidates):
        raise InputError(f"--n_best {settings.n_best}: more than --{candidates} {getattr(settings, candidates)}")
    if settings.pictures or settings.report:
        require_writable(settings.output_folder)


def validate_model(settings: Settings, captioner: Captioner | Ensemble) -> None:
    """Raise InputError if the model needs other inputs than those given, or cannot show the edges for --graph_word."""
    checkpoint = " ".join(settings.checkpoint)
    if captioner.uses_objects and not (settings.objects or settings.detect):
        raise InputError(
            f"{checkpoint} requires objects: pass those that a detector found in the photos as --objects FILE, or find "
            f"them with --detect NAME"
        )
    for name in ("objects", "detect"):
        if getattr(settings, name) and not captioner.uses_objects:
            raise InputError(f"--{name} {getattr(settings, name)}: the model does not look at objects, leave it out")
    if captioner.uses_region_features and not settings.region_features:
        raise InputError(
            f"{checkpoint} has no encoder, it was trained on the region features of a detector: give those of the "
            f"photos as --region_features"
        )
    if settings.region_features and not captioner.uses_region_features:
        raise InputError(f"--region_features {settings.region_features[0]}: the model has an encoder, leave it out")
    if settings.graph_word and not (captioner.graph.layers and captioner.decoder.has_attention):
        raise InputError(
            f"--graph_word {settings.graph_word}: {settings.checkpoint[0]} has no graph to plot, train with "
            f"--graph_layers"
        )
    if settings.graph_word and settings.graph_word not in captioner.vocabulary.word2idx:
        raise InputError(f"--graph_word {settings.graph_word}: {settings.checkpoint[0]} does not know this word")


def find_objects(
    settings: Settings, captioner: Captioner | Ensemble, photos: Sequence[str], device: torch.device
) -> list[list[dict[str, Any]]]:
    """Read or detect the objects of each photo, for a model that looks at objects."""
    from evaluation import photo_regions

    with contextlib.redirect_stdout(sys.stderr):  # stdout is for JSON alone
        if settings.objects:
            return photo_regions.read_objects(photos, settings.objects, captioner.image_size, captioner.resize)
        detector = photo_regions.Detector(settings.detect, settings.detector_weights, device)
        return photo_regions.detect_objects_in(photos, detector, captioner.image_size, captioner.resize)


def format_caption(photo: str, caption: ImageCaption, settings: Settings) -> str:
    """Return the captions of a photo with their log-probabilities, as text or as a line of JSON."""
    file = display_name(photo)
    n_best = [(" ".join(each.words), each.log_prob) for each in caption.n_best[: settings.n_best]]
    if not settings.json:
        best, *others = [f"{words} (log-probability {log_prob:.2f})" for words, log_prob in n_best]
        return "\n  ".join([f"{file}: {best}", *others])
    rows = [{"caption": words, "log_prob": round(log_prob, 4)} for words, log_prob in n_best]
    return json.dumps({"file": file} | rows[0] | ({"n_best": rows} if settings.n_best > 1 else {}))


class Gallery:
    """Save the pictures of each captioned photo and, at the end, the report.

    Args:
        photos: all photos in order; those that are added may be fewer.

    Raises InputError if a file that is not one of ours would be replaced.
    """

    def __init__(self, settings: Settings, captioner: Captioner | Ensemble, photos: Sequence[str]) -> None:
        self.settings, self.captioner, self.photos = settings, captioner, photos
        self.notes = sys.stderr if settings.json else sys.stdout
        self.missing_glyphs: set[str] = set()
        kinds = ["attention", "edges"] if settings.graph_word else ["attention"]
        self.paths = picture_paths(photos, settings.output_folder, kinds if settings.pictures else [])
        self.report_path = Path(settings.output_folder) / "report.html"
        if settings.report:
            from visualization.report import Report, require_report

            require_report(self.report_path)
            checkpoint = " ".join(settings.checkpoint)
            self.report = Report("Captions", settings.checkpoint[:1], details={"checkpoint": checkpoint})
            if settings.alpha_layer or settings.alpha_head:
                layer = f"layer {settings.alpha_layer}" if settings.alpha_layer else "last layer"
                head = f"head {settings.alpha_head}" if settings.alpha_head else "mean"
                self.report.attention = f"{layer}, {head}"

    def add(self, index: int, picture: Image.Image, caption: ImageCaption, objects: list[dict[str, Any]]) -> None:
        """Save the pictures of a photo, and keep its card for the report.

        picture: the photo, as `visualization.photos.open_for_picture` returns it.
        """
        if self.settings.report:
            from visualization.report import describe_caption, describe_photo

            described = describe_caption(self.captioner, caption, objects)
            self.report.cards.append(describe_photo(display_name(self.photos[index]), picture, [described]))
        if self.settings.pictures:
            self._save_pictures(index, picture, caption, objects)

    def _save_pictures(
        self, index: int, picture: Image.Image, caption: ImageCaption, objects: list[dict[str, Any]]
    ) -> None:
        from visualization.pictures import plot_pictures, save_picture

        word = self.settings.graph_word
        figures = plot_pictures(picture, caption, self.captioner, word, objects)
        for kind, figure in figures.items():
            path = self.paths[index][kind]
            self.missing_glyphs |= save_picture(figure, path)
            tqdm.write(f"  {path}", file=self.notes)
            if self.settings.show:
                Image.open(path).show()
        if word and "edges" not in figures:
            tqdm.write(f"  {word} is not in this caption", file=self.notes)

    def finish(self) -> None:
        """Write the report, and name characters that the pictures could not show."""
        if self.settings.report and self.report.cards:
            self.report.write(self.report_path)
            print(f"{self.report_path} shows all captions: open it in a browser", file=self.notes)
        if self.missing_glyphs:
            print(
                f"pictures show boxes for {len(self.missing_glyphs)} characters that matplotlib's font lacks, such as "
                f"{min(self.missing_glyphs)}: install a font that has them and add it to font.family in matplotlibrc",
                file=sys.stderr,
            )


def main(settings: Settings) -> None:
    """Print the caption of each photo with its log-probability and save its pictures.

    Photos that cannot be read are skipped, listed at the end, and make the exit status 1; a single one is an error.
    """
    validate_settings(settings)
    runtime = choose_runtime(settings.device, settings.precision)
    photos = collect_photos(settings.photos)
    captioner, caption = load_captioning(settings, runtime)
    captioner.decoder.choose_alpha(settings.alpha_layer, settings.alpha_head)
    validate_model(settings, captioner)
    objects, regions = [[] for _ in photos], None
    if captioner.uses_objects:
        objects = find_objects(settings, captioner, photos, runtime.device)
    if captioner.uses_region_features:
        from evaluation.photo_regions import PhotoRegions

        regions = PhotoRegions(photos, settings.region_features, captioner)
    gallery = Gallery(settings, captioner, photos)
    is_drawn = settings.pictures or settings.report
    broken: list[str] = []
    progress = tqdm(total=len(photos), unit="photo", disable=len(photos) == 1)
    size = captioner.image_size, captioner.resize
    for indices, images, pictures in load_photos(photos, settings.batch_size, *size, broken, with_pictures=is_drawn):
        inputs, boxes = images, pad_boxes([objects[i] for i in indices])
        if regions:
            inputs, boxes = regions.read(indices)
        captions = caption(inputs, boxes=boxes, with_attention=is_drawn, with_heads=settings.report)
        for i, found in zip(indices, captions, strict=True):
            tqdm.write(format_caption(photos[i], found, settings))
            if is_drawn:
                gallery.add(i, pictures.pop(i), found, objects[i])
            progress.update(i + 1 - progress.n)  # including skipped photos
    progress.close()
    if broken and len(photos) == 1:
        raise InputError(broken[0])
    gallery.finish()
    if broken:
        print("\n  ".join([f"{len(broken)} of {len(photos)} photos were skipped:", *broken]), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_script(main, Settings)
