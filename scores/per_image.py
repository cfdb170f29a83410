"""Scores of each image's caption, and the counts from which the BLEU of any set of images follows. N images."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

MAX_N = 4  # longest n-grams of BLEU


def image_scores(references: list[list[list[str]]], predictions: list[list[str]]) -> dict[str, np.ndarray]:
    """BLEU-4, ROUGE-L and CIDEr of each image's caption: "bleu_4", "rouge_l" and "cider", each (N,).

    ROUGE-L and CIDEr are pycocoevalcap's, whose means are the scores of the split; CIDEr's document frequencies are
    those of all the images given. BLEU-4 is smoothed as pycocoevalcap's of one image: a caption without a common
    4-gram has a score near 0, not 0. The BLEU of the split is not the mean of those of its images.

    Args:
        references: for each image its captions, each a list of words.
        predictions: for each image one caption, a list of words.
    """
    texts = image_texts(references, predictions)
    return {
        "bleu_4": _smoothed_bleu(bleu_statistics(references, predictions)),
        "rouge_l": np.asarray(Rouge().compute_score(*texts)[1]),
        "cider": np.asarray(Cider().compute_score(*texts)[1]),
    }


def image_texts(
    references: list[list[list[str]]], predictions: list[list[str]]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """References and predictions of `image_scores` as pycocoevalcap takes them: each image's sentences by its index."""
    reference_texts = {i: [" ".join(words) for words in captions] for i, captions in enumerate(references)}
    return reference_texts, {i: [" ".join(words)] for i, words in enumerate(predictions)}


def bleu_statistics(references: list[list[list[str]]], predictions: list[list[str]]) -> np.ndarray:
    """The counts of BLEU for each image, (N, 10): for n from 1 to 4 the n-grams that are in a reference, then all
    n-grams, at least 1 as in nltk; the caption's length and that of the closest reference.
    """
    rows = []
    for captions, words in zip(references, predictions, strict=True):
        counts = Counter(_ngrams(words))
        most = Counter()  # of each n-gram in one reference
        for reference in captions:
            most |= Counter(ngram for ngram in _ngrams(reference) if ngram in counts)
        matches = [0] * MAX_N
        for ngram, count in most.items():
            matches[len(ngram) - 1] += min(count, counts[ngram])
        totals = [max(1, len(words) - n) for n in range(MAX_N)]
        closest = min((len(reference) for reference in captions), key=lambda length: (abs(length - len(words)), length))
        rows.append([*matches, *totals, len(words), closest])
    return np.array(rows, float)


def corpus_bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU-1 to 4 (..., 4) of a set of images, from the sums (..., 10) of their `bleu_statistics`.

    Source: Papineni et al., 2002; as nltk's corpus_bleu, but 0 where no n-gram is in a reference.
    """
    matches, totals, lengths, closest = np.split(sums, [MAX_N, 2 * MAX_N, 2 * MAX_N + 1], axis=-1)
    with np.errstate(divide="ignore"):
        log_precisions = np.log(matches / totals)  # -inf without a match
    brevity = np.minimum(0.0, 1 - closest / np.maximum(lengths, 1e-9))  # logarithm of the penalty
    return np.exp(brevity + log_precisions.cumsum(axis=-1) / np.arange(1, MAX_N + 1))


def _smoothed_bleu(statistics: np.ndarray) -> np.ndarray:
    """BLEU-4 (N,) of each image, with the tiny numbers that pycocoevalcap's BleuScorer adds to the counts."""
    tiny, small = 1e-15, 1e-9
    matches, lengths, closest = statistics[:, :MAX_N], statistics[:, 8:9], statistics[:, 9]
    totals = np.maximum(0, lengths - np.arange(MAX_N))
    bleu = ((matches + tiny) / (totals + small)).prod(axis=1) ** (1 / MAX_N)
    ratio = (lengths[:, 0] + tiny) / (closest + small)
    return bleu * np.exp(np.minimum(0.0, 1 - 1 / ratio))


def _ngrams(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The n-grams of a caption, n from 1 to 4."""
    return itertools.chain.from_iterable(zip(*(words[i:] for i in range(n)), strict=False) for n in range(1, MAX_N + 1))
