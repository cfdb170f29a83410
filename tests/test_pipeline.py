"""The four scripts in order, each in a process of its own, as a user runs them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent


def run(folder, script, *arguments):
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_from_shapes_to_a_captioned_photo(tmp_path):
    run(tmp_path, "create_input_files.py", "--image_size", 32, "--num_scenes", 40)
    small = ("--hidden_dim", 32, "--embed_dim", 32, "--attention_dim", 32, "--epochs", 3, "--batch_size", 8)
    encoder = ("--encoder", "resnet18", "--encoder_layer", "layer1", "--encoder_weights", "", "--fine_tune_encoder")
    out = run(tmp_path, "train.py", *encoder, *small, "--workers", 2, "--learning_rate", "5e-3")
    assert "best cider" in out
    losses = [json.loads(line)["train/loss"] for line in (tmp_path / "runs/shapes/log.jsonl").read_text().splitlines()]
    assert losses[2] < losses[0]
    assert "| 5 |" in run(tmp_path, "eval.py")
    out = run(tmp_path, "caption.py", "data/shapes/photos/test_00044.png")
    assert "log-probability" in out and Image.open(tmp_path / "captions/test_00044_attention.png").size > (300, 100)
