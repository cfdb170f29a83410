"""The benchmarks at a tiny size: both sides agree, and the last line is JSON with a ratio."""

import json
import subprocess
import sys
from pathlib import Path

import compare_models
import pytest
from PIL import Image

from preparation.caption_formats import read_records

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_generated_photos_are_read_as_cocos(tmp_path):
    sizes = ["--num_train", "5", "--num_val", "2", "--num_test", "1"]
    command = [sys.executable, BENCHMARKS / "generate_coco.py", "--output_folder", str(tmp_path), *sizes]
    subprocess.run(command, check=True, capture_output=True)
    records, _ = read_records([str(tmp_path / "dataset_coco.json")], str(tmp_path), "auto")
    assert [record.split for record in records] == ["train"] * 5 + ["val"] * 2 + ["test"]
    for record in records:
        with Image.open(record.path) as photo:
            assert photo.size == (320, 256) and len(record.captions) == 5


def test_models_are_compared_and_finished_runs_are_not_repeated(command, shapes, tmp_path, monkeypatch):
    small = {"encoder": "resnet18", "encoder_layer": "layer1", "encoder_weights": "", "hidden_dim": 16}
    tiny = {name: {**small, "region_dim": 16, "attention_dim": 16, "embed_dim": 16} for name in ("one", "two")}
    tiny["two"]["attention"] = "none"
    monkeypatch.setattr(compare_models, "VARIANTS", tiny)
    monkeypatch.setattr("eval.has_java", lambda: False)  # METEOR starts slowly
    common = ("--data_folder", shapes, "--output_folder", tmp_path, "--epochs", 1, "--device", "cpu")
    status, out, error = command(compare_models, *common, "--variants", "one")
    assert status == 0, error
    trained = (tmp_path / "one_seed0" / "best.pt").stat().st_mtime_ns
    status, out, error = command(compare_models, *common, "--variants", "one", "two", "--seeds", 0, 1)
    assert status == 0, error
    assert (tmp_path / "one_seed0" / "best.pt").stat().st_mtime_ns == trained
    table = (tmp_path / "table.md").read_text()
    assert table in out and len(table.splitlines()) == 2 + 2 * 2 and " ± " in table
    assert "| CIDEr | pointing | correctness | entropy |" in table
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert [(row["variant"], row["seed"]) for row in rows] == [("one", 0), ("one", 1), ("two", 0), ("two", 1)]
    assert rows[0]["parameters"] > rows[2]["parameters"] > 1000
    assert all(speed > 0 for row in rows for speed in (row["captions_per_second"], *row["photos_per_second"]))
    assert [scores["beam_size"] for scores in rows[0]["scores"]] == [1, 5]
    for unfinished in (False, True):
        if unfinished:
            (tmp_path / "one_seed0" / "row.json").unlink()
        status, _, error = command(compare_models, *common, "--variants", "one", "--no-hflip")
        assert status == 2 and "was trained with other settings" in error
    assert command(compare_models, *common, "--variants", "one")[0] == 0  # resumes the unfinished run
    assert (tmp_path / "one_seed0" / "row.json").exists()


def test_compare_models_names_bad_input(command, shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(compare_models, "VARIANTS", {"plain": {}})
    common = ("--data_folder", shapes, "--output_folder", tmp_path, "--epochs", 1, "--device", "cpu")
    status, _, error = command(compare_models, *common, "--variants", "plain", "--weights_folder", "missing")
    assert status == 2 and "--weights_folder missing: no such file: missing/resnet50.pth" in error
    assert "--variants three: choose from plain" in command(compare_models, *common, "--variants", "three")[2]


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("bench_train.py", "--encoder resnet18 --image_size 64 --batch_size 3 --vocab_size 50 --steps 2"),
        ("bench_caption.py", "--images 6 --max_length 5 --region_dim 32 --hidden_dim 32 --vocab_size 50 --repeats 1"),
        ("bench_data.py", "--num_photos 10 --image_size 64 --num_written 40 --coco_images 200 --repeats 1"),
    ],
)
def test_benchmark(script, arguments):
    device = [] if script == "bench_data.py" else ["--device", "cpu"]
    command = [sys.executable, str(BENCHMARKS / script), *arguments.split(), *device]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout.splitlines()[-1])
    if script == "bench_data.py":
        assert measured["ratio_500"] > 0 and measured["ratio_2000"] > 0
        assert measured["seconds_to_load_captions"] > 0 and 0 < measured["peak_gb_of_writing"] < 1
    else:
        assert measured["ratio"] > 0
    if script == "bench_train.py":
        assert measured["captions_per_second"] > 0 and 0 < measured["share_of_limit"] < 1
