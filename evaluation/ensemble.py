"""Ensembles: several checkpoints, or several views of each photo, that choose every word together.

Shapes: B images, R regions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from decoding.ensemble import EnsembleDecoder, map_words
from decoding.settings import DecodingSettings
from models import Captioner, load_captioner
from modules.decoders import Encoded
from preparation.images import flip_boxes
from utils import PRECISIONS, InputError, setting


def unchanged(x: Tensor) -> Tensor:
    """Return images or boxes as they are."""
    return x


def hflip(images: Tensor) -> Tensor:
    """Flip images (B, 3, S, S) uint8 horizontally."""
    return images.flip(-1)


def center_crop(images: Tensor) -> Tensor:
    """Center-crop images (B, 3, S, S) uint8 to 7/8 of the side and resize them to S."""
    size = images.shape[-1]
    margin = size // 16
    middle = images[..., margin : size - margin, margin : size - margin].float()
    resized = functional.interpolate(middle, size=(size, size), mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def crop_boxes(boxes: Tensor) -> Tensor:
    """Move boxes (B, N, 4) to their place in `center_crop`, up to a pixel; boxes outside of it lose their area."""
    return ((boxes - 1 / 16) * 8 / 7).clamp(0, 1)


VIEWS = {"original": unchanged, "hflip": hflip, "crop": center_crop}  # of images
BOX_VIEWS = {"original": unchanged, "hflip": flip_boxes, "crop": crop_boxes}


@dataclass(frozen=True, kw_only=True)
class EnsembleSettings(DecodingSettings):
    """Checkpoints of an ensemble and how they caption: shared by eval.py, caption.py and tools/serve.py."""

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


def summarize_decoding(decoding: dict[str, Any]) -> str:
    """Return how captions were decoded: beam size or samples, and all settings that are not at their defaults."""
    first, other = ("samples", "beam_size") if decoding["samples"] else ("beam_size", "samples")
    defaults = asdict(EnsembleSettings())
    of_index = ("consensus_weight", "similar_photos")  # shown at their defaults, too, if there is an index
    parts = {first: decoding[first], "length_penalty": decoding["length_penalty"]}
    for name, value in decoding.items():
        is_changed = name not in of_index and value != defaults[name]
        if name != other and (is_changed or (name in of_index and decoding["consensus_index"])):
            parts[name] = " ".join(value) if isinstance(value, tuple) else value
    return ", ".join(f"{name} {value}" for name, value in parts.items())


class Member(NamedTuple):
    """A captioner that sees one view of each photo."""

    captioner: Captioner
    source: int  # index of the captioner in `Ensemble.sources` whose encoder gives the features
    view: str  # key of VIEWS


class Ensemble:
    """Captioners with the same words that caption together, in place of a `models.Captioner`.

    Each captioner sees each view of a photo. Attention, gates and edges of a caption are those of the first captioner.

    Args:
        models: captioners in eval mode, by the names that errors give them.
        views: keys of VIEWS, among them "original", which is put first.

    Attributes:
        sources: captioners with different encoders; a captioner with the same encoder as one of them shares its
            features.
        fingerprints: fingerprints of the encoders of `sources`.

    Raises InputError if the captioners differ in their words or in the images that they take.
    """

    def __init__(self, models: Mapping[str, Captioner], views: Sequence[str] = ("original",)) -> None:
        self.views = ["original", *(view for view in views if view != "original")]
        first = next(iter(models.values()))
        self.vocabulary = first.vocabulary
        self.image_size, self.resize = first.image_size, first.resize
        self.region_source, self.graph = first.region_source, first.graph
        sources: dict[tuple, Captioner] = {}
        source_of = {}
        for name, captioner in models.items():
            fingerprint = captioner.encoder.fingerprint()
            sources.setdefault(fingerprint, captioner)
            source_of[name] = list(sources).index(fingerprint)
        self.fingerprints, self.sources = list(sources), list(sources.values())
        require_same_inputs(models, self.views, len(self.sources))
        word_maps = self._map_words(models)
        self._members = [
            Member(captioner, source_of[name], view) for view in self.views for name, captioner in models.items()
        ]
        self.decoder = EnsembleDecoder([member.captioner.decoder for member in self._members], word_maps)

    def _map_words(self, models: Mapping[str, Captioner]) -> list[Tensor | None]:
        """Return the word map of each member, as `EnsembleDecoder` takes them."""
        first_name, first = next(iter(models.items()))
        device = next(first.parameters()).device
        word_maps = []
        for view in self.views:
            for name, captioner in models.items():
                try:
                    word_map = map_words(self.vocabulary, captioner.vocabulary, flipped=view == "hflip")
                except InputError as error:
                    raise InputError(f"{first_name} and {name}: {error}") from None
                word_maps.append(None if word_map is None else word_map.to(device))
        return word_maps

    @property
    def uses_objects(self) -> bool:
        """True if a captioner needs the boxes of the objects in the images."""
        return any(member.captioner.uses_objects for member in self._members)

    @property
    def needs_boxes(self) -> bool:
        """True if a captioner needs the boxes of its regions."""
        return any(member.captioner.needs_boxes for member in self._members)

    @property
    def uses_region_features(self) -> bool:
        """True if the captioners take region features in place of images."""
        return self.region_source.uses_region_features

    def encode(self, inputs: Tensor | Sequence[Tensor], boxes: Tensor | None = None) -> Encoded:
        """Encode images as `Captioner.encode` does; regions, masks and features are tuples.

        Args:
            inputs: images (B, 3, h, w) uint8 for all sources or, for each source, its images or features (B, R, F).
                Features are those of the original view alone.
            boxes: boxes of objects in the images (B, N, 4), or of region features (B, R, 4).

        Returns regions and masks of each member, features (original view) of each source; the rest of the first member.
        """
        if isinstance(inputs, Tensor):
            inputs = [inputs] * len(self.sources)
        assert self.views == ["original"] or all(x.ndim == 4 for x in inputs), "other views need images"
        features = {
            view: tuple(source.features(VIEWS[view](x)) for source, x in zip(self.sources, inputs, strict=True))
            for view in self.views
        }
        encoded = []
        for captioner, source, view in self._members:
            of_view = None if boxes is None else BOX_VIEWS[view](boxes)
            encoded.append(captioner.encode(features[view][source], of_view))
        return encoded[0]._replace(
            regions=tuple(each.regions for each in encoded),
            mask=tuple(each.mask for each in encoded),
            features=features["original"],
        )


def require_same_inputs(models: Mapping[str, Captioner], views: Sequence[str], num_encoders: int) -> None:
    """Raise InputError if captioners, which have so many different encoders, do not take the same inputs."""
    first_name, first = next(iter(models.items()))
    for name, captioner in models.items():
        if (captioner.image_size, captioner.resize) != (first.image_size, first.resize):
            raise InputError(
                f"an ensemble needs models for images of one size: {first_name} takes {first.image_size} pixels "
                f"made by {first.resize}, {name} takes {captioner.image_size} by {captioner.resize}"
            )
    use_features = [captioner.uses_region_features for captioner in models.values()]
    if not any(use_features):
        return
    if list(views) != ["original"]:
        raise InputError(f"--views {' '.join(views)}: models of region features support only the original view")
    if not all(use_features):
        raise InputError(f"an ensemble needs models that all look at region features, or none: {' '.join(models)}")
    if num_encoders > 1:
        raise InputError(f"an ensemble needs models of the same region features: {' '.join(models)}")


def load_models(paths: Sequence[str | Path], device: str | torch.device) -> dict[str, Captioner]:
    """Load the captioners of checkpoints, in eval mode, by their paths.

    Raises InputError as `models.load_captioner` does, and for a path given twice.
    """
    for i, path in enumerate(paths):
        if any(Path(path).resolve() == Path(other).resolve() for other in paths[:i]):
            raise InputError(f"--checkpoint {path} is given twice")
    return {str(path): load_captioner(path, device) for path in paths}


def combine(models: Mapping[str, Captioner], views: Sequence[str]) -> Captioner | Ensemble:
    """Return the only captioner if it sees the original view alone, otherwise an `Ensemble`."""
    is_single = len(models) == 1 and list(views) == ["original"]
    return next(iter(models.values())) if is_single else Ensemble(models, views)
