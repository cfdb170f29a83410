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

REFERENCES = [
    [["a", "dog", "runs", "on", "the", "grass"], ["the", "brown", "dog", "is", "running", "outside"]],
    [["two", "men", "play", "football", "in", "a", "park"], ["men", "playing", "football"]],
    [["a", "child", "on", "a", "swing"]],
]
PREDICTIONS = [
    ["A", "DOG", "IS", "IN"],  # in Turkish, the small I has no dot
    ["two", "men", "play", "football"],
    ["zebra"],
]
BLEU = [f"bleu_{n}" for n in range(1, 5)]


def texts(captions):
    """Captions as pycocoevalcap takes them: a dictionary of lists of sentences."""
    return {i: [" ".join(words) for words in of_image] for i, of_image in enumerate(captions)}


METEOR_ARGUMENTS = texts(REFERENCES), texts([[words] for words in PREDICTIONS])


@pytest.mark.filterwarnings("ignore:\n")  # of nltk, of captions without a common n-gram
@pytest.mark.parametrize("seed", range(5))
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


@pytest.fixture(scope="module")
def reference_meteor():
    """The METEOR of pycocoevalcap for PREDICTIONS: of all captions, and of each."""
    return Meteor().compute_score(*METEOR_ARGUMENTS)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("java"), reason="METEOR needs Java")
@pytest.mark.parametrize("locale", ["de_DE", "tr_TR"])
def test_meteor_is_that_of_pycocoevalcap_in_every_locale(monkeypatch, reference_meteor, locale):
    language, country = locale.split("_")
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", f"-Duser.language={language} -Duser.country={country}")
    monkeypatch.setenv("LC_ALL", f"{locale}.UTF-8")
    assert compute_meteor(*METEOR_ARGUMENTS) == reference_meteor
    _, of_images = reference_meteor
    assert of_images[1] > 0.3 and of_images[2] < 0.01
