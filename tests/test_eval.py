"""The files that eval.py writes, and its errors."""

import json
import shutil

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

import eval as eval_script


@pytest.mark.parametrize("java", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_eval_writes_a_table_and_the_captions(command, shapes, run_folder, tmp_path, monkeypatch, java):
    if not java:
        monkeypatch.setattr(eval_script, "has_java", lambda: False)  # METEOR starts slowly
    arguments = ("--checkpoint", run_folder / "best.pt", "--data_folder", shapes, "--output_folder", tmp_path)
    status, out, _ = command(eval_script, *arguments, "--beam_sizes", 1, 3, "--split", "train")
    rows = json.loads((tmp_path / "scores.json").read_text())
    assert status == 0 and [row["beam_size"] for row in rows] == [1, 3]
    keys = {"beam_size", "meteor", "rouge_l", "cider", "images_per_second", *(f"bleu_{n}" for n in range(1, 5))}
    assert keys <= set(rows[0])
    assert f"| 3 | {rows[1]['bleu_1']:.4f} |" in out

    # pycocoevalcap computes the same scores from the files alone: one caption per image, all references, no <end>.
    results = json.loads((tmp_path / "results.json").read_text())
    entries = json.loads((shapes / "train_captions.json").read_text())
    assert [result["image_id"] for result in results] == [entry["image_id"] for entry in entries]
    references = {entry["image_id"]: [" ".join(caption["words"]) for caption in entry["captions"]] for entry in entries}
    predictions = {result["image_id"]: [result["caption"]] for result in results}
    assert not any("<" in result["caption"] for result in results)
    assert rows[1]["cider"] == pytest.approx(Cider().compute_score(references, predictions)[0])
    assert rows[1]["rouge_l"] == pytest.approx(Rouge().compute_score(references, predictions)[0])
    bleu, _ = Bleu(4).compute_score(references, predictions, verbose=0)
    assert rows[1]["bleu_1"] == pytest.approx(bleu[0], rel=1e-6)


def test_without_java_all_but_meteor_works(command, shapes, run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    arguments = ("--checkpoint", run_folder / "best.pt", "--data_folder", shapes, "--output_folder", tmp_path)
    status, out, err = command(eval_script, *arguments, "--beam_sizes", 1)
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
        (("--output_folder", __file__), "cannot be written"),
    ],
)
def test_bad_input_ends_in_one_line(command, shapes, run_folder, arguments, message):
    good = ("--checkpoint", run_folder / "best.pt", "--data_folder", shapes)
    status, _, err = command(eval_script, *good, *arguments)
    assert status == 2 and message in err.splitlines()[-1] and "Traceback" not in err


def test_an_empty_split_is_named(command, shapes, run_folder, tmp_path):
    folder = shutil.copytree(shapes, tmp_path / "copy")
    metadata = json.loads((folder / "dataset.json").read_text())
    metadata["splits"]["test"] = {"images": 0, "captions": 0, "digest": ""}
    (folder / "dataset.json").write_text(json.dumps(metadata))
    status, _, err = command(eval_script, "--checkpoint", run_folder / "best.pt", "--data_folder", folder)
    assert status == 2 and "the test split" in err and "is empty (filled: train val)" in err
