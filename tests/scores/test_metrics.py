"""The metrics against other implementations."""

import shutil

import numpy as np
import pytest
from nltk.translate.bleu_score import corpus_bleu as nltk_bleu
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge

from conftest import random_captions
from scores.metrics import bleu_statistics, compute_meteor, compute_metrics, corpus_bleu, image_scores
from utils import InputError

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


BLEU = [f"bleu_{n}" for n in range(1, 5)]


def texts(captions):
    """Captions as pycocoevalcap takes them: a dictionary of lists of sentences."""
    return {i: [" ".join(words) for words in of_image] for i, of_image in enumerate(captions)}


def meteor_of(predictions):
    return compute_meteor(texts(REFERENCES), texts([[words] for words in predictions]))[0]


@pytest.mark.filterwarnings("ignore:\n")  # of nltk, of captions without a common n-gram
@pytest.mark.parametrize("seed", range(20))
def test_bleu_is_that_of_nltk(seed):
    references, predictions = random_captions(15, seed)
    scores = compute_metrics(references, predictions)
    expected = nltk_bleu(references, predictions, [(1,), (1 / 2,) * 2, (1 / 3,) * 3, (1 / 4,) * 4])
    assert [scores[name] for name in BLEU] == pytest.approx(expected, rel=1e-12) and expected[3] > 0.01


def test_bleu_without_a_common_ngram_is_zero():
    references, predictions = [[["a", "dog", "runs", "on", "grass"]]], [["a", "dog", "on", "runs", "grass"]]
    scores = compute_metrics(references, predictions)
    assert (scores["bleu_3"], scores["bleu_4"]) == (0, 0) and scores["bleu_2"] == pytest.approx(0.5)
    expected, _ = Bleu(4).compute_score({0: ["a dog runs on grass"]}, {0: ["a dog on runs grass"]}, verbose=0)
    assert [scores[name] for name in BLEU] == pytest.approx(expected, abs=1e-3)


def test_counts_by_hand():
    references = [[["a", "a", "dog"], ["a", "dog", "runs", "on", "grass"]]]
    (counts,) = bleu_statistics(references, [["a", "a", "a", "dog"]])
    assert counts.tolist() == [3, 2, 1, 0, 4, 3, 2, 1, 4, 3]  # the lengths 3 and 5 are as close: the shorter one
    assert corpus_bleu(counts)[:2].tolist() == pytest.approx([3 / 4, (3 / 4 * 2 / 3) ** 0.5])


@pytest.mark.parametrize("shortest", [0, 4])
def test_scores_are_those_of_pycocoevalcap(shortest):
    references, predictions = random_captions(60, shortest=shortest)
    arguments = texts(references), texts([[words] for words in predictions])
    bleu, image_bleu = Bleu(4).compute_score(*arguments, verbose=0)
    rouge, image_rouge = Rouge().compute_score(*arguments)
    cider, image_cider = Cider().compute_score(*arguments)
    scores = compute_metrics(references, predictions)
    assert [scores["rouge_l"], scores["cider"]] == pytest.approx([rouge, cider])
    if shortest == 4:  # nltk counts an n-gram in each shorter caption
        assert [scores[name] for name in BLEU] == pytest.approx(bleu, rel=1e-6)
    expected = {"bleu_4": image_bleu[3], "rouge_l": image_rouge, "cider": image_cider}
    scores = image_scores(references, predictions)
    assert scores.keys() == expected.keys()
    for name, values in expected.items():
        assert scores[name].shape == (60,) and scores[name].mean() > 0
        np.testing.assert_allclose(scores[name], values, rtol=1e-9, atol=1e-12)


def test_perfect_hopeless_and_empty_captions():
    perfect = compute_metrics(REFERENCES[:2], [captions[0] for captions in REFERENCES[:2]])
    assert perfect["bleu_4"] == perfect["rouge_l"] == pytest.approx(1)
    hopeless = compute_metrics(REFERENCES, [["zebra"], [], ["zebra", "zebra"]])
    assert hopeless["bleu_1"] == hopeless["rouge_l"] == hopeless["cider"] == 0
    scores = image_scores([[["a", "dog"]], [["a", "cat"]]], [[], ["a", "cat"]])
    assert scores["bleu_4"][0] == scores["rouge_l"][0] == scores["cider"][0] == 0
    assert corpus_bleu(bleu_statistics([[["a"]]], [[]])[0]).tolist() == [0, 0, 0, 0]


NEEDS_JAVA = pytest.mark.skipif(not shutil.which("java"), reason="METEOR needs Java")


@pytest.mark.slow
@NEEDS_JAVA
@pytest.mark.parametrize("locale", ["de_DE", "tr_TR"])
def test_meteor_is_the_same_in_every_locale(monkeypatch, locale):
    expected = meteor_of([["A", "DOG", "IS", "IN"], [], []])
    language, country = locale.split("_")
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", f"-Duser.language={language} -Duser.country={country}")
    monkeypatch.setenv("LC_ALL", f"{locale}.UTF-8")
    assert meteor_of([["A", "DOG", "IS", "IN"], [], []]) == expected > 0.05


@pytest.mark.slow
@NEEDS_JAVA
def test_meteor_equals_pycocoevalcap_and_prefers_the_better_captions():
    arguments = texts(REFERENCES), texts([[words] for words in PREDICTIONS])
    assert compute_meteor(*arguments) == Meteor().compute_score(*arguments)
    assert meteor_of(PREDICTIONS) > 0.3 > 0.01 > meteor_of([["x"], [], []])


def test_a_java_that_fails_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "java").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(InputError, match="METEOR's Java program failed"):
        meteor_of(PREDICTIONS)
