"""The metrics against other implementations."""

import shutil

import pytest
from nltk.translate.bleu_score import sentence_bleu
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.meteor.meteor import Meteor

from scores.metrics import compute_meteor, compute_metrics
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


def texts(captions):
    """Captions as METEOR takes them: a dictionary of lists of sentences."""
    return {i: [" ".join(words) for words in of_image] for i, of_image in enumerate(captions)}


def meteor_of(predictions):
    return compute_meteor(texts(REFERENCES), texts([[words] for words in predictions]))[0]


def test_bleu_equals_pycocoevalcap():
    scores = compute_metrics(REFERENCES, PREDICTIONS)
    references, predictions = texts(REFERENCES), texts([[words] for words in PREDICTIONS])
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


def test_bleu_without_a_common_ngram_is_zero():
    references, predictions = [[["a", "dog", "runs", "on", "grass"]]], [["a", "dog", "on", "runs", "grass"]]
    scores = compute_metrics(references, predictions)
    assert (scores["bleu_3"], scores["bleu_4"]) == (0, 0) and scores["bleu_2"] == pytest.approx(0.5)
    expected, _ = Bleu(4).compute_score({0: ["a dog runs on grass"]}, {0: ["a dog on runs grass"]}, verbose=0)
    assert [scores[f"bleu_{n}"] for n in range(1, 5)] == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("java"), reason="METEOR needs Java")
@pytest.mark.parametrize("locale", ["de_DE", "tr_TR"])
def test_meteor_is_the_same_in_every_locale(monkeypatch, locale):
    expected = meteor_of([["A", "DOG", "IS", "IN"], [], []])
    language, country = locale.split("_")
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", f"-Duser.language={language} -Duser.country={country}")
    monkeypatch.setenv("LC_ALL", f"{locale}.UTF-8")
    assert meteor_of([["A", "DOG", "IS", "IN"], [], []]) == expected > 0.05


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("java"), reason="METEOR needs Java")
def test_meteor_equals_pycocoevalcap():
    references, predictions = texts(REFERENCES), texts([[words] for words in PREDICTIONS])
    assert compute_meteor(references, predictions) == Meteor().compute_score(references, predictions)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("java"), reason="METEOR needs Java")
def test_meteor_prefers_the_better_captions():
    scores = [meteor_of(PREDICTIONS), meteor_of([["x"], [], []])]
    assert scores[0] > 0.3 > 0.01 > scores[1]


def test_a_java_that_fails_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "java").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(InputError, match="METEOR's Java program failed"):
        meteor_of(PREDICTIONS)
