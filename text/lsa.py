"""Latent semantic analysis of captions: images as vectors of what their captions say.

Source: "Indexing by Latent Semantic Analysis" (Deerwester et al., 1990), on TF-IDF weights of words and of pairs of
words. Shapes: N images, G n-grams, D dimensions.
"""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from text.cider import encode_words, ngrams

MAX_N = 2  # longest n-grams
MIN_IMAGES = 2  # images that have an n-gram that counts: others say nothing of other images
DIM = 400
ITERATIONS = 4  # of the subspace iteration (Halko et al., 2009), for `torch.svd_lowrank`


def embed_captions(captions: Iterable[Sequence[Sequence]], dim: int = DIM) -> Tensor:
    """The vector of each image, (N, D) float32, D at most `dim`: near 0 in the mean, alike where captions are.

    A caption is the unit vector of its n-grams' TF-IDF weights, an image the normalized sum of its captions, projected
    onto the first singular vectors of all images, less the mean.

    Args:
        captions: for each image its captions, each a sequence of words or of word ids.
    """
    vectors = _tfidf(captions)  # (N, G) sparse
    rank = min(dim, *vectors.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same index each time
        V = torch.svd_lowrank(vectors, q=rank, niter=ITERATIONS)[2]  # (G, D)
    embedded = vectors @ V
    return embedded - embedded.mean(dim=0)


def _tfidf(captions: Iterable[Sequence[Sequence]]) -> Tensor:
    """Normalized TF-IDF weights of the n-grams that at least MIN_IMAGES images have: (N, G) sparse, G at least 1."""
    counts: list[int] = []  # captions of each image

    def all_captions() -> Iterable[Sequence]:
        for image_captions in captions:
            counts.append(len(image_captions))
            yield from image_captions

    parts = itertools.islice(ngrams(*encode_words(all_captions(), {})), MAX_N)
    owners, hashes = (np.concatenate(part) for part in zip(*parts, strict=True))
    columns = np.unique(hashes, return_inverse=True)[1]
    N, G = len(counts), columns.max() + 1
    elements, term_counts = np.unique(owners * G + columns, return_counts=True)
    owners, columns = np.divmod(elements, G)
    images = np.repeat(np.arange(N), counts)[owners]
    frequencies = np.bincount(np.unique(images * G + columns) % G, minlength=G)  # images that have each n-gram
    weights = term_counts * np.log(N / frequencies)[columns] * (frequencies >= MIN_IMAGES)[columns]
    weights = _normalize(weights, owners)  # each caption
    elements, inverse = np.unique(images * G + columns, return_inverse=True)
    images, columns = np.divmod(elements, G)
    weights = _normalize(np.bincount(inverse, weights), images)
    kept = weights > 0
    distinct, columns = np.unique(columns[kept], return_inverse=True)
    indices = torch.from_numpy(np.stack([images[kept], columns]))
    values = torch.from_numpy(weights[kept]).float()
    return torch.sparse_coo_tensor(
        indices, values, (N, max(1, len(distinct))), is_coalesced=True, check_invariants=False
    )


def _normalize(weights: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Weights (E,), divided by the norm of those of the same owner (E,)."""
    norms = np.sqrt(np.bincount(owners, weights**2))
    return weights / np.maximum(norms, np.finfo(float).tiny)[owners]
