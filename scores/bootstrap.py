"""Bootstrap over images: confidence intervals of scores, and a paired test of two sets of captions. N images.

Source: Koehn, "Statistical Significance Tests for Machine Translation Evaluation", 2004. A resample draws N images of
the split with replacement. Its BLEU is recomputed from the summed counts of its images. Its ROUGE-L and CIDEr are the
means of its images' scores; CIDEr's document frequencies remain those of the whole split.
"""

import numpy as np

from scores.metrics import bleu_statistics, corpus_bleu

RESAMPLES = 1000
CONFIDENCE = 0.95
SEED = 0  # the same resamples for every set of captions of a split, so that their differences are paired
NAMES = ("bleu_4", "rouge_l", "cider")


def image_statistics(
    references: list[list[list[str]]], predictions: list[list[str]], scores: dict[str, np.ndarray]
) -> np.ndarray:
    """Return the statistics (N, 12) from which the scores of any set of images follow: BLEU's counts, ROUGE-L, CIDEr.

    `scores` are the `image_scores` of the same captions.
    """
    return np.column_stack([bleu_statistics(references, predictions), scores["rouge_l"], scores["cider"]])


def scores_of_sums(sums: np.ndarray, num_images: int) -> dict[str, np.ndarray]:
    """Compute BLEU-1 to 4, ROUGE-L and CIDEr, each (...), from sums (..., 12) of `image_statistics`."""
    bleu, means = corpus_bleu(sums[..., :-2]), sums[..., -2:] / num_images
    scores = {f"bleu_{n}": bleu[..., n - 1] for n in range(1, 5)}
    return scores | {"rouge_l": means[..., 0], "cider": means[..., 1]}


def resampled_sums(statistics: np.ndarray) -> np.ndarray:
    """Sum statistics (N, S) over the images of each resample: (RESAMPLES, S)."""
    generator, N = np.random.default_rng(SEED), len(statistics)
    counts = (np.bincount(generator.integers(N, size=N), minlength=N) for _ in range(RESAMPLES))
    return np.stack([count @ statistics for count in counts])


def percentile_interval(samples: np.ndarray) -> np.ndarray:
    """Return the ends (2, ...) of the 95 % percentile interval of bootstrap samples (RESAMPLES, ...)."""
    return np.quantile(samples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)


def two_sided_p(differences: np.ndarray) -> np.ndarray:
    """Compute p (...) of no difference from bootstrap samples (RESAMPLES, ...) of the difference.

    It is twice the share of the resamples on one side of 0, the smaller one. So p is below 0.05 if the 95 % interval
    excludes 0. It is never below 2 / (RESAMPLES + 1).
    """
    smaller = np.minimum((differences <= 0).sum(axis=0), (differences >= 0).sum(axis=0))
    return np.minimum(1.0, 2 * (smaller + 1) / (len(differences) + 1))


def confidence_intervals(statistics: np.ndarray) -> dict[str, list[float]]:
    """Return the 95 % intervals, [low, high], of BLEU-4, ROUGE-L and CIDEr, from `image_statistics`."""
    scores = scores_of_sums(resampled_sums(statistics), len(statistics))
    return {name: percentile_interval(scores[name]).tolist() for name in NAMES}


def paired_test(statistics: np.ndarray, other: np.ndarray) -> dict[str, dict[str, float]]:
    """Compare two sets of captions of the same images, each given by its `image_statistics`.

    Returns for BLEU-4, ROUGE-L and CIDEr the "difference", the first minus the other, its "standard_error", and the
    two-sided "p".
    """
    N, both = len(statistics), (statistics, other)
    scores = [scores_of_sums(each.sum(axis=0), N) for each in both]
    resampled = [scores_of_sums(resampled_sums(each), N) for each in both]
    tests = {}
    for name in NAMES:
        samples = resampled[0][name] - resampled[1][name]
        tests[name] = {
            "difference": float(scores[0][name] - scores[1][name]),
            "standard_error": float(samples.std(ddof=1)),
            "p": float(two_sided_p(samples)),
        }
    return tests
