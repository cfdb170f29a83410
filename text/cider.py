"""CIDEr-D of captions: the reward of self-critical training, and the consensus with similar photos.

The scores that eval.py reports come from pycocoevalcap. Shapes: M and K captions, L words in all of them, G n-grams.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

MAX_N = 4  # longest n-grams
SIGMA = 6.0  # of the Gaussian length penalty, in words
MULTIPLIER = 0x9E3779B97F4A7C15  # odd and large: n-grams as 64-bit hashes


class _Vectors(NamedTuple):
    """Vectors of G n-grams for M captions, stored as their N nonzero elements."""

    owners: np.ndarray  # (N,) the caption of each element
    columns: np.ndarray  # (N,) its n-gram
    weights: np.ndarray  # (N,) its TF-IDF weight
    sizes: np.ndarray  # (G,) n of each n-gram
    norms: np.ndarray  # (M, MAX_N)

    def dense(self, columns: np.ndarray) -> np.ndarray:
        """Return the weights of some n-grams in all captions: columns (g,) -> (M, g)."""
        positions = np.full(len(self.sizes), -1)  # of each n-gram among the columns
        positions[columns] = np.arange(len(columns))
        wanted = positions[self.columns] >= 0
        weights = np.zeros((len(self.norms), len(columns)))
        weights[self.owners[wanted], positions[self.columns[wanted]]] = self.weights[wanted]
        return weights


class CiderD:
    """CIDEr-D with the document frequencies of a corpus.

    Source: "CIDEr" (Vedantam et al., 2015), equations 1 to 5; weights, lengths and clipping follow its section 5. NumPy
    counts the hashes of n-grams: among the 20 million of COCO two collide with probability 1e-5.

    Args:
        captions: for each image its captions, each a sequence of words or of word ids.

    Raises ValueError if no caption has a word.
    """

    def __init__(self, captions: Iterable[Sequence[Sequence]]) -> None:
        self.ids: dict[Any, int] = {}  # of words
        caption_counts = array("q")  # of each image

        def all_captions() -> Iterator[Sequence]:
            for image_captions in captions:
                caption_counts.append(len(image_captions))
                yield from image_captions

        ids, lengths = self._encode(all_captions())
        if not len(ids):
            raise ValueError("no caption has a word")
        images = np.repeat(np.arange(len(caption_counts), dtype=np.uint64), caption_counts)  # of each caption
        found = []  # each n-gram once for each image
        for owners, hashes in _ngrams(ids, lengths):
            _, first = np.unique(hashes * np.uint64(MULTIPLIER) + images[owners], return_index=True)
            found.append(hashes[first])
        # Both (G,): the n-grams, and how many images have each.
        self.hashes, self.frequencies = np.unique(np.concatenate(found), return_counts=True)
        self.log_images = np.log(len(caption_counts))

    def __call__(self, references: Sequence[Sequence], candidates: Sequence[Sequence]) -> list[float]:
        """Score candidates for one image against its references, between 0 and 10."""
        return self.pairwise(candidates, references).mean(axis=1).tolist()

    def pairwise(self, candidates: Sequence[Sequence], references: Sequence[Sequence]) -> np.ndarray:
        """Score each of K candidates against each of M references alone: (K, M)."""
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
        """Compute the TF-IDF weights of the n-grams of captions."""
        parts = list(_ngrams(*self._encode(captions)))
        owners, hashes = (np.concatenate(part) for part in zip(*parts, strict=True))
        sizes = np.repeat(np.arange(1, MAX_N + 1), [len(part) for part, _ in parts])
        distinct, first, columns = np.unique(hashes, return_index=True, return_inverse=True)
        G, sizes = len(distinct), sizes[first]
        elements, counts = np.unique(owners * G + columns, return_counts=True)
        owners, columns = np.divmod(elements, G)
        weights = counts * self._idf(distinct)[columns]
        squares = np.bincount(owners * MAX_N + sizes[columns] - 1, weights**2, minlength=len(captions) * MAX_N)
        return _Vectors(owners, columns, weights, sizes, np.sqrt(squares).reshape(-1, MAX_N))

    def _idf(self, hashes: np.ndarray) -> np.ndarray:
        """Compute log(images / images with the n-gram), (G,); an unknown n-gram counts as if one image had it."""
        positions = np.searchsorted(self.hashes, hashes).clip(max=len(self.hashes) - 1)
        frequencies = np.where(self.hashes[positions] == hashes, self.frequencies[positions], 1)
        return self.log_images - np.log(frequencies)

    def _encode(self, captions: Iterable[Sequence]) -> tuple[np.ndarray, np.ndarray]:
        """Return the words of M captions as ids from 1 on, concatenated (L,), and the captions' lengths (M,)."""
        ids, lengths = array("Q"), array("q")
        for words in captions:
            ids.extend([self.ids.setdefault(word, len(self.ids) + 1) for word in words])
            lengths.append(len(words))
        return np.asarray(ids), np.asarray(lengths)


def _ngrams(ids: np.ndarray, lengths: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield, for n from 1 to MAX_N, the caption and the hash of each n-gram of captions from `CiderD._encode`."""
    owners = np.repeat(np.arange(len(lengths)), lengths)  # (L,)
    remaining = np.cumsum(lengths)[owners] - np.arange(len(ids))  # words from each one to its caption's end
    hashes = np.zeros_like(ids)
    for n in range(1, MAX_N + 1):
        hashes = hashes[: len(ids) - n + 1] * np.uint64(MULTIPLIER) + ids[n - 1 :]
        within = remaining[: len(hashes)] >= n  # no n-gram crosses a caption's end
        yield owners[: len(hashes)][within], hashes[within]
