"""Random flags of the four scripts: each command gives a result, or one line, and leaves nothing half-written.

The values are valid ones, extremes and nonsense, drawn by the type of each setting, so a new setting is tried without a
change here. `SAFE` keeps what succeeds small: a handful of scenes, an epoch, a tiny network.
"""

import io
import json
import random
import re
import shutil
import sys
import warnings
from dataclasses import fields, replace
from typing import get_args, get_origin, get_type_hints

import h5py
import pytest
import torch
from PIL import Image

import caption
import create_input_files
import eval as evaluation_script
import train
from conftest import SMALL, prepare_shapes
from models import load_checkpoint

SCRIPTS = {"create_input_files": create_input_files, "train": train, "eval": evaluation_script, "caption": caption}
# Values of settings whose extremes would only take long or much memory, which is what they ask for.
SAFE = {
    "epochs": [1, 2],
    "num_scenes": [1, 2, 5],
    "workers": [0, 1],
    "beam_size": [1, 2, 50],
    "beam_sizes": [1, 2, 50],
    "n_best": [1, 2, 3],
    "max_length": [1, 2, 40],
    "image_size": [8, 32, 33],
    "encoder": ["squeezenet1_1", "resnet18", "vit_b_32", "fasterrcnn_resnet50_fpn", "resnet"],
    "encoder_layer": ["features.3", "", "layer1", "classifier", "features.3.squeeze", "features.99"],
    "graph_layers": [0, 1, 2],
    "grid_size": [0, 1, 3, 33],
    "region_dim": [0, 1, 8],
    "show": [False],
}
NONSENSE = {
    int: ["-1", "0", "-1", "0", "1e400", "x"],
    float: ["-1", "nan", "inf", "-inf", "1e400", "1e-300", "1", "2", "x"],
    str: ["", "missing", "no/such/folder", "é 猫", "~", "-x", "\n", "a" * 300, "/dev/null"],
}
HUGE = {int: ["999999999999999", "-999999999999999", "1" * 30], float: ["1e30"], str: []}


def values(field, kind):
    """Valid values of a setting of a type, and nonsense."""
    name = field.name
    if choices := field.metadata.get("choices"):
        return list(choices), ["", "x"]
    if get_origin(kind) is tuple:
        kind = get_args(kind)[0]
    valid = {int: [1, 2, 3], float: [0, 0.1, 0.5, 0.9], str: [""]}[kind]
    huge = [] if name in ("num_scenes", "epochs", "workers", "max_length", "beam_size", "beam_sizes") else HUGE[kind]
    return SAFE.get(name, valid), NONSENSE[kind] + huge


def random_flags(rng, settings_class, paths):
    """Between none and seven random flags of a script; `paths` are those that its settings of text draw from, too."""
    hints, flags = get_type_hints(settings_class), []
    left_out = ("photos", *settings_class.NOT_FLAGS)
    chosen = rng.sample([field for field in fields(settings_class) if field.name not in left_out], rng.randrange(8))
    share = rng.choice([0.0, 0.2, 0.8])  # of nonsense
    for field in chosen:
        name, kind = field.name, hints[field.name]
        if kind is bool:
            flags.append(f"--{rng.choice(['', 'no-'])}{name}" if name != "show" else "--no-show")
            continue
        valid, nonsense = values(field, kind)
        is_path = kind in (str, tuple[str, ...]) and name not in ("encoder", "encoder_layer", "device")
        if is_path and not field.metadata.get("choices"):
            valid, nonsense = paths.get(name, [""]), nonsense + [path for paths_ in paths.values() for path in paths_]
        drawn = [str(rng.choice(nonsense if rng.random() < share else valid)) for _ in range(rng.choice([1, 1, 2]))]
        flags += [f"--{name}", *drawn] if get_origin(kind) is tuple else [f"--{name}={drawn[0]}"]
    return flags


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a prepared folder (data), a run of it (run), photos and a file of the user."""
    folder = tmp_path_factory.mktemp("base")
    prepare_shapes(folder / "data", num_scenes=3)
    small = replace(SMALL, encoder="squeezenet1_1", encoder_layer="features.3", epochs=1, graph_layers=1)
    train.main(replace(small, data_folder=str(folder / "data"), run_folder=str(folder / "run")))
    photos = folder / "photos"
    photos.mkdir()
    for i, name in enumerate(("a.jpg", "b.png", "猫.png")):
        Image.new("RGB", (40 + 10 * i, 30), ("red", "green", "blue")[i]).save(photos / name)
    (photos / "broken.jpg").write_bytes(b"no photo")
    captions = [f"{name},a photo of {name[0]}" for name in ("a.jpg", "b.png", "猫.png")]
    (folder / "captions.txt").write_text("\n".join(["image,caption", *captions]), encoding="utf-8")
    (folder / "mine.txt").write_text("mine")
    return folder


def start_flags(script, rng):
    """Flags that make a script small, before the random ones, which may give them again."""
    if script == "create_input_files":
        dataset = [] if rng.random() < 0.6 else ["--dataset", "own", "--captions", "captions.txt", "--images", "photos"]
        return ["--output_folder", rng.choice(["out", "data"]), "--num_scenes", "2", "--image_size", "32", *dataset]
    if script == "train":
        small = {name: getattr(SMALL, name) for name in ("region_dim", "embed_dim", "attention_dim", "hidden_dim")}
        small |= {"data_folder": "data", "run_folder": rng.choice(["out", "run"]), "encoder": "squeezenet1_1"}
        small |= {"encoder_layer": "features.3", "encoder_weights": "", "epochs": 1, "max_length": 6}
        start = rng.choice([[], [], ["--resume", "run/last.pt", "--epochs", "2"], ["--init_from", "run/best.pt"]])
        names = set() if start[:1] == ["--resume"] else small
        return [word for name in names for word in (f"--{name}", str(small[name]))] + start
    if script == "eval":
        return ["--checkpoint", "run/best.pt", "--data_folder", "data", "--max_length", "6", "--beam_sizes", "1"]
    photos = rng.sample(
        ["photos/a.jpg", "photos/b.png", "photos/猫.png", "photos/broken.jpg", "photos", "missing.png"], 2
    )
    return [photos[0], *photos[1 : rng.randrange(1, 3)], "--checkpoint", "run/best.pt", "--max_length", "6"]


PATHS = {
    "data_folder": ["data", "out"],
    "run_folder": ["out", "run", "other/deep"],
    "output_folder": ["out", "other/deep", "run", "photos"],
    "features_folder": ["", "features"],
    "resume": ["", "run/last.pt", "run/best.pt"],
    "init_from": ["", "run/best.pt", "run/last.pt"],
    "checkpoint": ["run/best.pt", "run/last.pt"],
    "plot": ["run"],
    "preview": ["", "data"],
    "captions": ["captions.txt", "photos"],
    "images": ["photos"],
    "dataset": ["shapes", "own"],
    "graph_word": ["a", ""],
    "odd": ["mine.txt", "mine.txt/x", "data/dataset.json", "photos/a.jpg", "."],
}


def run_once(seed, script, base, folder, command, monkeypatch):
    """Run a script with the random flags of a seed in a copy of the base folder, check it, and return its status."""
    rng = random.Random(f"{script} {seed}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setattr(sys, "stdin", io.StringIO("photos/a.jpg\n"))
    module = SCRIPTS[script]
    arguments = [*start_flags(script, rng), *random_flags(rng, module.Settings, PATHS)]
    described = f"seed {seed}: {script}.py {arguments}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            status, _, errors = command(module, *arguments)
    except BaseException as error:
        raise AssertionError(f"{described}: {type(error).__name__}: {error}") from error
    errors = re.sub(r"[^\n]*\r[^\n]*\n?|METEOR is left out.*\n", "", errors).strip().splitlines()  # no progress bars
    assert status in ((0, 1, 2) if script == "caption" else (0, 2)), described
    listed = "--skip_broken" in arguments  # the photos that were skipped, before the line
    assert status != 2 or len(errors) == 1 or listed, f"{described}: {errors}"
    check_files(folder, described)
    return status


def check_files(folder, described):
    """Assert that what lies in a folder is complete, that nothing temporary does, and that the user's file is there."""
    assert (folder / "mine.txt").read_text() == "mine", described
    for path in folder.rglob("*"):
        assert "partial" not in path.name and path.name != ".lock", f"{described}: {path}"
        if path.suffix == ".pt" and path.is_file():
            load_checkpoint(path)
        elif path.suffix == ".jsonl" and path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                json.loads(line)
        elif path.suffix == ".json" and path.is_file():
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".png" and path.is_file():
            Image.open(path).load()
        elif path.suffix == ".hdf5":
            h5py.File(path).close()
        if path.name == "dataset.json":
            assert (path.parent / "train_images.hdf5").is_file(), f"{described}: {path}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_random_flags_give_a_result_or_one_line(script, base, tmp_path, command, monkeypatch, pytestconfig):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(evaluation_script, "has_java", lambda: False)  # METEOR takes seconds
    seeds = range(pytestconfig.getoption("--commands"))
    statuses = [run_once(seed, script, base, tmp_path / "copy", command, monkeypatch) for seed in seeds]
    assert 0 in statuses
