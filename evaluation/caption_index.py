"""An index of photos with captions: which of them are likely to be described like a new photo.

What a photo's captions say, as a vector (`text.lsa`), is predicted from its features by ridge regression; photos whose
own captions are close to the prediction are found. Shapes: B images, R regions, F features of the encoder, N indexed
photos, D dimensions of the captions' vectors, k photos found.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from common.checkpoints import check_dense, check_words
from common.files import safe_load, save_torch
from evaluation.ensemble import Ensemble
from evaluation.ridge import fit_ridge
from models import Captioner
from modules.encoders import Encoder
from preparation.storage import PackedCaptions
from text.lsa import embed_captions
from utils import InputError

INDEX_FORMAT = 2
CAPTION_ARRAYS = ("word_ids", "caption_offsets", "image_offsets")
TENSORS = {  # of the file, with dtype and number of dimensions
    "center": (torch.float32, 1),
    "projection": (torch.float32, 2),
    "embeddings": (torch.float16, 2),
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
    projection: Tensor  # (F, D), from features less center to what the captions say
    embeddings: Tensor  # (N, D) unit vectors of the photos' captions, float16
    captions: PackedCaptions  # of the N photos
    data_digest: str  # of the prepared folder that they are of, `preparation.storage.read_metadata`

    @classmethod
    def build(cls, encoder: Encoder, means: Tensor, captions: PackedCaptions, data_digest: str) -> "CaptionIndex":
        """The index of N photos with these captions, whose regions have the mean features (N, F)."""
        embeddings = embed_captions(captions).to(means.device)
        ridge = fit_ridge(means, embeddings)
        unit = functional.normalize(embeddings, dim=1).half()
        return cls(encoder.fingerprint(), ridge.center, ridge.weights, unit, captions, data_digest)

    def save(self, path: str | Path) -> None:
        """Write the index to a file; an existing one is replaced."""
        arrays = {name: torch.from_numpy(getattr(self.captions, name)) for name in CAPTION_ARRAYS}
        content = {
            "index_format": INDEX_FORMAT,
            "encoder": list(self.encoder),
            "data_digest": self.data_digest,
            "words": self.captions.idx2word,
            "center": self.center,
            "projection": self.projection,
            "embeddings": self.embeddings,
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
        return cls(
            encoder, content["center"], content["projection"], content["embeddings"], captions, content["data_digest"]
        )

    def find_encoder(self, captioner: Captioner | Ensemble) -> int:
        """Which of a captioner's `sources` has the index's encoder. Raises InputError where none has it."""
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
    words, encoder = content["words"], content["encoder"]
    center, projection, embeddings = (content[name] for name in ("center", "projection", "embeddings"))
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
    if projection.shape != (len(center), embeddings.shape[1]) or len(embeddings) != len(image_offsets) - 1:
        raise ValueError("the photos do not fit")
    if not all(tensor.isfinite().all() for tensor in (center, projection, embeddings)):
        raise ValueError("the photos are not finite")
