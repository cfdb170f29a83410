"""A user's own ten photos: the recipe of docs/data.md as it stands there, and paths."""

import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import create_input_files
import train
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


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """The folder of ten photos, each with a caption beside it; its parent is the working directory."""
    monkeypatch.chdir(tmp_path)
    folder, generator = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for i, caption in enumerate(CAPTIONS):
        pixels = np.kron(generator.choice([0, 255], (2, 2, 3)), np.ones((30, 40, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
        (folder / f"{i}.txt").write_text(caption)
    return folder


@pytest.mark.slow
def test_the_recipe_ends_in_the_captions_of_the_photos(command, photos, monkeypatch):
    monkeypatch.setattr(train, "plot_curves", lambda *_: None)  # half a second an epoch
    for script, *arguments in recipe():
        more = {"train.py": SMALL.split(), "caption.py": ["--no-pictures"]}.get(script, [])
        status, out, err = command(importlib.import_module(script.removesuffix(".py")), *arguments, *more)
        assert status == 0, err
    printed = dict(re.findall(r"^photos/(\d)\.jpg: (.*) \(log-probability", out, re.MULTILINE))
    assert len(printed) == len(CAPTIONS)
    learned = [int(entry["image"].removesuffix(".jpg")) for entry in read_captions("data/mine", "train")[0]]
    assert len(learned) == 8
    assert {i: printed[str(i)] for i in learned} == {i: CAPTIONS[i] for i in learned}


def test_a_path_with_spaces_is_quoted_where_it_is_to_be_typed(command, photos):
    arguments = ("--dataset", "mine", "--captions", photos, "--image_size", 8, "--output_folder", "my data")
    status, out, _ = command(create_input_files, *arguments)
    command_line = out.splitlines()[-1].split("is ready: ")[1]
    assert status == 0 and shlex.split(command_line) == ["python", "train.py", "--data_folder", "my data"]


def test_a_quoted_home_folder_is_found(command, photos, monkeypatch):
    monkeypatch.setenv("HOME", str(photos.parent))
    arguments = ("--dataset", "mine", "--captions", "~/photos", "--image_size", 8, "--output_folder", "~/new")
    assert command(create_input_files, *arguments)[0] == 0
    assert (photos.parent / "new" / "dataset.json").is_file()
    assert command(create_input_files, "--preview", "~/new")[0] == 0
