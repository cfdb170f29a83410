"""Sample captions of a split, as TensorBoard shows them."""

import html
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from datasets import CaptionDataset
from decoding.captions import ImageCaption
from evaluation.scoring import NUM_PICTURES
from models import Captioner
from preparation.storage import open_images
from visualization.pictures import plot_pictures

NUM_CAPTIONS = 8  # in the table


class Samples(NamedTuple):
    """Captions of the first photos of a split, the same ones every time."""

    pictures: list[np.ndarray]  # (h, w, 3) uint8, of NUM_PICTURES photos: the attention at each word
    table: str  # Markdown: NUM_CAPTIONS photos with their captions and references


def draw_samples(captioner: Captioner, dataset: CaptionDataset, captions: Sequence[ImageCaption]) -> Samples:
    """Draw the captions of a split, in its order, as `evaluation.scoring.evaluate` returns them."""
    pictures = []
    with open_images(dataset.images_path) as images:
        for i, caption in enumerate(captions[:NUM_PICTURES]):
            photo = Image.fromarray(images[i].transpose(1, 2, 0))
            canvas = FigureCanvasAgg(plot_pictures(photo, caption, captioner, "", dataset.objects[i])["attention"])
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Glyph")  # that the font lacks: the table has the words
                canvas.draw()
            pictures.append(np.asarray(canvas.buffer_rgba())[..., :3])
    rows = ["| photo | caption | references |", "| --- | --- | --- |"]
    idx2word = dataset.references.idx2word
    for i, caption in enumerate(captions[:NUM_CAPTIONS]):
        references = [" ".join(map(idx2word.__getitem__, word_ids)) for word_ids in dataset.references[i]]
        cells = [[dataset.entries[i]["image"]], [caption.caption], references]
        rows.append("| " + " | ".join("<br>".join(map(_escape, cell)) for cell in cells) + " |")
    return Samples(pictures, "\n".join(rows))


def _escape(text: str) -> str:
    """Text as a cell of a Markdown table shows it: `<unk>` is no tag and a bar ends no cell."""
    return html.escape(text).replace("|", "&#124;")
