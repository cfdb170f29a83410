"""Scores of single images, and corpus BLEU from their counts, against nltk and pycocoevalcap."""

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from conftest import random_captions
from scores.metrics import compute_metrics
from scores.per_image import bleu_statistics, corpus_bleu, image_scores


@pytest.mark.parametrize("shortest", [0, 4])
def test_scores_of_images_are_those_of_pycocoevalcap(shortest):
    references, predictions = random_captions(60, shortest=shortest)
    texts = {i: [" ".join(words) for words in captions] for i, captions in enumerate(references)}
    predicted = {i: [" ".join(words)] for i, words in enumerate(predictions)}
    scores = image_scores(references, predictions)
    expected = {
        "bleu_4": Bleu(4).compute_score(texts, predicted, verbose=0)[1][3],
        "rouge_l": Rouge().compute_score(texts, predicted)[1],
        "cider": Cider().compute_score(texts, predicted)[1],
    }
    assert scores.keys() == expected.keys()
    for name, values in expected.items():
        assert scores[name].shape == (60,) and scores[name].mean() > 0
        np.testing.assert_allclose(scores[name], values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_corpus_bleu_follows_from_the_counts(seed):
    references, predictions = random_captions(15, seed)
    expected = compute_metrics(references, predictions)
    bleu = corpus_bleu(bleu_statistics(references, predictions).sum(axis=0))
    assert bleu.tolist() == pytest.approx([expected[f"bleu_{n}"] for n in range(1, 5)], rel=1e-12)


def test_counts_by_hand():
    references = [[["a", "a", "dog"], ["a", "dog", "runs", "on", "grass"]]]
    (counts,) = bleu_statistics(references, [["a", "a", "a", "dog"]])
    assert counts.tolist() == [3, 2, 1, 0, 4, 3, 2, 1, 4, 3]  # the lengths 3 and 5 are as close: the shorter one
    assert corpus_bleu(counts)[:2].tolist() == pytest.approx([3 / 4, (3 / 4 * 2 / 3) ** 0.5])


def test_empty_captions_score_nothing():
    scores = image_scores([[["a", "dog"]], [["a", "cat"]]], [[], ["a", "cat"]])
    assert scores["bleu_4"][0] == scores["rouge_l"][0] == scores["cider"][0] == 0
    assert corpus_bleu(bleu_statistics([[["a"]]], [[]])[0]).tolist() == [0, 0, 0, 0]
