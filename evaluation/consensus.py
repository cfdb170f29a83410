"""Consensus re-ranking: of the captions that a search found, those that resemble the captions of similar photos win.

Sources: "Deep Captioning with Multimodal Recurrent Neural Networks" (Mao et al., 2015, section 8) and "Exploring
Nearest Neighbor Approaches for Image Captioning" (Devlin et al., 2015). Shapes: B images, R regions, F features of the
encoder, N indexed photos, k neighbors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from common.files import safe_load, save_torch
from modules.encoders import Encoder
from modules.step_decoder import Nested
from preparation.storage import PackedCaptions
from text.cider import CiderD
from utils import InputError, Runtime

INDEX_FORMAT = 1
CAPTION_ARRAYS = ("word_ids", "caption_offsets", "image_offsets")
Fingerprint = tuple[str, str, int, str]  # `modules.encoders.Encoder.fingerprint`
Candidates = list[tuple[list[str], float]]  # captions as words with their log-probabilities, best first


@dataclass(frozen=True)
class CaptionIndex:
    """Photos with captions, found by the features of one encoder."""

    encoder: Fingerprint  # fingerprint of the encoder
    center: Tensor  # (F,) mean of the photos' features
    features: Tensor  # (N, F) unit vectors, float16
    captions: PackedCaptions  # of the N photos

    @classmethod
    def build(cls, encoder: Encoder, means: Tensor, captions: PackedCaptions) -> "CaptionIndex":
        """The index of N photos with these captions, whose regions have the mean features (N, F)."""
        center = means.float().mean(dim=0)
        return cls(encoder.fingerprint(), center, unit_vectors(means, center).half(), captions)

    def save(self, path: str | Path) -> None:
        """Write the index to a file; an existing one is replaced."""
        arrays = {name: torch.from_numpy(getattr(self.captions, name)) for name in CAPTION_ARRAYS}
        content = {"index_format": INDEX_FORMAT, "encoder": list(self.encoder), "words": self.captions.idx2word}
        save_torch(path, content | arrays | {"center": self.center, "features": self.features})

    @classmethod
    def load(cls, path: str | Path) -> "CaptionIndex":
        """Read what `save` wrote. Raises InputError for another file."""
        content = safe_load(path)
        if not isinstance(content, dict) or content.get("index_format") != INDEX_FORMAT:
            raise InputError(f"{path} is not an index of captions: make one with tools/index_captions.py")
        try:
            return cls._from_content(content)
        except (KeyError, ValueError, TypeError, AttributeError):
            raise InputError(f"{path} is damaged: make it again with tools/index_captions.py") from None

    def require_encoder(self, fingerprints: Sequence[Fingerprint]) -> None:
        """Raise InputError where the index was made with another encoder than these."""
        if self.encoder not in fingerprints:
            raise InputError(
                f"the index was made with another encoder, {self.encoder[0]} with other weights, layer or grid: make "
                f"one of this model's with tools/index_captions.py"
            )

    @classmethod
    def _from_content(cls, content: dict[str, Any]) -> "CaptionIndex":
        """The index of a file's content; any of four errors where it does not fit together."""
        words, center, features = content["words"], content["center"], content["features"]
        word_ids, caption_offsets, image_offsets = (content[name].numpy() for name in CAPTION_ARRAYS)
        fits = features.shape == (len(image_offsets) - 1, *center.shape) and features.isfinite().all()
        fits = fits and word_ids.ndim == 1 and word_ids.min() >= 0 and word_ids.max() < len(words)
        for offsets, end in ((caption_offsets, len(word_ids)), (image_offsets, len(caption_offsets) - 1)):
            fits = fits and offsets[0] == 0 and offsets[-1] == end and (np.diff(offsets) > 0).all()
        if not fits:
            raise ValueError
        captions = PackedCaptions(words, word_ids, caption_offsets, image_offsets)
        return cls(tuple(content["encoder"]), center, features, captions)


class Consensus:
    """Re-ranks captions by their log-probabilities and by their mean CIDEr-D against those of similar photos.

    Args:
        index: photos with captions.
        fingerprints: of the captioner's encoder, or of an ensemble's encoders, `Ensemble.fingerprints`.
        weight: of the mean CIDEr-D (0 to 10) beside the length-normalized log-probability.
        neighbors: similar photos, k; each counts by its squared similarity.
        device: where the similarities are computed.

    Raises InputError where the index was made with another encoder.
    """

    def __init__(
        self,
        index: CaptionIndex,
        fingerprints: Sequence[Fingerprint],
        *,
        weight: float,
        neighbors: int,
        device: torch.device,
    ) -> None:
        index.require_encoder(fingerprints)
        self.source = list(fingerprints).index(index.encoder)
        self.weight, self.neighbors = weight, min(neighbors, len(index.features))
        self.center, self.features = index.center.to(device), index.features.to(device)
        self.captions = index.captions.decode()
        self.cider = CiderD(self.captions)

    def similar(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and indices (B, k) of the photos that are most similar to features (B, R, F), most similar first.

        The features' means over the regions are compared, less the mean of all photos.
        """
        query = unit_vectors(features.float().mean(dim=1), self.center)  # (B, F)
        cosines, indices = (query @ self.features.to(query.dtype).T).topk(self.neighbors)
        return cosines.clamp_min(0), indices

    def rerank(self, candidates: list[Candidates], features: Nested, length_penalty: float) -> list[Candidates]:
        """The candidates of B images, each image's best first: features (B, R, F), or a tuple of each encoder's."""
        cosines, indices = self.similar(features if isinstance(features, Tensor) else features[self.source])
        images = zip(candidates, cosines.square().tolist(), indices.tolist(), strict=True)
        return [self._rerank_image(*image, length_penalty) for image in images]

    def _rerank_image(
        self, candidates: Candidates, weights: list[float], indices: list[int], length_penalty: float
    ) -> Candidates:
        references = [(caption, w) for i, w in zip(indices, weights, strict=True) for caption in self.captions[i]]
        shares = np.array([w for _, w in references]) / max(sum(w for _, w in references), 1e-12)
        ciders = self.cider.pairwise([words for words, _ in candidates], [words for words, _ in references]) @ shares
        scores = [
            log_prob / (len(words) + 1) ** length_penalty + self.weight * cider
            for (words, log_prob), cider in zip(candidates, ciders, strict=True)
        ]
        order = sorted(range(len(candidates)), key=lambda i: -scores[i])
        return [candidates[i] for i in order]


def make_consensus(
    index: CaptionIndex, fingerprints: Sequence[Fingerprint], settings: Any, runtime: Runtime
) -> Consensus:
    """The consensus of a script's settings for the encoder of a captioner, or those of an ensemble."""
    return Consensus(
        index,
        fingerprints,
        weight=settings.consensus_weight,
        neighbors=settings.neighbors,
        device=runtime.device,
    )


def unit_vectors(means: Tensor, center: Tensor) -> Tensor:
    """Mean features (N, F), less a center (F,), scaled to length 1."""
    return functional.normalize(means.float() - center, dim=1)
