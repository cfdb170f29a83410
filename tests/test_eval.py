"""The files that eval.py writes, and its errors."""

import datetime
import json
import shutil
import time

import pytest
import torch
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocotools.coco import COCO

import eval as eval_script
from conftest import prepare_shapes
from tools import index_captions
from training.state import git_revision


def test_eval_writes_a_table_and_the_captions(command, shapes, run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)  # no Java
    arguments = ("--checkpoint", run_folder / "best.pt", "--data_folder", shapes, "--output_folder", tmp_path)
    status, out, err = command(eval_script, *arguments, "--beam_sizes", 1, 3, "--split", "train")
    scores = json.loads((tmp_path / f"scores_best_{shapes.name}_train.json").read_text())
    rows = scores["scores"]
    assert status == 0 and [row["beam_size"] for row in rows] == [1, 3]
    keys = {"beam_size", "meteor", "rouge_l", "cider", "images_per_second", *(f"bleu_{n}" for n in range(1, 5))}
    assert keys <= set(rows[0])
    assert f"| 3 | {rows[1]['bleu_1']:.4f} |" in out
    assert "METEOR is left out: it needs a Java runtime" in err
    assert rows[0]["meteor"] is None and "METEOR" not in out

    # pycocoevalcap computes the same scores from the files alone: one caption per image, all references, no <end>.
    path = tmp_path / f"results_best_{shapes.name}_train.json"
    results = json.loads(path.read_text())
    entries = json.loads((shapes / "train_captions.json").read_text())
    for name in ("image_id", "image"):
        assert [result[name] for result in results] == [entry[name] for entry in entries]
    references = {entry["image_id"]: [" ".join(caption["words"]) for caption in entry["captions"]] for entry in entries}
    predictions = {result["image_id"]: [result["caption"]] for result in results}
    coco = COCO()
    coco.dataset = {"images": [{"id": result["image_id"]} for result in results]}
    coco.createIndex()
    annotations = coco.loadRes(str(path)).dataset["annotations"]
    assert [each["caption"] for each in annotations] == [result["caption"] for result in results]
    assert not any("<" in result["caption"] for result in results)
    assert rows[1]["cider"] == pytest.approx(Cider().compute_score(references, predictions)[0])
    assert rows[1]["rouge_l"] == pytest.approx(Rouge().compute_score(references, predictions)[0])
    bleu, _ = Bleu(4).compute_score(references, predictions, verbose=0)
    assert rows[1]["bleu_1"] == pytest.approx(bleu[0], rel=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("java"), reason="METEOR needs Java")
def test_with_java_the_table_has_meteor(command, shapes, run_folder, tmp_path):
    arguments = ("--checkpoint", run_folder / "best.pt", "--data_folder", shapes, "--output_folder", tmp_path)
    status, out, err = command(eval_script, *arguments, "--beam_sizes", 3)
    (row,) = json.loads((tmp_path / f"scores_best_{shapes.name}_test.json").read_text())["scores"]
    assert status == 0 and "METEOR is left out" not in err
    assert "METEOR" in out and f" {row['meteor']:.4f} " in out


@pytest.fixture
def evaluate(command, shapes, run_folder, monkeypatch):
    """Run eval.py without METEOR: arguments -> exit status, stderr."""
    monkeypatch.setattr(eval_script, "has_java", lambda: False)
    arguments = ("--checkpoint", run_folder / "best.pt", "--data_folder", shapes, "--beam_sizes", 1, "--max_length", 3)

    def run(*more):
        status, _, err = command(eval_script, *arguments, *more)
        return status, err

    return run


def test_scores_say_of_what_they_are(evaluate, shapes, run_folder, tmp_path):
    assert evaluate("--output_folder", tmp_path, "--length_penalty", 0.7, "--precision", "fp32")[0] == 0
    scores = json.loads((tmp_path / f"scores_best_{shapes.name}_test.json").read_text())
    assert scores["checkpoint"] == [str(run_folder / "best.pt")] and scores["data_folder"] == str(shapes)
    assert (scores["dataset"], scores["split"]) == ("shapes", "test")
    assert scores["digest"] == json.loads((shapes / "dataset.json").read_text())["digest"]
    expected = {"beam_size": 1, "length_penalty": 0.7, "max_length": 3, "batch_size": 32, "num_beam_groups": 1}
    assert scores["decoding"].items() >= expected.items()
    assert not scores["decoding"].keys() & {"checkpoint", "precision", "device"}
    assert scores["results"] == "" and scores["comparison"] is None and scores["tokenizer"] == "plain"
    assert scores["bootstrap"] == {"resamples": 1000, "confidence": 0.95, "seed": 0}
    assert scores["dtype"] == "float32" and scores["versions"]["torch"] == torch.__version__
    assert abs(datetime.datetime.fromisoformat(scores["date"]).timestamp() - time.time()) < 100
    assert scores["git"] == git_revision() and len(scores["scores"]) == 1


def test_nothing_replaces_the_scores_of_something_else(evaluate, shapes, run_folder, tmp_path):
    """Something else: another split, another checkpoint in the folder, another data set."""
    run = shutil.copytree(run_folder, tmp_path / "run")
    for checkpoint in ("best.pt", "last.pt"):
        for split in ("val", "test"):
            assert evaluate("--checkpoint", run / checkpoint, "--split", split)[0] == 0
    kinds = [f"{kind}_{stem}_shapes_{split}.json" for kind in ("scores", "scores_per_image", "results")
             for stem in ("best", "last") for split in ("val", "test")]  # fmt: skip
    assert {path.name for path in run.glob("*.json")} == set(kinds)
    path = run / "scores_best_shapes_test.json"

    moved = shutil.copytree(shapes, tmp_path / "moved" / "shapes")
    assert evaluate("--checkpoint", run / "best.pt", "--data_folder", moved)[0] == 0  # the same content
    before = path.read_bytes()
    metadata = json.loads((moved / "dataset.json").read_text())
    other = shutil.copytree(moved, tmp_path / "other" / "shapes")
    (other / "dataset.json").write_text(json.dumps(metadata | {"digest": "another"}))
    status, err = evaluate("--checkpoint", run / "best.pt", "--data_folder", other)
    assert status == 2 and f"{path} has the scores on {moved}: choose another --output_folder" in err
    status, err = evaluate("--output_folder", run)
    assert status == 2 and f"{path} has the scores of {run / 'best.pt'}: choose another --output_folder" in err
    assert path.read_bytes() == before

    renamed = (tmp_path / "run").rename(tmp_path / "renamed")
    assert evaluate("--checkpoint", renamed / "best.pt")[0] == 0  # the same data, the same run
    (renamed / path.name).write_text("[]")
    status, err = evaluate("--checkpoint", renamed / "best.pt")
    assert status == 2 and "was not written by eval.py" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--checkpoint", "missing.pt"), "no such file: missing.pt"),
        (("--checkpoint", "{run}"), "is a folder, not a checkpoint: give {run}/best.pt"),
        (("--checkpoint", __file__), "is refused: it is damaged"),
        (("--data_folder", "missing"), "no data folder missing"),
        (("--beam_sizes", "0"), "--beam_sizes 0: must be at least 1"),
        (("--output_folder", __file__), "cannot be written"),
        (("--num_beam_groups", "3", "--beam_sizes", "3", "4"), "--num_beam_groups 3: does not divide the beam size 4"),
    ],
)
def test_bad_input_ends_in_one_line(command, shapes, run_folder, arguments, message):
    good = ("--checkpoint", run_folder / "best.pt", "--data_folder", shapes)
    arguments = [argument.format(run=run_folder) for argument in arguments]
    status, _, err = command(eval_script, *good, *arguments)
    assert status == 2 and message.format(run=run_folder) in err.splitlines()[-1] and "Traceback" not in err


def test_an_empty_split_is_named(command, shapes, run_folder, tmp_path):
    folder = shutil.copytree(shapes, tmp_path / "copy")
    metadata = json.loads((folder / "dataset.json").read_text())
    metadata["splits"]["test"] = {"images": 0, "captions": 0, "digest": ""}
    (folder / "dataset.json").write_text(json.dumps(metadata))
    status, _, err = command(eval_script, "--checkpoint", run_folder / "best.pt", "--data_folder", folder)
    assert status == 2 and "the test split" in err and "is empty (filled: train val)" in err


def test_an_ensemble_with_consensus_has_a_row_without_and_with(command, evaluate, shapes, run_folder, tmp_path):
    best, index, out = run_folder / "best.pt", tmp_path / "index.pt", tmp_path / "out"
    assert command(index_captions, "--checkpoint", best, "--data_folder", shapes, "--output", index)[0] == 0
    arguments = ("--output_folder", out, "--consensus_index", index, "--consensus_weight", 50, "--beam_sizes", 1, 4)
    assert evaluate("--checkpoint", best, run_folder / "last.pt", "--views", "original", "hflip", *arguments)[0] == 0
    scores = json.loads((out / f"scores_ensemble2_hflip_consensus_{shapes.name}_test.json").read_text())
    ways = [(1, 0), (1, 50), (4, 0), (4, 50)]
    rows = [(row["model"], row["beam_size"], row.get("consensus")) for row in scores["scores"]]
    expected = [(str(best), *way) for way in ways]
    expected += [(str(run_folder / "last.pt"), beam_size, None) for beam_size in (1, 4)]  # its encoder differs
    assert rows == expected + [("ensemble", *way) for way in ways]
    ciders = [row["cider"] for row in scores["scores"]]
    assert ciders[0] == ciders[1] and ciders[6] == ciders[7]  # one candidate
    assert ciders[8] != ciders[9]  # the consensus prefers other captions
    assert scores["checkpoint"] == [str(best), str(run_folder / "last.pt")]
    assert scores["decoding"]["views"] == ["original", "hflip"]
    assert scores["decoding"]["consensus_index"] == str(index) and scores["consensus_digest"] == scores["digest"]
    assert (out / f"results_ensemble2_hflip_consensus_{shapes.name}_test.json").is_file()


def test_an_index_of_other_data_is_refused(command, evaluate, run_folder, tmp_path):
    best, index = run_folder / "best.pt", tmp_path / "index.pt"
    other = prepare_shapes(tmp_path / "other", num_scenes=12)
    assert command(index_captions, "--checkpoint", best, "--data_folder", other, "--output", index)[0] == 0
    status, err = evaluate("--output_folder", tmp_path / "out", "--consensus_index", index)
    assert status == 2 and err.count("\n") == 1 and "the index was made from other data than" in err
    assert not list(tmp_path.glob("out/*"))


def test_samples_take_the_place_of_beams(command, shapes, run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_script, "has_java", lambda: False)
    captions = []
    for seed in (1, 1, 2):
        folder = tmp_path / str(len(captions))
        arguments = ("--checkpoint", run_folder / "best.pt", "--data_folder", shapes, "--output_folder", folder)
        sampling = ("--samples", 3, "--max_length", 6, "--split", "train", "--seed", seed)
        assert command(eval_script, *arguments, *sampling)[0] == 0
        captions.append(json.loads((folder / f"results_best_samples_{shapes.name}_train.json").read_text()))
        (row,) = json.loads((folder / f"scores_best_samples_{shapes.name}_train.json").read_text())["scores"]
        assert row["samples"] == 3 and "beam_size" not in row
    assert captions[0] == captions[1] != captions[2]
