"""CIDEr-D of captions: the reward of self-critical training, and the consensus with similar photos.

The scores that eval.py reports come from pycocoevalcap. Shapes: M and K captions, T words of the longest, G n-grams.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

MAX_N = 4  # longest n-grams
SIGMA = 6.0  # of the Gaussian length penalty, in words
MULTIPLIER = 0x9E3779B97F4A7C15  # odd and large: n-grams as 64-bit hashes


class _Vectors(NamedTuple):
    """Vectors of G n-grams for M captions, as their N nonzero elements."""

    owners: np.ndarray  # (N,) the caption of each element
    columns: np.ndarray  # (N,) its n-gram
    weights: np.ndarray  # (N,) its TF-IDF weight
    sizes: np.ndarray  # (G,) n of each n-gram
    norms: np.ndarray  # (M, MAX_N)

    def dense(self, columns: np.ndarray) -> np.ndarray:
        """The weights of some n-grams in all captions, columns (g,) -> (M, g)."""
        places = np.full(len(self.sizes), -1)
        places[columns] = np.arange(len(columns))
        wanted = places[self.columns] >= 0
        weights = np.zeros((len(self.norms), len(columns)))
        weights[self.owners[wanted], places[self.columns[wanted]]] = self.weights[wanted]
        return weights


class CiderD:
    """CIDEr-D with the document frequencies of a corpus.

    Source: "CIDEr" (Vedantam et al., 2015), equations 1 to 5; weights, lengths and clipping as in its section 5. The
    n-grams are hashed, so that numpy counts them: 20 million n-grams (COCO) collide with probability 1e-5.

    Args:
        captions: for each image its captions, each a sequence of words or of word ids.
    """

    def __init__(self, captions: Iterable[Sequence[Sequence]]) -> None:
        self.ids: dict[Any, int] = {}  # of words, from 1 on
        documents, words = [], []
        for i, image_captions in enumerate(captions):
            documents += [i] * len(image_captions)
            words += image_captions
        owners, hashes, _ = self._ngrams(words)
        _, first = np.unique(hashes * np.uint64(MULTIPLIER) + np.array(documents, np.uint64)[owners], return_index=True)
        self.hashes, self.frequencies = np.unique(hashes[first], return_counts=True)  # (G,): images that have each
        self.log_images = np.log(documents[-1] + 1)

    def __call__(self, references: Sequence[Sequence], candidates: Sequence[Sequence]) -> list[float]:
        """Scores between 0 and 10 of candidates for one image, given its references."""
        return self.pairwise(candidates, references).mean(axis=1).tolist()

    def pairwise(self, candidates: Sequence[Sequence], references: Sequence[Sequence]) -> np.ndarray:
        """The score of each of K candidates for each of M references alone: (K, M)."""
        K, captions = len(candidates), [*candidates, *references]
        vectors = self._tfidf(captions)
        columns = np.unique(vectors.columns[vectors.owners < K])  # other n-grams add nothing to a product
        weights, sizes = vectors.dense(columns), vectors.sizes[columns]
        scores = np.zeros((K, len(references)))
        for n in range(1, MAX_N + 1):
            found = weights[:, sizes == n]
            clipped = np.stack([(np.minimum(candidate, found[K:]) * found[K:]).sum(axis=1) for candidate in found[:K]])
            norms = vectors.norms[:, n - 1]
            scores += clipped / np.maximum(norms[:K, None] * norms[K:], np.finfo(float).tiny)
        lengths = np.array([len(words) for words in captions], dtype=float)
        penalty = np.exp(-((lengths[:K, None] - lengths[K:]) ** 2) / (2 * SIGMA**2))
        return 10 * penalty * scores / MAX_N

    def _tfidf(self, captions: Sequence[Sequence]) -> "_Vectors":
        """The TF-IDF weights of the n-grams of captions."""
        owners, hashes, sizes = self._ngrams(captions)
        distinct, first, columns = np.unique(hashes, return_index=True, return_inverse=True)
        G, sizes = len(distinct), sizes[first]
        elements, counts = np.unique(owners * G + columns, return_counts=True)
        owners, columns = np.divmod(elements, G)
        weights = counts * self._idf(distinct)[columns]
        squares = np.bincount(owners * MAX_N + sizes[columns] - 1, weights**2, minlength=len(captions) * MAX_N)
        return _Vectors(owners, columns, weights, sizes, np.sqrt(squares).reshape(-1, MAX_N))

    def _idf(self, hashes: np.ndarray) -> np.ndarray:
        """log(images / images that have the n-gram), (G,); an n-gram of none counts as one of a single image."""
        places = np.searchsorted(self.hashes, hashes).clip(max=len(self.hashes) - 1)
        frequencies = np.where(self.hashes[places] == hashes, self.frequencies[places], 1)
        return self.log_images - np.log(frequencies)

    def _ngrams(self, captions: Sequence[Sequence]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All n-grams of M captions: the index of the caption, the hash and n of each, (n-grams,)."""
        lengths = np.array([len(words) for words in captions])
        padded = np.zeros((len(captions), lengths.max(initial=0) + MAX_N), dtype=np.uint64)  # 0 after a caption's end
        ids = [self.ids.setdefault(word, len(self.ids) + 1) for words in captions for word in words]
        padded[np.arange(padded.shape[1]) < lengths[:, None]] = ids
        parts, hashes = [], np.zeros_like(padded)
        for n in range(1, MAX_N + 1):
            hashes = hashes[:, : padded.shape[1] - n + 1] * np.uint64(MULTIPLIER) + padded[:, n - 1 :]
            owners, starts = (padded[:, n - 1 :] > 0).nonzero()
            parts.append((owners, hashes[owners, starts], np.full(len(owners), n)))
        owners, hashes, sizes = (np.concatenate(part) for part in zip(*parts, strict=True))
        return owners, hashes, sizes
