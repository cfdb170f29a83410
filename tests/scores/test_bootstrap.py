"""Intervals and paired tests against plain loops and against simulated data with a known answer."""

import numpy as np
import pytest
from nltk.translate.bleu_score import corpus_bleu

from conftest import random_captions
from scores.bootstrap import (
    RESAMPLES,
    SEED,
    confidence_intervals,
    image_statistics,
    paired_test,
    percentile_interval,
    resampled_sums,
    two_sided_p,
)
from scores.metrics import image_scores


def statistics_of(references, predictions):
    """The statistics of captions with their scores of images."""
    scores = image_scores(references, predictions)
    return image_statistics(references, predictions, scores), scores


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:\n")  # of resamples without a common n-gram
def test_intervals_are_those_of_a_plain_loop():
    references, predictions = random_captions(20, shortest=4)
    statistics, scores = statistics_of(references, predictions)
    generator, samples = np.random.default_rng(SEED), []
    for _ in range(RESAMPLES):
        drawn = generator.integers(20, size=20)
        bleu = corpus_bleu([references[i] for i in drawn], [predictions[i] for i in drawn])
        samples.append([bleu, scores["rouge_l"][drawn].mean(), scores["cider"][drawn].mean()])
    intervals = confidence_intervals(statistics)
    for column, name in zip(np.array(samples).T, ("bleu_4", "rouge_l", "cider"), strict=True):
        ordered = np.sort(column)
        assert intervals[name] == pytest.approx(np.percentile(column, [2.5, 97.5]).tolist(), rel=1e-9)
        assert ordered[24] <= intervals[name][0] < intervals[name][1] <= ordered[975]


def test_95_of_100_intervals_hold_the_true_mean():
    values = np.random.default_rng(1).gamma(shape=4, scale=0.25, size=(150, 2000))  # images, simulated data sets
    low, high = percentile_interval(resampled_sums(values) / len(values))
    assert np.mean((low <= 1) & (high >= 1)) == pytest.approx(0.95, abs=0.02)


def test_without_a_difference_p_is_uniform():
    differences = np.random.default_rng(2).normal(size=(150, 2000))  # images, simulated pairs of captions
    p = two_sided_p(resampled_sums(differences))
    for level in (0.05, 0.1, 0.25, 0.5, 0.75):
        assert np.mean(p <= level) == pytest.approx(level, abs=0.03)


def test_p_is_below_5_percent_where_the_interval_leaves_0_out():
    differences = np.random.default_rng(3).normal(0.1, size=(100, 500))
    sums = resampled_sums(differences)
    low, high = percentile_interval(sums)
    significant = (low > 0) | (high < 0)
    assert 0.1 < significant.mean() < 0.5
    assert np.mean((two_sided_p(sums) < 0.05) == significant) > 0.98  # but where an end lies on the last resample


def test_paired_tests_of_the_same_and_of_better_captions():
    references, predictions = random_captions(60, shortest=4)
    statistics, scores = statistics_of(references, predictions)
    for test in paired_test(statistics, statistics).values():
        assert test == {"difference": 0, "standard_error": 0, "p": 1}
    best, _ = statistics_of(references, [captions[0] for captions in references])
    tests = paired_test(best, statistics)
    assert list(tests) == ["bleu_4", "rouge_l", "cider"]
    assert all(test["difference"] > 0 and test["p"] == pytest.approx(2 / (RESAMPLES + 1)) for test in tests.values())
    difference = best[:, -1] - scores["cider"]  # the standard error of a mean by its formula
    assert tests["cider"]["difference"] == pytest.approx(difference.mean())
    assert tests["cider"]["standard_error"] == pytest.approx(difference.std() / 60**0.5, rel=0.1)
    opposite = paired_test(statistics, best)
    assert all(opposite[name]["difference"] == -tests[name]["difference"] for name in tests)
