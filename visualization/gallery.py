"""What caption.py saves of photos: pictures of each, and a report of all."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from common.files import display_name
from decoding.captions import ImageCaption
from evaluation.ensemble import Ensemble
from models import Captioner
from visualization.photos import open_for_picture, picture_paths
from visualization.report import Report, describe_caption, describe_photo, require_report


class Gallery:
    """Saves the pictures of photos as they are captioned, and in the end the report, as the settings ask.

    Args:
        settings: of caption.py.
        captioner: whose captions they are.
        photos: all of them, in order; those that are added may be fewer.

    Raises InputError where a file would be replaced that is not one of ours.
    """

    def __init__(self, settings: Any, captioner: Captioner | Ensemble, photos: Sequence[str]) -> None:
        self.settings, self.captioner, self.photos = settings, captioner, photos
        kinds = ["attention", "edges"] if settings.graph_word else ["attention"]
        self.paths = picture_paths(photos, settings.output_folder, kinds if settings.pictures else [])
        self.report_path = Path(settings.output_folder) / "report.html"
        self.report = Report("Captions", settings.checkpoint[:1], details={"checkpoint": " ".join(settings.checkpoint)})
        if settings.alpha_layer or settings.alpha_head:
            layer = f"layer {settings.alpha_layer}" if settings.alpha_layer else "last layer"
            self.report.attention = f"{layer}, " + (f"head {settings.alpha_head}" if settings.alpha_head else "mean")
        if settings.report:
            require_report(self.report_path)
        self.notes = sys.stderr if settings.json else sys.stdout
        self.missing_glyphs: set[str] = set()

    def add(self, index: int, caption: ImageCaption, objects: Sequence[dict[str, Any]]) -> None:
        """Save the pictures of a photo with its caption and its objects, and keep its card for the report."""
        settings, path = self.settings, self.photos[index]
        photo = open_for_picture(path, self.captioner.resize)
        if settings.report:
            described = describe_caption(self.captioner, caption, objects)
            self.report.cards.append(describe_photo(display_name(path), photo, [described]))
        if settings.pictures:
            self._save_pictures(index, photo, caption, objects)

    def _save_pictures(
        self, index: int, photo: Image.Image, caption: ImageCaption, objects: Sequence[dict[str, Any]]
    ) -> None:
        from visualization.pictures import plot_pictures, save_picture  # matplotlib takes half a second to import

        settings = self.settings
        figures = plot_pictures(photo, caption, self.captioner, settings.graph_word, objects)
        for kind, figure in figures.items():
            picture = self.paths[index][kind]
            self.missing_glyphs |= save_picture(figure, picture)
            tqdm.write(f"  {picture}", file=self.notes)
            if settings.show:
                Image.open(picture).show()
        if settings.graph_word and "edges" not in figures:
            tqdm.write(f"  {settings.graph_word} is not in this caption", file=self.notes)

    def finish(self) -> None:
        """Write the report, and say which characters the pictures could not show."""
        if self.report.cards:
            self.report.write(self.report_path)
            print(f"{self.report_path} shows all: open it in a browser", file=self.notes)
        if self.missing_glyphs:
            print(
                f"pictures show boxes for {len(self.missing_glyphs)} characters that matplotlib's font lacks, such as "
                f"{min(self.missing_glyphs)}: install a font that has them and add it to font.family in matplotlibrc",
                file=sys.stderr,
            )
