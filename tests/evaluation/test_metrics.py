"""The metrics against other implementations."""

import shutil

import pytest
from nltk.translate.bleu_score import sentence_bleu
from pycocoevalcap.bleu.bleu import Bleu

from evaluation.metrics import compute_metrics

REFERENCES = [
    [["a", "dog", "runs", "on", "the", "grass"], ["the", "brown", "dog", "is", "running", "outside"]],
    [["two", "men", "play", "football", "in", "a", "park"], ["men", "playing", "football"]],
    [["a", "child", "on", "a", "swing"]],
]
PREDICTIONS = [
    ["a", "dog", "runs", "on", "the", "street"],
    ["two", "men", "play", "football"],
    ["a", "child", "on", "a", "red", "swing"],
]


def test_bleu_equals_pycocoevalcap():
    scores = compute_metrics(REFERENCES, PREDICTIONS)
    references = {i: [" ".join(words) for words in captions] for i, captions in enumerate(REFERENCES)}
    predictions = {i: [" ".join(words)] for i, words in enumerate(PREDICTIONS)}
    expected, _ = Bleu(4).compute_score(references, predictions, verbose=0)
    assert [scores[f"bleu_{n}"] for n in range(1, 5)] == pytest.approx(expected, rel=1e-6)


def test_bleu_of_one_image_equals_sentence_bleu_of_nltk():
    scores = compute_metrics(REFERENCES[:1], PREDICTIONS[:1])
    assert scores["bleu_4"] == pytest.approx(sentence_bleu(REFERENCES[0], PREDICTIONS[0]))


def test_perfect_and_hopeless_captions():
    perfect = compute_metrics(REFERENCES[:2], [captions[0] for captions in REFERENCES[:2]])
    assert perfect["bleu_4"] == perfect["rouge_l"] == pytest.approx(1)
    hopeless = compute_metrics(REFERENCES, [["zebra"], [], ["zebra", "zebra"]])
    assert hopeless["bleu_1"] == hopeless["rouge_l"] == hopeless["cider"] == 0


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("java"), reason="METEOR needs Java")
def test_meteor_prefers_the_better_captions():
    scores = [
        compute_metrics(REFERENCES, predictions, meteor=True)["meteor"]
        for predictions in (PREDICTIONS, [["x"], [], []])
    ]
    assert scores[0] > 0.3 > 0.01 > scores[1]
