"""The report: a page to look through captions with the attention at each word. It needs no server and no network.

The page is report.html with report.css, report.js and its data written into it. Shapes: T words of a caption, R regions
(cells of a square grid come first), L layers, n heads.
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
from decoding.captions import CaptioningModel, ImageCaption
from modules.graph import edge_attribution
from modules.regions import RELATIONS, spatial_relations
from utils import InputError
from visualization.photos import FULL_BRIGHTNESS, MAX_FRAMES, MAX_NAMED_EDGES, Regions, name_regions

GENERATOR = "image captioning report"  # tells our reports from the user's files
THUMBNAIL_SIDE, JPEG_QUALITY = 256, 80  # of the photos in the page


@dataclass
class Report:
    """Content of a page.

    Attributes:
        title: title of the page.
        models: names of one model, or of two to compare.
        metrics: column names and titles of the scores that cards have.
        details: names and values that tell what the captions are of and how they were decoded.
        table: scores of the whole split, as `scores.metrics.table_cells` returns them.
        cards: results of `describe_photo`, each with a caption of every model.
        attention: attention weights of a transformer decoder that the page shows first.
        serve: True if photos can be dropped on the page; `tools.serve` captions them.
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
        """Write the page. Raises InputError if the path has anything but a report of this program."""
        require_report(path)
        with atomic_write(path) as temporary:
            Path(temporary).write_text(self.page(), encoding="utf-8")

    def page(self) -> str:
        """Return the page as HTML.

        Its policy allows only its own style and script and loads nothing. A served page may send photos to its server.
        """
        data = vars(self) | {
            "metrics": list(self.metrics.items()),
            "details": list(self.details.items()),
            "relations": RELATIONS,
            "full_brightness": FULL_BRIGHTNESS,
            "max_frames": MAX_FRAMES,
        }
        folder = Path(__file__).parent
        page, style, script = (
            (folder / f"report.{suffix}").read_text(encoding="utf-8") for suffix in ("html", "css", "js")
        )
        parts = {
            "GENERATOR": GENERATOR,
            "STYLE_HASH": sha256(style),
            "SCRIPT_HASH": sha256(script),
            "CONNECT": "'self'" if self.serve else "'none'",
            "STYLE": style,
            "SCRIPT": script,
            "DATA": json.dumps(data, separators=(",", ":")).replace(
                "<", "\\u003c"
            ),  # so that no text ends the <script>
        }
        for name, part in parts.items():
            page = page.replace(f"{{{{{name}}}}}", part, 1)
        return page


def sha256(text: str) -> str:
    """Return the SHA-256 digest of a text in base64, as a Content-Security-Policy has it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def require_report(path: str | Path) -> None:
    """Raise InputError if a file exists that `Report.write` did not write."""
    if Path(path).exists():
        with open(path, "rb") as file:
            if f'content="{GENERATOR}"'.encode() not in file.read(1000):
                raise InputError(
                    f"{path} is not a report of this program and is not replaced: move it, or choose another path"
                )


# -------------------------------------------------------------------------------------------------------- cards


def describe_photo(
    name: str, photo: Image.Image, captions: Sequence[dict[str, Any]], references: Sequence[Sequence[str]] = ()
) -> dict[str, Any]:
    """Return a card: the photo as the model saw it, a caption of `describe_caption` for each model, and references."""
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


def describe_text(words: Sequence[str], scores: Mapping[str, float]) -> dict[str, Any]:
    """Return the card entry of a caption without attention."""
    return {"words": list(words), "scores": {name: round(float(score), 4) for name, score in scores.items()}}


def describe_caption(
    captioner: CaptioningModel,
    caption: ImageCaption,
    objects: Sequence[dict[str, Any]],
    scores: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return the entry in a card of a decoded caption, with the objects of its photo and the scores of this caption."""
    described = describe_text(caption.words, scores or {}) | {
        "log_prob": round(caption.log_prob, 3),
        "n_best": [[" ".join(each.words), round(each.log_prob, 3)] for each in caption.n_best],
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


def describe_edges(caption: ImageCaption, regions: Regions, has_relations: bool) -> list[list[list[float]]]:
    """Return the edges of the graph that mattered most for each word: [source, target, share, index of the relation].

    Edges with relations are those of `Regions.named_edges`; without, the index is 0.
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
    """Encode attention weights (..., R) in base64, a byte each: 255 times the square root.

    The square root keeps small weights apart: with 49 regions, weights above the uniform one are off by 3 % at most.
    """
    roots = np.round(255 * alpha.float().clamp(0, 1).sqrt().numpy()).astype(np.uint8)
    return base64.b64encode(roots.tobytes()).decode()
