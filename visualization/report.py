"""The report: a page to look through captions, with the attention at each word, that needs no server and no network.

The page is report.html with report.css, report.js and its data written into it. Shapes: T words of a caption, R regions
of which the first may be the cells of a square grid, L layers, n heads.
"""

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from common.files import atomic_write
from decoding.captions import ImageCaption
from evaluation.ensemble import Ensemble
from models import Captioner
from modules.graph import edge_attribution
from modules.relations import RELATIONS, spatial_relations
from utils import InputError
from visualization.photos import FULL_BRIGHTNESS, MAX_FRAMES, MAX_NAMED_EDGES, Regions, name_regions

GENERATOR = "image captioning report"  # by which a report is told from the user's files
THUMBNAIL_SIDE, JPEG_QUALITY = 256, 80  # of the photos in the page


@dataclass
class Report:
    """What a page shows: cards of `describe_photo`, each with what `describe_caption` says of every model.

    Args:
        title: of the page.
        models: the models' names, one or two; the captions of two are compared.
        metrics: what the cards have scores of: column names and their titles.
        details: what the captions are of and how they were made, name and value.
        table: scores of the whole split, as `scores.metrics.table_cells` returns them.
        attention: which attention weights of a transformer decoder are shown at first.
        serve: whether photos can be dropped on the page, which `tools.serve` captions.
    """

    title: str
    models: Sequence[str]
    metrics: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, str] = field(default_factory=dict)
    table: Sequence[Sequence[str]] = ()
    cards: list[dict[str, Any]] = field(default_factory=list)
    attention: str = "last layer, mean of its heads"
    serve: bool = False

    def write(self, path: str | Path) -> None:
        """Write the page; one of ours is replaced. Raises InputError where another file is in the way."""
        require_report(path)
        with atomic_write(path) as temporary:
            Path(temporary).write_text(self.page(), encoding="utf-8")

    def page(self) -> str:
        """The page as HTML."""
        data = {
            "title": self.title,
            "models": list(self.models),
            "metrics": list(self.metrics.items()),
            "details": list(self.details.items()),
            "table": self.table,
            "relations": RELATIONS,
            "full_brightness": FULL_BRIGHTNESS,
            "max_frames": MAX_FRAMES,
            "attention": self.attention,
            "serve": self.serve,
            "cards": self.cards,
        }
        return fill_page(data)


def fill_page(data: dict[str, Any]) -> str:
    """The page with its style, its script and data. Its policy lets no other script run and nothing be loaded.

    A page that is served may send photos to its server.
    """
    folder = Path(__file__).parent
    page, style, script = (
        (folder / f"report.{suffix}").read_text(encoding="utf-8") for suffix in ("html", "css", "js")
    )
    content = json.dumps(data, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")  # ends no <script>
    hashes = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (style, script)]
    parts = {"GENERATOR": GENERATOR, "STYLE_HASH": hashes[0], "SCRIPT_HASH": hashes[1]}
    parts["CONNECT"] = "'self'" if data["serve"] else "'none'"
    for name, part in (parts | {"STYLE": style, "SCRIPT": script, "DATA": content}).items():
        page = page.replace(f"{{{{{name}}}}}", part, 1)
    return page


def require_report(path: str | Path) -> None:
    """Raise InputError where a file is there that `Report.write` did not write."""
    if Path(path).exists():
        with open(path, "rb") as file:
            if f'content="{GENERATOR}"'.encode() not in file.read(1000):
                raise InputError(f"{path} is not a report of ours and is not replaced: move it, or give another path")


# -------------------------------------------------------------------------------------------------------- cards


def describe_photo(
    name: str, photo: Image.Image, captions: Sequence[dict[str, Any]], references: Sequence[Sequence[str]] = ()
) -> dict[str, Any]:
    """A card: the photo as the model saw it, captions of `describe_caption`, one a model, and reference captions."""
    photo = photo.copy()
    photo.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    jpeg = io.BytesIO()
    photo.save(jpeg, "JPEG", quality=JPEG_QUALITY)
    return {
        "name": name,
        "photo": base64.b64encode(jpeg.getvalue()).decode(),
        "width": photo.width,
        "height": photo.height,
        "references": [" ".join(words) for words in references],
        "captions": list(captions),
    }


def describe_caption(
    captioner: Captioner | Ensemble,
    caption: ImageCaption,
    objects: Sequence[dict[str, Any]],
    scores: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """What a card says of a captioner's caption for a photo with these objects, and with scores of this image."""
    described: dict[str, Any] = {
        "words": caption.words,
        "log_prob": round(caption.log_prob, 3),
        "n_best": [[" ".join(each.words), round(each.log_prob, 3)] for each in caption.n_best],
        "scores": {name: round(float(score), 4) for name, score in (scores or {}).items()},
    }
    if not captioner.decoder.has_attention:
        return described
    regions, count = name_regions(captioner, caption, objects), len(caption.words)
    described["alpha"] = encode_weights(caption.alpha[:count])
    described["cells"] = regions.num_cells
    described["boxes"] = [[round(float(edge), 4) for edge in box] for box in regions.boxes[regions.num_cells :]]
    described["names"] = list(regions.names[regions.num_cells :])
    if caption.gates is not None:
        described["gates"] = [round(gate, 3) for gate in caption.gates[:count]]
    if caption.heads is not None:
        described["heads"] = encode_weights(caption.heads[:, :, :count])
        described["layers"] = [*caption.heads.shape[:2]]
    if caption.neighbors is not None:
        described["centers"] = [[round(float(x), 3) for x in (box[:2] + box[2:]) / 2] for box in regions.boxes]
        described["edges"] = describe_edges(caption, regions, captioner.graph.edges == "spatial")
    return described


def describe_text(words: Sequence[str], scores: Mapping[str, float]) -> dict[str, Any]:
    """As `describe_caption`, of a caption of which nothing else is known."""
    return {"words": list(words), "scores": {name: round(float(score), 4) for name, score in scores.items()}}


def describe_edges(caption: ImageCaption, regions: Regions, has_relations: bool) -> list[list[list[float]]]:
    """For each word the edges of the graph that mattered most: source, target, share, index of the relation or 0.

    Where relations are named they are those of `Regions.named_edges`.
    """
    assert caption.neighbors is not None
    relations = spatial_relations(caption.boxes.unsqueeze(0))[0] if has_relations else None
    described = []
    for alpha in caption.alpha[: len(caption.words)]:
        edges = edge_attribution(alpha, caption.neighbors, caption.edge_weights)
        largest = regions.named_edges(edges) if has_relations else list(edges.items())[:MAX_NAMED_EDGES]
        described.append(
            [[*edge, round(share, 4), 0 if relations is None else int(relations[edge])] for edge, share in largest]
        )
    return described


def encode_weights(alpha: Tensor) -> str:
    """Attention weights (..., R) as a byte each, 255 times their square root, in base64.

    The square root keeps small weights apart: where 49 regions share the attention, a weight is off by 3 % at most.
    """
    return base64.b64encode(
        np.round(255 * alpha.float().clamp(0, 1).sqrt().numpy()).astype(np.uint8).tobytes()
    ).decode()
