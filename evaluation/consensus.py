"""Consensus re-ranking: prefer those captions of a search that resemble the captions of similar photos.

Sources: "Deep Captioning with Multimodal Recurrent Neural Networks" (Mao et al., 2015, section 8) and "Exploring
Nearest Neighbor Approaches for Image Captioning" (Devlin et al., 2015). Shapes: B images, R regions, F features of the
encoder, N indexed photos, k similar photos.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from common.checkpoints import check_dense, check_words
from common.files import safe_load, save_torch
from decoding.captions import Candidate, ImageCaption, caption_batch
from decoding.constraints import Constraints
from evaluation.ensemble import Ensemble, EnsembleSettings, combine, load_models
from models import Captioner
from modules.decoders import Nested
from modules.encoders import Encoder
from preparation.storage import PackedCaptions
from text.cider import CiderD
from utils import InputError, Runtime

INDEX_FORMAT = 1
SIMILARITY_POWER = 4  # in the weights of similar photos' captions; 2 scored lower on Flickr8k's validation photos
CAPTION_ARRAYS = ("word_ids", "caption_offsets", "image_offsets")
TENSORS = {  # dtype and number of dimensions of the tensors in an index's file
    "center": (torch.float32, 1),
    "features": (torch.float16, 2),
    "word_ids": (torch.int32, 1),
    "caption_offsets": (torch.int64, 1),
    "image_offsets": (torch.int64, 1),
}
Fingerprint = tuple[str, str, int, str]  # `modules.encoders.Encoder.fingerprint`


@dataclass(frozen=True)
class CaptionIndex:
    """Photos with captions, found by the features of one encoder."""

    encoder: Fingerprint
    center: Tensor  # (F,) mean of the photos' features
    features: Tensor  # (N, F) unit vectors, float16
    captions: PackedCaptions  # of the N photos
    data_digest: str  # digest of the prepared folder that they are from, see `preparation.storage.read_metadata`

    @classmethod
    def build(cls, encoder: Encoder, means: Tensor, captions: PackedCaptions, data_digest: str) -> "CaptionIndex":
        """Index N photos with these captions by their features' means over the regions (N, F)."""
        center = means.float().mean(dim=0)
        features = unit_vectors(means, center).half()
        return cls(encoder.fingerprint(), center, features, captions, data_digest)

    def save(self, path: str | Path) -> None:
        """Write the index to a file and replace an existing one."""
        arrays = {name: torch.from_numpy(getattr(self.captions, name)) for name in CAPTION_ARRAYS}
        content = {
            "index_format": INDEX_FORMAT,
            "encoder": list(self.encoder),
            "data_digest": self.data_digest,
            "words": self.captions.idx2word,
            "center": self.center,
            "features": self.features,
        }
        save_torch(path, content | arrays)

    @classmethod
    def load(cls, path: str | Path) -> "CaptionIndex":
        """Read what `save` wrote. Raises InputError for any other file."""
        content = safe_load(path)
        if not _is_index(content) or content["index_format"] != INDEX_FORMAT:
            raise InputError(f"{path} is not an index of captions: make one with tools/index_captions.py")
        try:
            for name, (dtype, ndim) in TENSORS.items():
                x = content[name]
                check_dense(x, name, path)  # first: other tensors may have more elements than memory
                if (x.dtype, x.ndim, x.requires_grad, x.is_neg()) != (dtype, ndim, False, False):
                    raise ValueError(f"{name} is of another kind")
            check_words(content["words"], path)
            captions = PackedCaptions(content["words"], *(content[name].numpy() for name in CAPTION_ARRAYS))
            encoder, digest = tuple(content["encoder"]), content["data_digest"]
            index = cls(encoder, content["center"], content["features"], captions, digest)
            index._check()
        except (KeyError, TypeError, ValueError, RuntimeError):
            raise InputError(f"{path} is damaged: make it again with tools/index_captions.py") from None
        return index

    def _check(self) -> None:
        """Raise ValueError if parts of an index do not fit together, or features are not finite."""
        captions = self.captions
        if [type(part) for part in (*self.encoder, self.data_digest)] != [str, str, int, str, str]:
            raise ValueError("no fingerprint or no digest")
        num_words, num_captions = len(captions.word_ids), len(captions.caption_offsets) - 1
        for offsets, end in ((captions.caption_offsets, num_words), (captions.image_offsets, num_captions)):
            if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != end or not (offsets[:-1] < offsets[1:]).all():
                raise ValueError("the offsets do not fit")
        if captions.word_ids.min() < 0 or captions.word_ids.max() >= len(captions.idx2word):
            raise ValueError("a word is missing")
        if self.features.shape != (len(captions), len(self.center)):
            raise ValueError("the features do not fit")
        if not (self.center.isfinite().all() and self.features.isfinite().all()):
            raise ValueError("the features are not finite")

    def find_encoder(self, captioner: Captioner | Ensemble) -> int:
        """Return the position of the index's encoder among a captioner's `sources`; InputError if it is not there."""
        if captioner.uses_region_features:
            raise InputError(
                "consensus finds similar photos by the features of an encoder, which a model of region features does "
                "not have: leave --consensus_index out"
            )
        fingerprints = captioner.fingerprints
        if self.encoder not in fingerprints:
            raise InputError(
                f"the index was made with another encoder, {self.encoder[0]} with other weights, layer or grid: make "
                f"one of this model's with tools/index_captions.py"
            )
        source = fingerprints.index(self.encoder)
        feature_dim = captioner.sources[source].encoder.feature_dim
        if len(self.center) != feature_dim:
            raise InputError(
                f"the index is damaged, its photos have {len(self.center)} features and not the encoder's "
                f"{feature_dim}: make it again with tools/index_captions.py"
            )
        return source

    def require_data(self, digest: str, data_folder: str | Path) -> None:
        """Raise InputError if the index was made from another prepared folder than the one with this digest.

        The training split of another folder may hold photos that are scored here, for example after a new split of the
        same photos. Their own captions would then vote. Pixels cannot tell, since they depend on size and resizing, so
        every other folder is refused. A copy of the folder has the same digest.
        """
        if self.data_digest != digest:
            raise InputError(
                f"the index was made from other data than {data_folder} and may hold photos that are scored: make it "
                f"again from this folder with tools/index_captions.py"
            )


def is_index_file(path: str | Path) -> bool:
    """Return True if a file is an index of captions, of any format, damaged or not."""
    try:
        return _is_index(safe_load(path))
    except InputError:
        return False


def _is_index(content: Any) -> bool:
    return isinstance(content, dict) and type(content.get("index_format")) is int


class Consensus:
    """Re-ranks captions by their log-probabilities and their mean CIDEr-D against the captions of similar photos.

    Args:
        index: photos with captions.
        captioner: captioner whose captions are re-ranked; one encoder of an ensemble must be the index's.
        settings: `consensus_weight`, the weight of the mean CIDEr-D (0 to 10) relative to the length-normalized
            log-probability, and `similar_photos`, the number k of photos that vote. Each photo counts by its similarity
            to the power of SIMILARITY_POWER.
        device: device that computes the similarities.

    Raises InputError if the index was made with another encoder.
    """

    def __init__(
        self, index: CaptionIndex, captioner: Captioner | Ensemble, settings: EnsembleSettings, device: torch.device
    ) -> None:
        self.source = index.find_encoder(captioner)
        self.weight = settings.consensus_weight
        self.similar_photos = min(settings.similar_photos, len(index.features))
        self.center, self.features = index.center.to(device), index.features.to(device).float()
        self.captions = index.captions  # packed: lists of strings take many times the memory
        self.word2id = {word: i for i, word in enumerate(index.captions.idx2word)}
        self.cider = CiderD(self.captions)

    def similar(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Find the k photos that are most similar to images with features (B, R, F).

        Compares the features' means over the regions, less the mean of all photos. Returns cosines and indices (B, k),
        most similar first.
        """
        with torch.autocast(self.features.device.type, enabled=False):  # bfloat16 is too coarse to rank them
            query = unit_vectors(features.float().mean(dim=1), self.center)  # (B, F)
            cosines, indices = (query @ self.features.T).topk(self.similar_photos)
        return cosines.clamp_min(0), indices

    def rerank(self, candidates: list[list[Candidate]], features: Nested) -> list[list[Candidate]]:
        """Return the candidates of B images, best first.

        features: (B, R, F), or a tuple with those of each of an ensemble's encoders.
        """
        cosines, indices = self.similar(features if isinstance(features, Tensor) else features[self.source])
        images = zip(candidates, cosines.pow(SIMILARITY_POWER).tolist(), indices.tolist(), strict=True)
        return [self._rerank_image(*image) for image in images]

    def _rerank_image(self, candidates: list[Candidate], weights: list[float], indices: list[int]) -> list[Candidate]:
        references = [(caption, w) for i, w in zip(indices, weights, strict=True) for caption in self.captions[i]]
        shares = np.array([w for _, w in references]) / max(sum(w for _, w in references), 1e-12)
        encoded = [[self._word_id(word) for word in words] for words, *_ in candidates]
        ciders = self.cider.pairwise(encoded, [words for words, _ in references]) @ shares
        scores = [each.score + self.weight * cider for each, cider in zip(candidates, ciders, strict=True)]
        order = sorted(range(len(candidates)), key=lambda i: -scores[i])
        return [candidates[i] for i in order]

    def _word_id(self, word: str) -> int:
        """Return the id of a word; a word that the index lacks gets a new id."""
        return self.word2id.setdefault(word, len(self.word2id))


def load_captioning(
    settings: EnsembleSettings, runtime: Runtime
) -> tuple[Captioner | Ensemble, Callable[..., list[ImageCaption]]]:
    """Load the captioner of the settings; return it with a function that captions a batch as the settings say.

    The function is `caption_batch` with captioner, decoding, runtime and rerank filled in. Seeds torch's generators.
    Raises InputError if a file cannot be read, or does not fit the others.
    """
    captioner = combine(load_models(settings.checkpoint, runtime.device), settings.views)
    Constraints.of(settings, captioner.vocabulary)  # fail before doing any work
    torch.manual_seed(settings.seed)
    rerank = None
    if settings.consensus_index:
        index = CaptionIndex.load(settings.consensus_index)
        rerank = Consensus(index, captioner, settings, runtime.device).rerank
    return captioner, functools.partial(caption_batch, captioner, decoding=settings, runtime=runtime, rerank=rerank)


def unit_vectors(means: Tensor, center: Tensor) -> Tensor:
    """Subtract a center (F,) from mean features (N, F) and scale them to length 1."""
    return functional.normalize(means.float() - center, dim=1)
