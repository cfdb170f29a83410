"""Consensus re-ranking: of the captions that a search found, those that resemble the captions of similar photos win.

Sources: "Deep Captioning with Multimodal Recurrent Neural Networks" (Mao et al., 2015, section 8) and "Exploring
Nearest Neighbor Approaches for Image Captioning" (Devlin et al., 2015), with similar photos as
`evaluation.caption_index` finds them. Shapes: B images, R regions, F features of the encoder, k similar photos.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from evaluation.caption_index import CaptionIndex
from evaluation.ensemble import Ensemble
from models import Captioner
from modules.decoding import Candidate
from modules.step_decoder import Nested
from text.cider import CiderD
from utils import Runtime

SIMILARITY_POWER = 4  # in the weights of similar photos' captions; 2 scored lower on Flickr8k's validation photos


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
        self.weight, self.similar_photos = weight, min(similar_photos, len(index.embeddings))
        self.center, self.projection = index.center.to(device), index.projection.to(device)
        self.embeddings = index.embeddings.to(device).float()
        self.captions = index.captions  # packed: as lists of strings they take many times the memory
        self.word2id = {word: i for i, word in enumerate(index.captions.idx2word)}
        self.cider = CiderD(self.captions)

    def similar(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and indices (B, k) of the most similar photos, in this order: features (B, R, F).

        The cosine is that of the captions' vector predicted from the mean of the features over the regions, and the
        vector of the photo's captions.
        """
        with torch.autocast(self.projection.device.type, enabled=False):  # bfloat16 is too coarse to rank them
            predicted = (features.float().mean(dim=1) - self.center) @ self.projection  # (B, D)
            query = functional.normalize(predicted, dim=1)
            cosines, indices = (query @ self.embeddings.T).topk(self.similar_photos)
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


def make_consensus(index: CaptionIndex, captioner: Captioner | Ensemble, settings: Any, runtime: Runtime) -> Consensus:
    """The consensus of a script's settings for a captioner or an ensemble."""
    return Consensus(
        index,
        captioner,
        weight=settings.consensus_weight,
        similar_photos=settings.similar_photos,
        device=runtime.device,
    )
