"""Consensus re-ranking: of the captions that a search found, those that resemble the captions of similar photos win.

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
TENSORS = {  # of the file, with dtype and number of dimensions
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

    encoder: Fingerprint  # fingerprint of the encoder
    center: Tensor  # (F,) mean of the photos' features
    features: Tensor  # (N, F) unit vectors, float16
    captions: PackedCaptions  # of the N photos
    data_digest: str  # of the prepared folder that they are of, `preparation.storage.read_metadata`

    @classmethod
    def build(cls, encoder: Encoder, means: Tensor, captions: PackedCaptions, data_digest: str) -> "CaptionIndex":
        """The index of N photos with these captions, whose regions have the mean features (N, F)."""
        center = means.float().mean(dim=0)
        features = unit_vectors(means, center).half()
        return cls(encoder.fingerprint(), center, features, captions, data_digest)

    def save(self, path: str | Path) -> None:
        """Write the index to a file; an existing one is replaced."""
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
        """Read what `save` wrote. Raises InputError for another file."""
        content = safe_load(path)
        if not _is_index(content) or content["index_format"] != INDEX_FORMAT:
            raise InputError(f"{path} is not an index of captions: make one with tools/index_captions.py")
        try:
            _check_content(content, path)
        except ValueError:
            raise InputError(f"{path} is damaged: make it again with tools/index_captions.py") from None
        captions = PackedCaptions(content["words"], *(content[name].numpy() for name in CAPTION_ARRAYS))
        encoder = tuple(content["encoder"])
        return cls(encoder, content["center"], content["features"], captions, content["data_digest"])

    def find_encoder(self, captioner: Captioner | Ensemble) -> int:
        """Which of a captioner's `sources` has the index's encoder. Raises InputError where none has it."""
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
        """Raise InputError where the index was made from another prepared folder than the one with this digest.

        The training split of another folder, such as one with a new split of the same photos, may have photos that are
        scored here, and their own captions would then vote. Pixels do not show it, they depend on size and resizing,
        so every other folder is refused. A copy of the folder has the same digest.
        """
        if self.data_digest != digest:
            raise InputError(
                f"the index was made from other data than {data_folder} and may hold photos that are scored: make it "
                f"again from this folder with tools/index_captions.py"
            )


def is_index_file(path: str | Path) -> bool:
    """Whether a file is an index of captions, of any format, damaged or not."""
    try:
        return _is_index(safe_load(path))
    except InputError:
        return False


def _is_index(content: Any) -> bool:
    return isinstance(content, dict) and type(content.get("index_format")) is int


def _check_content(content: dict[str, Any], path: str | Path) -> None:
    """Raise ValueError where the content of an index's file is not what `CaptionIndex.save` writes."""
    if not content.keys() >= {"encoder", "data_digest", "words", *TENSORS}:
        raise ValueError("a part is missing")
    for name, (dtype, ndim) in TENSORS.items():
        tensor = content[name]
        check_dense(tensor, name, path)  # first: others may have more elements than memory
        if (tensor.dtype, tensor.ndim, tensor.requires_grad, tensor.is_neg()) != (dtype, ndim, False, False):
            raise ValueError(f"{name} is of another kind")
    words, encoder, center, features = (content[name] for name in ("words", "encoder", "center", "features"))
    check_words(words, path)
    if not isinstance(encoder, list) or [type(part) for part in encoder] != [str, str, int, str]:
        raise ValueError("encoder is not a fingerprint")
    if type(content["data_digest"]) is not str:
        raise ValueError("data_digest is not text")
    word_ids, caption_offsets, image_offsets = (content[name] for name in CAPTION_ARRAYS)
    for offsets, end in ((caption_offsets, len(word_ids)), (image_offsets, len(caption_offsets) - 1)):
        if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != end or not (offsets[:-1] < offsets[1:]).all():
            raise ValueError("the offsets do not fit")
    if word_ids.min() < 0 or word_ids.max() >= len(words):
        raise ValueError("a word is missing")
    if features.shape != (len(image_offsets) - 1, len(center)):
        raise ValueError("the features do not fit")
    if not (center.isfinite().all() and features.isfinite().all()):
        raise ValueError("the features are not finite")


class Consensus:
    """Re-ranks captions by their log-probabilities and by their mean CIDEr-D against those of similar photos.

    Args:
        index: photos with captions.
        captioner: whose captions are re-ranked; of an ensemble, one encoder is the index's.
        weight: of the mean CIDEr-D (0 to 10) beside the length-normalized log-probability.
        similar_photos: how many vote, k; each counts by its similarity to the power of `SIMILARITY_POWER`.
        device: where the similarities are computed.

    Raises InputError where the index was made with another encoder.
    """

    def __init__(
        self,
        index: CaptionIndex,
        captioner: Captioner | Ensemble,
        *,
        weight: float,
        similar_photos: int,
        device: torch.device,
    ) -> None:
        self.source = index.find_encoder(captioner)
        self.weight, self.similar_photos = weight, min(similar_photos, len(index.features))
        self.center, self.features = index.center.to(device), index.features.to(device).float()
        self.captions = index.captions  # packed: as lists of strings they take many times the memory
        self.word2id = {word: i for i, word in enumerate(index.captions.idx2word)}
        self.cider = CiderD(self.captions)

    def similar(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and indices (B, k) of the photos that are most similar to features (B, R, F), most similar first.

        The features' means over the regions are compared, less the mean of all photos.
        """
        with torch.autocast(self.features.device.type, enabled=False):  # bfloat16 is too coarse to rank them
            query = unit_vectors(features.float().mean(dim=1), self.center)  # (B, F)
            cosines, indices = (query @ self.features.T).topk(self.similar_photos)
        return cosines.clamp_min(0), indices

    def rerank(self, candidates: list[list[Candidate]], features: Nested) -> list[list[Candidate]]:
        """The candidates of B images, each image's best first: features (B, R, F), or a tuple of each encoder's."""
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
        """The id of a word in the index; one that the index lacks gets a new id."""
        return self.word2id.setdefault(word, len(self.word2id))


def make_consensus(
    index: CaptionIndex, captioner: Captioner | Ensemble, settings: EnsembleSettings, runtime: Runtime
) -> Consensus:
    """The consensus of a script's settings for a captioner or an ensemble."""
    return Consensus(
        index,
        captioner,
        weight=settings.consensus_weight,
        similar_photos=settings.similar_photos,
        device=runtime.device,
    )


def load_captioning(
    settings: EnsembleSettings, runtime: Runtime
) -> tuple[Captioner | Ensemble, Callable[..., list[ImageCaption]]]:
    """Load the captioner of the settings; return it with a function that captions a batch as the settings say.

    The function is `caption_batch` with its first arguments filled in. Seeds the samples.

    Raises InputError if a file cannot be read, or does not fit the others.
    """
    captioner = combine(load_models(settings.checkpoint, runtime.device), settings.views)
    Constraints.of(settings, captioner.vocabulary)  # fail before doing any work
    torch.manual_seed(settings.seed)
    rerank = None
    if settings.consensus_index:
        rerank = make_consensus(CaptionIndex.load(settings.consensus_index), captioner, settings, runtime).rerank
    return captioner, functools.partial(caption_batch, captioner, decoding=settings, runtime=runtime, rerank=rerank)


def unit_vectors(means: Tensor, center: Tensor) -> Tensor:
    """Mean features (N, F), less a center (F,), scaled to length 1."""
    return functional.normalize(means.float() - center, dim=1)
