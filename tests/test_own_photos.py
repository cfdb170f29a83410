"""The recipe of docs/data.md: from a folder of ten photos to their captions, with the commands as they stand there."""

import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from preparation.storage import read_captions

DOCUMENT = Path(__file__).parent.parent / "docs" / "data.md"
CAPTIONS = [f"a {color} {thing} here" for color in ("red", "old") for thing in ("dog", "cat", "cow", "hen", "pig")]
# A small random encoder, and a decoder that learns the photos in fewer epochs than one of the default size.
SMALL = "--encoder resnet18 --encoder_layer maxpool --encoder_weights= --grid_size 2 --region_dim 0 --embed_dim 32"
SMALL += " --hidden_dim 64 --dropout 0 --learning_rate 1e-2 --epochs 25 --device cpu --precision fp32"


def recipe():
    """The commands of the first block under "Your own photos in ten minutes"."""
    section = DOCUMENT.read_text(encoding="utf-8").split("## Your own photos in ten minutes")[1]
    block = re.findall(r"^```bash\n(.*?)^```", section, re.MULTILINE | re.DOTALL)[0]
    return [shlex.split(line)[1:] for line in block.splitlines()]


@pytest.mark.slow
def test_the_recipe_ends_in_the_captions_of_the_photos(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    generator = np.random.default_rng(0)
    for i, caption in enumerate(CAPTIONS):
        pixels = np.kron(generator.choice([0, 255], (2, 2, 3)), np.ones((30, 40, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.jpg")
        (tmp_path / "photos" / f"{i}.txt").write_text(caption)
    for script, *arguments in recipe():
        more = {"train.py": SMALL.split(), "caption.py": ["--no-pictures"]}.get(script, [])
        status, out, err = command(importlib.import_module(script.removesuffix(".py")), *arguments, *more)
        assert status == 0, err
    printed = dict(re.findall(r"^photos/(\d)\.jpg: (.*) \(log-probability", out, re.MULTILINE))
    assert len(printed) == len(CAPTIONS)
    entries, _ = read_captions(tmp_path / "data" / "mine", "train")
    learned = [int(entry["image"].removesuffix(".jpg")) for entry in entries]
    assert len(learned) == 8
    assert {i: printed[str(i)] for i in learned} == {i: CAPTIONS[i] for i in learned}
