"""The metrics against other implementations, and the files that eval.py writes."""

import json
import shutil

import pytest
import torch
from nltk.translate.bleu_score import sentence_bleu
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

import eval as evaluation

REFERENCES = [
    [["a", "dog", "runs", "on", "the", "grass"], ["the", "brown", "dog", "is", "running", "outside"]],
    [["two", "men", "play", "football", "in", "a", "park"], ["men", "playing", "football"]],
    [["a", "child", "on", "a", "swing"]],
]
CAPTIONS = [
    ["a", "dog", "runs", "on", "the", "street"],
    ["two", "men", "play", "football"],
    ["a", "child", "on", "a", "red", "swing"],
]


def test_bleu_equals_pycocoevalcaps():
    scores = evaluation.measure(REFERENCES, CAPTIONS)
    truth = {i: [" ".join(words) for words in one] for i, one in enumerate(REFERENCES)}
    found = {i: [" ".join(words)] for i, words in enumerate(CAPTIONS)}
    expected, _ = Bleu(4).compute_score(truth, found, verbose=0)
    assert [scores[f"bleu_{n}"] for n in range(1, 5)] == pytest.approx(expected, rel=1e-6)


def test_bleu_of_one_image_equals_nltks_sentence_bleu():
    scores = evaluation.measure(REFERENCES[:1], CAPTIONS[:1])
    assert scores["bleu_4"] == pytest.approx(sentence_bleu(REFERENCES[0], CAPTIONS[0]))


def test_perfect_and_hopeless_captions():
    perfect = evaluation.measure(REFERENCES[:2], [one[0] for one in REFERENCES[:2]])
    assert perfect["bleu_4"] == perfect["rouge_l"] == pytest.approx(1)
    hopeless = evaluation.measure(REFERENCES, [["zebra"], [], ["zebra", "zebra"]])
    assert hopeless["bleu_1"] == hopeless["rouge_l"] == hopeless["cider"] == 0


@pytest.mark.skipif(not shutil.which("java"), reason="METEOR needs Java")
def test_meteor_prefers_the_better_caption():
    scores = [
        evaluation.measure(REFERENCES, captions, meteor=True)["meteor"] for captions in (CAPTIONS, [["x"], [], []])
    ]
    assert scores[0] > 0.3 > 0.01 > scores[1]


ENTRY = {
    "objects": [
        {"words": ["small", "red", "circle"], "box": [0, 0, 0.5, 0.5]},
        {"words": ["large", "blue", "circle"], "box": [0.5, 0.5, 1, 1]},
        {"words": ["large", "blue", "star"], "box": [0.5, 0, 1, 0.5]},
    ]
}


@pytest.mark.parametrize(
    ("caption", "regions", "score"),
    [
        ("a red circle", (3, 3, 0), 1),
        ("a blue circle", (3, 3, 0), 0),  # the colour tells the circles apart
        ("a pink circle", (0, 0, 3), 1),  # it does not: either will do
        ("a blue star left of a blue circle", (0, 0, 1, 0, 0, 0, 0, 1), 0.5),
        ("a red square", (0, 0, 0), 0),  # no noun of this data set
    ],
)
def test_pointing_score(caption, regions, score):
    weights = torch.eye(4)[list(regions)]  # at each word all attention on one of 2x2 regions
    assert evaluation.pointing_score([ENTRY], [caption.split()], [weights]) == score


def test_a_noun_for_no_object_is_a_miss():
    other = {"objects": [{"words": ["small", "red", "square"], "box": [0, 0, 1, 1]}]}
    weights = torch.eye(4)[[0, 0, 0]]
    captions = [["a", "red", "circle"], ["a", "red", "circle"]]
    assert evaluation.pointing_score([ENTRY, other], captions, [weights] * 2) == 0.5


def test_eval_writes_a_table_and_the_captions(command, shapes, run_folder, tmp_path):
    arguments = ("--checkpoint", run_folder / "best.pt", "--data_folder", shapes, "--output", tmp_path)
    status, out, _ = command(evaluation, *arguments, "--beam_sizes", 1, 3, "--split", "train")
    rows = json.loads((tmp_path / "scores.json").read_text())
    assert status == 0 and [row["beam_size"] for row in rows] == [1, 3]
    keys = {"beam_size", "meteor", "rouge_l", "cider", "images_per_second", *(f"bleu_{n}" for n in range(1, 5))}
    assert keys <= set(rows[0])
    assert f"| 3 | {rows[1]['bleu_1']:.4f} |" in out

    # The numbers follow from the files alone, with pycocoevalcap: one free caption an image, all references, no <end>.
    results = json.loads((tmp_path / "results.json").read_text())
    entries = json.loads((shapes / "train_captions.json").read_text())
    assert [one["image_id"] for one in results] == [entry["image_id"] for entry in entries]
    truth = {e["image_id"]: [" ".join(one["words"]) for one in e["captions"]] for e in entries}
    found = {one["image_id"]: [one["caption"]] for one in results}
    assert not any("<" in one["caption"] for one in results)
    assert rows[1]["cider"] == pytest.approx(Cider().compute_score(truth, found)[0])
    assert rows[1]["rouge_l"] == pytest.approx(Rouge().compute_score(truth, found)[0])
    assert rows[1]["bleu_1"] == pytest.approx(Bleu(4).compute_score(truth, found, verbose=0)[0][0], rel=1e-6)


def test_without_java_all_but_meteor_works(command, shapes, run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    arguments = ("--checkpoint", run_folder / "best.pt", "--data_folder", shapes, "--output", tmp_path)
    status, out, err = command(evaluation, *arguments, "--beam_sizes", 1)
    assert status == 0 and "METEOR is left out, it needs Java" in err and "METEOR" not in out
    assert json.loads((tmp_path / "scores.json").read_text())[0]["meteor"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--checkpoint", "missing.pt"), "no such file: missing.pt"),
        (("--checkpoint", __file__), "is refused: it is damaged"),
        (("--data_folder", "missing"), "no data folder missing"),
        (("--beam_sizes", "0"), "--beam_sizes 0: must be at least 1"),
        (("--batch_size", "0"), "--batch_size 0: must be at least 1"),
        (("--device", "nowhere"), "--device nowhere"),
        (("--output", __file__), "cannot be written"),
    ],
)
def test_bad_input_ends_in_one_line(command, shapes, run_folder, arguments, message):
    good = ("--checkpoint", run_folder / "best.pt", "--data_folder", shapes)
    status, _, err = command(evaluation, *good, *arguments)
    assert status == 2 and message in err.splitlines()[-1] and "Traceback" not in err


def test_an_empty_split_is_named(command, shapes, run_folder, tmp_path):
    folder = shutil.copytree(shapes, tmp_path / "copy")
    card = json.loads((folder / "dataset.json").read_text())
    card["splits"]["test"] = {"images": 0, "captions": 0, "digest": ""}
    (folder / "dataset.json").write_text(json.dumps(card))
    status, _, err = command(evaluation, "--checkpoint", run_folder / "best.pt", "--data_folder", folder)
    assert status == 2 and "the test split" in err and "is empty (filled: train val)" in err
