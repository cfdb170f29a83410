"""The report of a split: its photos with the captions of one model, or of two to compare."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from decoding.captions import CaptioningModel, ImageCaption
from preparation.storage import open_images, read_captions
from scores.caption_scores import ScoredCaptions
from scores.metrics import TITLES
from visualization.report import Report, describe_caption, describe_photo, describe_text

PER_IMAGE = ("cider", "bleu_4", "rouge_l")  # scores of a card


@dataclass
class SplitCaptions:
    """Scored captions of a split and, if a model wrote them, what they were decoded from."""

    name: str
    scored: ScoredCaptions
    captioner: CaptioningModel | None = None
    images: list[ImageCaption] = field(default_factory=list)

    def describe(self, index: int, objects: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the entry in a card for the caption of an image with these objects."""
        scores = {name: self.scored.per_image[index][name] for name in PER_IMAGE}
        if self.captioner is None:
            return describe_text(self.scored.words[index], scores)
        return describe_caption(self.captioner, self.images[index], objects, scores)


def report_split(
    described: dict[str, Any], decoding: str, table: list[list[str]], captions: Sequence[SplitCaptions], count: int
) -> Report:
    """Return the report of the first `count` photos of a split; 0: of all.

    Args:
        described: what the file of scores says about data and decoding; the report shows none of its paths.
        decoding: how captions were decoded; "" if that is not known.
        table: scores of all rows.
        captions: captions of one model, or of two to compare.
    """
    folder = Path(described["data_folder"])
    entries, packed, objects = read_captions(folder, described["split"])
    references, count = packed.decode(), min(count or len(entries), len(entries))
    models = [each.name for each in captions]
    details = {"captions": ", ".join(models), "photos": f"{count} of {len(entries)}"}
    shown = ("dataset", "split", "tokenizer", "dtype", "date")
    details |= {name: str(described[name]) for name in shown if name in described}
    if decoding:
        details["decoding"] = decoding
    title = f"Captions of {folder.name}, {described['split']} split"
    report = Report(title, models, {name: TITLES[name] for name in PER_IMAGE}, details, table)
    with open_images(folder / f"{described['split']}_images.hdf5") as images:
        for i in tqdm(range(count), desc="report", unit="photo", leave=False):
            photo = Image.fromarray(images[i].transpose(1, 2, 0))
            of_models = [each.describe(i, objects[i]) for each in captions]
            report.cards.append(describe_photo(entries[i]["image"], photo, of_models, references[i]))
    return report
