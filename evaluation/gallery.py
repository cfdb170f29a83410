"""What caption.py saves of photos: pictures of each, and a report of all."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from evaluation.ensemble import Ensemble
from evaluation.photos import display_name
from evaluation.pictures import (
    name_regions,
    open_for_picture,
    picture_paths,
    plot_attention,
    plot_edges,
    save_picture,
)
from evaluation.report import Report, describe_caption, describe_photo, require_report
from models import Captioner
from modules.generation import ImageCaption
from modules.graph import edge_attribution
from modules.relations import spatial_relations


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
        if not settings.pictures:
            return
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
        if self.settings.report:
            self.report.write(self.report_path)
            print(f"{self.report_path} shows all: open it in a browser", file=self.notes)
        if self.missing_glyphs:
            print(
                f"pictures show boxes for {len(self.missing_glyphs)} characters that matplotlib's font lacks, such as "
                f"{min(self.missing_glyphs)}: install a font that has them and add it to font.family in matplotlibrc",
                file=sys.stderr,
            )


def plot_pictures(
    photo: Image.Image,
    caption: ImageCaption,
    captioner: Captioner | Ensemble,
    graph_word: str,
    objects: Sequence[dict[str, Any]],
) -> dict[str, Figure]:
    """The pictures of a photo with its objects by their kind: attention and, where it has the graph word, edges.

    The photo is as `open_for_picture` returns it.
    """
    words = caption.words if captioner.decoder.has_attention else []
    regions = name_regions(captioner, caption, objects)
    of_grid = regions.num_cells == len(regions.boxes)
    alpha = caption.alpha.numpy()
    figures = {"attention": plot_attention(photo, words, alpha, caption.gates, None if of_grid else regions)}
    if graph_word in caption.words and caption.neighbors is not None:
        alpha = caption.alpha[caption.words.index(graph_word)]
        edges = edge_attribution(alpha, caption.neighbors, caption.edge_weights)
        relations = None
        if captioner.graph.edges == "spatial":
            relations = spatial_relations(caption.boxes.unsqueeze(0))[0].numpy()
        figures["edges"] = plot_edges(photo, graph_word, alpha.numpy(), edges, regions, relations)
    return figures
