"""The report of a split: its photos with the captions of a model, or of two that are compared."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from decoding.captions import ImageCaption
from decoding.settings import DecodingSettings
from evaluation.ensemble import Ensemble
from models import Captioner
from preparation.storage import open_images, read_captions
from scores.caption_scores import ScoredCaptions
from scores.metrics import TITLES
from visualization.report import Report, describe_caption, describe_photo, describe_text

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
            return describe_text(self.scored.words[index], scores)
        return describe_caption(self.captioner, self.images[index], objects, scores)


def report_split(described: dict[str, Any], captions: Sequence[SplitCaptions], count: int) -> Report:
    """The report of the first `count` photos of a split, or of all where it is 0.

    `described` is what the file of scores says of data and decoding, with the "table" of all rows. Of its paths the
    report shows none but the models' names.
    """
    folder = Path(described["data_folder"])
    entries, packed, objects = read_captions(folder, described["split"])
    references, count = packed.decode(), min(count or len(entries), len(entries))
    details = {"captions": ", ".join(each.name for each in captions), "photos": f"{count} of {len(entries)}"}
    shown = ("dataset", "split", "tokenizer", "dtype", "date")
    details |= {name: str(described[name]) for name in shown if name in described}
    if "decoding" in described:
        details["decoding"] = describe_decoding(described["decoding"])
    metrics = {name: TITLES[name] for name in PER_IMAGE}
    title = f"Captions of {folder.name}, {described['split']} split"
    report = Report(title, [each.name for each in captions], metrics, details, described["table"])
    with open_images(folder / f"{described['split']}_images.hdf5") as images:
        for i in tqdm(range(count), desc="report", unit="photo", leave=False):
            photo = Image.fromarray(images[i].transpose(1, 2, 0))
            of_models = [each.describe(i, objects[i]) for each in captions]
            report.cards.append(describe_photo(entries[i]["image"], photo, of_models, references[i]))
    return report


def describe_decoding(decoding: dict[str, Any]) -> str:
    """How captions were decoded: beam size or samples, and what is not at its default."""
    first = "samples" if decoding["samples"] else "beam_size"
    usual = asdict(DecodingSettings()) | {"views": ("original",), "consensus_index": ""}
    with_index = ("consensus_weight", "similar_photos")
    parts = {first: decoding[first], "length_penalty": decoding["length_penalty"]}
    for name, value in decoding.items():
        if (name in with_index and decoding["consensus_index"]) or value != usual.get(name, value):
            parts[name] = " ".join(value) if isinstance(value, tuple) else value
    if first == "samples":
        parts.pop("beam_size", None)
    return ", ".join(f"{name} {value}" for name, value in parts.items())
