"""Sample captions of a split for TensorBoard."""

import html
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from datasets import CaptionDataset
from decoding.captions import CaptioningModel, ImageCaption
from preparation.storage import open_images

NUM_PICTURES = 2  # first images of a split whose captions are drawn
NUM_CAPTIONS = 8  # captions in the table


class Samples(NamedTuple):
    """Captions of the first photos of a split, the same ones every time."""

    pictures: list[np.ndarray]  # (h, w, 3) uint8, of NUM_PICTURES photos: the attention at each word
    table: str  # Markdown: NUM_CAPTIONS photos with their captions and references


def draw_samples(captioner: CaptioningModel, dataset: CaptionDataset, captions: Sequence[ImageCaption]) -> Samples:
    """Draw captions of a split, which are in its order and have the attention weights of the first NUM_PICTURES."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes half a second

    from visualization.pictures import plot_pictures

    pictures = []
    with open_images(dataset.images_path) as images:
        for i, caption in enumerate(captions[:NUM_PICTURES]):
            photo = Image.fromarray(images[i].transpose(1, 2, 0))
            canvas = FigureCanvasAgg(plot_pictures(photo, caption, captioner, "", dataset.objects[i])["attention"])
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Glyph")  # missing glyphs; the table still shows the words
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
    """Escape text for a cell of a Markdown table: `<unk>` is not a tag and a bar does not end the cell."""
    return html.escape(text).replace("|", "&#124;")
