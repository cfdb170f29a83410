"""Ensembles: several checkpoints, or several views of each photo, that choose every word together.

Shapes: B images, R regions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from decoding.captions import Encoded
from decoding.ensemble import EnsembleDecoder, map_words
from decoding.settings import DecodingSettings
from models import Captioner, load_captioner
from preparation.images import flip_boxes
from utils import PRECISIONS, InputError, setting


def unchanged(x: Tensor) -> Tensor:
    """Images, or boxes, as they are."""
    return x


def hflip(images: Tensor) -> Tensor:
    """Images (B, 3, S, S) uint8, flipped horizontally."""
    return images.flip(-1)


def center_crop(images: Tensor) -> Tensor:
    """The middle of images (B, 3, S, S) uint8, an eighth of the side smaller, resized to S."""
    size = images.shape[-1]
    margin = size // 16
    middle = images[..., margin : size - margin, margin : size - margin].float()
    resized = functional.interpolate(middle, size=(size, size), mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def crop_boxes(boxes: Tensor) -> Tensor:
    """Where boxes (B, N, 4) are in `center_crop`, up to a pixel; those outside lose their area."""
    return ((boxes - 1 / 16) * 8 / 7).clamp(0, 1)


VIEWS = {"original": unchanged, "hflip": hflip, "crop": center_crop}  # of images
BOX_VIEWS = {"original": unchanged, "hflip": flip_boxes, "crop": crop_boxes}


@dataclass(frozen=True, kw_only=True)
class EnsembleSettings(DecodingSettings):
    """Which checkpoints caption together, and how: shared by eval.py, caption.py and tools/serve.py."""

    # group: paths
    checkpoint: tuple[str, ...] = ("runs/shapes/best.pt",)  # checkpoints of train.py; several form an ensemble

    # group: ensemble and consensus
    views: tuple[str, ...] = setting(("original",), choices=VIEWS)  # views of a photo that caption together
    consensus_index: str = ""  # file of tools/index_captions.py: prefer captions like those of similar photos
    consensus_weight: float = setting(10.0, minimum=0, needs="consensus_index")  # weight of similar photos' CIDEr-D
    similar_photos: int = setting(50, minimum=1, needs="consensus_index")  # photos whose captions count for consensus

    # group: run
    precision: str = setting("auto", choices=PRECISIONS)  # auto: bf16 mixed precision where it is faster
    device: str = "auto"  # auto, cpu or cuda

    def __post_init__(self) -> None:
        super().__post_init__()
        if "original" not in self.views:
            raise InputError(f"--views {' '.join(self.views)}: add original, whose attention is shown")


class Ensemble:
    """Captioners with the same words that caption together, in place of a `models.Captioner`.

    Each sees each view of a photo. What is shown of a caption (attention, gates, edges) is the first captioner's.
    `sources` are the captioners whose encoders differ, `fingerprints` those of their encoders; captioners with the same
    encoder share its features.

    Args:
        models: captioners in eval mode, by the names that errors give them.
        views: keys of `VIEWS`, among them "original", which is put first.

    Raises InputError where the captioners differ in their words, or in the images that they take.
    """

    def __init__(self, models: Mapping[str, Captioner], views: Sequence[str] = ("original",)) -> None:
        self.views = ["original", *(view for view in views if view != "original")]
        first_name, first = next(iter(models.items()))
        self.vocabulary = first.vocabulary
        self.image_size, self.resize = first.image_size, first.resize
        self.region_source, self.graph = first.region_source, first.graph
        for name, captioner in models.items():
            if (captioner.image_size, captioner.resize) != (self.image_size, self.resize):
                raise InputError(
                    f"an ensemble needs models for images of one size: {first_name} takes {self.image_size} pixels "
                    f"made by {self.resize}, {name} takes {captioner.image_size} by {captioner.resize}"
                )
        if any(captioner.uses_region_features for captioner in models.values()):
            if self.views != ["original"]:
                raise InputError(f"--views {' '.join(self.views)}: a model of region features knows the original only")
            if not all(captioner.uses_region_features for captioner in models.values()):
                raise InputError(
                    f"an ensemble needs models that all look at region features, or none: {' '.join(models)}"
                )
        fingerprints = {name: captioner.encoder.fingerprint() for name, captioner in models.items()}
        if self.uses_region_features and len(set(fingerprints.values())) > 1:
            raise InputError(f"an ensemble needs models of the same region features: {' '.join(models)}")
        self.fingerprints = list(dict.fromkeys(fingerprints.values()))  # of the sources
        by_fingerprint = {fingerprints[name]: models[name] for name in reversed(list(models))}
        self.sources = [by_fingerprint[fingerprint] for fingerprint in self.fingerprints]
        self._members: list[tuple[Captioner, int, int]] = []  # captioner, index of its source, index of the view
        word_maps = []
        for i, view in enumerate(self.views):
            for name, captioner in models.items():
                self._members.append((captioner, self.fingerprints.index(fingerprints[name]), i))
                try:
                    word_map = map_words(self.vocabulary, captioner.vocabulary, flipped=view == "hflip")
                except InputError as error:
                    raise InputError(f"{first_name} and {name}: {error}") from None
                word_maps.append(None if word_map is None else word_map.to(next(first.parameters()).device))
        self.decoder = EnsembleDecoder([captioner.decoder for captioner, _, _ in self._members], word_maps)

    @property
    def uses_objects(self) -> bool:
        """Whether a captioner needs the boxes of the objects in the images."""
        return any(captioner.uses_objects for captioner, _, _ in self._members)

    @property
    def needs_boxes(self) -> bool:
        """Whether a captioner cannot do without the boxes of its regions."""
        return any(captioner.needs_boxes for captioner, _, _ in self._members)

    @property
    def uses_region_features(self) -> bool:
        """Whether the captioners need region features in place of images."""
        return self.region_source.uses_region_features

    def encode(
        self,
        inputs: Tensor | Sequence[Tensor],
        boxes: Tensor | None = None,
    ) -> Encoded:
        """As `Captioner.encode`, with tuples of the members' regions and masks and of the sources' features.

        Args:
            inputs: images (B, 3, h, w) uint8 or, for each source, its images or features (B, R, F). Features are those
                of the view "original" alone.
            boxes: of objects in the images (B, N, 4), or of region features (B, R, 4).
        """
        if isinstance(inputs, Tensor):
            inputs = [inputs] * len(self.sources)
        assert self.views == ["original"] or all(x.ndim == 4 for x in inputs), "other views need images"
        features = [
            [source.features(VIEWS[view](x)) for source, x in zip(self.sources, inputs, strict=True)]
            for view in self.views
        ]
        boxes_of_views = [None if boxes is None else BOX_VIEWS[view](boxes) for view in self.views]
        encoded = [
            captioner.encode(features[view][source], boxes_of_views[view]) for captioner, source, view in self._members
        ]
        regions, masks = (tuple(getattr(each, name) for each in encoded) for name in ("regions", "mask"))
        return encoded[0]._replace(regions=regions, mask=masks, features=features[0])

    def eval(self) -> "Ensemble":
        """As `nn.Module.eval`; the captioners are in eval mode."""
        return self


def load_models(paths: Sequence[str | Path], device: str | torch.device) -> dict[str, Captioner]:
    """Read checkpoints for inference, by their paths.

    Raises InputError as `models.load_captioner` does, and for a path given twice.
    """
    for i, path in enumerate(paths):
        if any(Path(path).resolve() == Path(other).resolve() for other in paths[:i]):
            raise InputError(f"--checkpoint {path} is given twice")
    return {str(path): load_captioner(path, device) for path in paths}


def combine(models: Mapping[str, Captioner], views: Sequence[str]) -> Captioner | Ensemble:
    """One captioner seeing photos as they are, or else an `Ensemble`."""
    is_single = len(models) == 1 and list(views) == ["original"]
    return next(iter(models.values())) if is_single else Ensemble(models, views)
