"""The report of a split: its photos with the captions of a model, or of two that are compared."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from evaluation.ensemble import Ensemble
from evaluation.report import Report, describe_caption, describe_photo, describe_text
from models import Captioner
from modules.generation import ImageCaption
from preparation.storage import open_images, read_captions
from scores.caption_scores import ScoredCaptions
from scores.metrics import TITLES

DECODING_SHOWN = ("beam_size", "samples", "length_penalty", "no_repeat_ngram", "min_length", "consensus_index")
PER_IMAGE = ("cider", "bleu_4", "rouge_l")  # scores of a card


@dataclass
class SplitCaptions:
    """Scored captions of a split and, where a model wrote them, what they were decoded from."""

    name: str
    scored: ScoredCaptions
    captioner: Captioner | Ensemble | None = None
    images: list[ImageCaption] = field(default_factory=list)

    def describe(self, index: int, objects: list[dict[str, Any]]) -> dict[str, Any]:
        """What a card says of the caption of an image with these objects."""
        item = self.scored.per_image[index]
        scores = {name: item[name] for name in PER_IMAGE}
        if self.captioner is None:
            return describe_text(item["caption"], scores)
        return describe_caption(self.captioner, self.images[index], objects, scores)


def report_split(
    data_folder: str | Path,
    split: str,
    captions: Sequence[SplitCaptions],
    table: str,
    described: dict[str, Any],
    count: int,
) -> Report:
    """The report of the first `count` photos of a split, or of all where it is 0.

    `described` says how the captions were made, as in the file of scores; of paths the report shows those in names.
    """
    entries, packed, objects = read_captions(data_folder, split)
    references, count = packed.decode(), min(count or len(entries), len(entries))
    details = {"captions": ", ".join(each.name for each in captions), "photos": f"{count} of {len(entries)}"}
    details |= {
        name: described[name] for name in ("dataset", "split", "tokenizer", "dtype", "date") if name in described
    }
    if "decoding" in described:
        values = {name: described["decoding"][name] for name in DECODING_SHOWN}
        details["decoding"] = ", ".join(f"{name} {value}" for name, value in values.items() if value)
    metrics = {name: TITLES[name] for name in PER_IMAGE}
    title = f"Captions of {Path(data_folder).resolve().name}, {split} split"
    report = Report(title, [each.name for each in captions], metrics, details, table)
    with open_images(Path(data_folder) / f"{split}_images.hdf5") as images:
        for i in tqdm(range(count), desc="report", unit="photo", leave=False):
            photo = Image.fromarray(images[i].transpose(1, 2, 0))
            described_captions = [each.describe(i, objects[i]) for each in captions]
            report.cards.append(describe_photo(entries[i]["image"], photo, described_captions, references[i]))
    return report
