"""Ensembles: several checkpoints, or several views of each photo, that choose every word together.

Shapes: B images, R regions.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from models import Captioner, Encoded, load_captioner
from modules.ensemble import EnsembleDecoder, map_words
from text.vocabulary import Vocabulary
from utils import InputError


def original(images: Tensor) -> Tensor:
    """Images (B, 3, S, S) uint8 as they are."""
    return images


def mirror(images: Tensor) -> Tensor:
    """Images (B, 3, S, S) uint8, flipped horizontally."""
    return images.flip(-1)


def center_crop(images: Tensor) -> Tensor:
    """The middle of images (B, 3, S, S) uint8, an eighth of the side smaller, resized to S."""
    size = images.shape[-1]
    margin = size // 16
    middle = images[..., margin : size - margin, margin : size - margin].float()
    resized = functional.interpolate(middle, size=(size, size), mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


VIEWS = {"original": original, "mirror": mirror, "crop": center_crop}


class Ensemble:
    """Captioners with the same words that caption together, in place of a `models.Captioner`.

    Each sees each view of a photo. What is shown of a caption (attention, gates, edges) is the first captioner's, of
    the first view. `sources` are the captioners whose encoders differ; those with the same encoder share its features.

    Raises InputError where the captioners differ in their words, or in the images that they take.
    """

    def __init__(
        self, captioners: Sequence[Captioner], vocabularies: Sequence[Vocabulary], views: Sequence[str] = ("original",)
    ) -> None:
        first, self.views = captioners[0], list(views)
        self.image_size, self.resize, self.graph = first.image_size, first.resize, first.graph
        for captioner in captioners:
            if (captioner.image_size, captioner.resize) != (self.image_size, self.resize):
                raise InputError(
                    f"an ensemble needs models that were trained on images of one size: one has {self.image_size} "
                    f"pixels made by {self.resize}, another {captioner.image_size} by {captioner.resize}"
                )
        fingerprints = [captioner.encoder.fingerprint() for captioner in captioners]
        self.fingerprints = list(dict.fromkeys(fingerprints))  # of the sources
        self.sources = [captioners[fingerprints.index(each)] for each in self.fingerprints]
        self._members = [
            (captioner, self.fingerprints.index(fingerprint), view)
            for view in range(len(self.views))
            for captioner, fingerprint in zip(captioners, fingerprints, strict=True)
        ]
        device = first.encoder.mean.device
        word_maps = [
            map_words(vocabularies[0], vocabulary, flipped=view == "mirror")
            for view in self.views
            for vocabulary in vocabularies
        ]
        self.decoder = EnsembleDecoder(
            [captioner.decoder for captioner, _, _ in self._members],
            [None if word_map is None else word_map.to(device) for word_map in word_maps],
        )

    def encode(self, inputs: Tensor | Sequence[Tensor], is_features: bool | Sequence[bool] = False) -> Encoded:
        """As `Captioner.encode`, with tuples of the members' regions and of the sources' features.

        Args:
            inputs: images (B, 3, h, w) uint8 or, for each source, its images or features (B, R, F).
            is_features: of each source, where `inputs` are several. Features are of one view.
        """
        if isinstance(inputs, Tensor):
            inputs = [inputs] * len(self.sources)
        flags = [is_features] * len(inputs) if isinstance(is_features, bool) else is_features
        features = [
            [source.features(view(x), flag) for source, x, flag in zip(self.sources, inputs, flags, strict=True)]
            for view in map(VIEWS.__getitem__, self.views)
        ]
        encoded = [captioner.encode_features(features[view][source]) for captioner, source, view in self._members]
        return encoded[0]._replace(regions=tuple(each.regions for each in encoded), features=features[0])

    def eval(self) -> "Ensemble":
        """As `nn.Module.eval`; the captioners are in eval mode."""
        return self


def load_captioners(
    paths: Sequence[str | Path], views: Sequence[str], device: str | torch.device
) -> tuple[Captioner | Ensemble, Vocabulary]:
    """Read checkpoints for inference: a captioner or an ensemble, and the vocabulary of the first.

    Raises InputError as `models.load_captioner` and `Ensemble` do, and for views that do not exist.
    """
    unknown = [view for view in views if view not in VIEWS]
    if unknown or not views:
        raise InputError(f"--views {' '.join(unknown)}: choose from {' '.join(VIEWS)}")
    loaded = [load_captioner(path, device) for path in paths]
    captioners, vocabularies = zip(*loaded, strict=True)
    if len(paths) == 1 and list(views) == ["original"]:
        return captioners[0], vocabularies[0]
    return Ensemble(captioners, vocabularies, views), vocabularies[0]
