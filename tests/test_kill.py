"""kill -9 at any moment of a run: it can always be resumed, and ends as if nothing had happened.

python -m pytest tests/test_kill.py --kills 20
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import h5py
import pytest
from PIL import Image
from test_resume import assert_same_run

import create_input_files
import train
from common.files import read_jsonl
from conftest import SMALL, flags
from preparation.storage import SPLITS, read_captions, read_metadata

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_the_whole_one(shapes, tmp_path, request):
    settings = replace(SMALL, data_folder=str(shapes), epochs=30, patience=30)
    train.main(replace(settings, run_folder=str(tmp_path / "whole")))
    start = [*flags(shapes, tmp_path / "parts"), "--epochs", "30", "--patience", "30", "--save_minutes", "0"]
    last, log = tmp_path / "parts" / "last.pt", tmp_path / "parts" / "log.jsonl"
    generator = random.Random(0)
    kills = request.config.getoption("--kills")
    for kill in range(kills + 1):
        arguments = ["--resume", str(last)] if last.exists() else start
        process = subprocess.Popen([sys.executable, train.__file__, *arguments], stderr=subprocess.PIPE, text=True)
        if kill < kills:  # early enough to leave epochs for the later kills
            goal = 30 * (kill + 1) / (kills + 2)
            while len(read_jsonl(log)) < goal and process.poll() is None:
                time.sleep(0.01)
            time.sleep(generator.random() / 2)
            process.kill()
        _, err = process.communicate()
        assert process.returncode == (-signal.SIGKILL if kill < kills else 0), err
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    # A kill may leave a temporary file, whose name starts with a dot.
    files = {path.name for path in last.parent.iterdir() if not path.name.startswith(".")}
    assert files - {"tensorboard"} == {"last.pt", "best.pt", "log.jsonl", "curves.png"}


# A program that sends itself a signal at the n-th call of a function: MODULE FUNCTION N SIGNAL, then train.py's flags.
DYING = """
import importlib, os, sys
import train, utils

module, name, call, number = importlib.import_module(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
original, calls = getattr(module, name), []

def dying(*arguments, **options):
    calls.append(1)
    if len(calls) == call:
        if name == "save":  # of torch, in the middle of the file
            arguments[1].write(b"half")
            arguments[1].flush()
        os.kill(os.getpid(), number)
    return original(*arguments, **options)

setattr(module, name, dying)
sys.argv = ["train.py", *sys.argv[5:]]
utils.run_script(train.main, train.Settings)
"""


def die(phase, number, arguments):
    """Run train.py until a signal ends it in a phase (module, function, call); return its status and last line."""
    command = [sys.executable, "-c", DYING, *map(str, phase), str(number), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    return result.returncode, (result.stderr.splitlines() or [""])[-1]


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        (("train", "train_step", 2), signal.SIGKILL),
        (("train", "validation_loss", 1), signal.SIGKILL),
        (("torch", "save", 2), signal.SIGKILL),  # last.pt
        (("torch", "save", 3), signal.SIGKILL),  # best.pt
        (("train", "append_jsonl", 1), signal.SIGKILL),
        (("train", "write_tensorboard", 2), signal.SIGKILL),
        (("train", "plot_curves", 2), signal.SIGKILL),
        (("train", "validation_loss", 1), signal.SIGTERM),  # finishes the validation first
    ],
)
@pytest.mark.slow
def test_a_run_ended_in_any_phase_says_how_to_go_on_and_does(shapes, run_folder, tmp_path, command, phase, number):
    last, arguments = tmp_path / "run" / "last.pt", flags(shapes, tmp_path / "run")
    status, line = die(phase, number, arguments)
    if number == signal.SIGTERM:
        message = f"stopped in epoch 2: continue with python train.py --resume {last}"
        assert status == 128 + number and line.endswith(message)
    else:
        assert status == -number
    status, _, err = command(train, *arguments)
    assert status == 2 and f"holds a run: continue it with --resume {last}" in err
    status, _, err = command(train, "--resume", last)
    assert status == 0, err
    assert_same_run(run_folder, last.parent)


@pytest.mark.slow
def test_preprocessing_killed_at_random_moments_never_leaves_half_a_folder(tmp_path, request):
    (tmp_path / "photos").mkdir()
    rows = ["file,caption"]
    for number in range(800):
        Image.effect_noise((96, 64), 60).save(tmp_path / "photos" / f"{number}.jpg")
        rows.append(f"{number}.jpg,photo number {number}")
    (tmp_path / "captions.csv").write_text("\n".join(rows))
    output, partial = tmp_path / "out", tmp_path / ".out.partial"
    command = [sys.executable, create_input_files.__file__, "--dataset", "own", "--captions", tmp_path / "captions.csv"]
    command += ["--images", tmp_path / "photos", "--image_size", "64", "--output_folder", output, "--overwrite"]

    def size(folder):
        """Bytes of the files in a folder, 0 where there is none."""
        return sum(os.path.getsize(entry) for entry in os.scandir(folder)) if folder.exists() else 0

    assert subprocess.run(command, capture_output=True).returncode == 0
    whole, bytes_of_all = {split: read_metadata(output)["splits"][split] for split in SPLITS}, size(output)
    generator, left = random.Random(0), 0
    for kill in range(request.config.getoption("--kills")):
        if kill % 2:
            shutil.rmtree(output)  # a first run; else one that would replace another
        process, goal = subprocess.Popen(command, stderr=subprocess.DEVNULL), generator.uniform(0, 0.8) * bytes_of_all
        while process.poll() is None:
            with contextlib.suppress(FileNotFoundError):  # a temporary file may just have gone
                if size(partial) > goal:
                    break
            time.sleep(0.001)
        process.kill()
        process.wait()
        left += partial.exists()
        if (output / "dataset.json").exists():
            metadata = read_metadata(output)
            assert {split: metadata["splits"][split] for split in SPLITS} == whole
            for split in SPLITS:
                with h5py.File(output / f"{split}_images.hdf5") as file:
                    assert len(read_captions(output, split)[0]) == len(file["images"])
        assert subprocess.run(command, capture_output=True).returncode == 0 and not partial.exists()
        assert {split: read_metadata(output)["splits"][split] for split in SPLITS} == whole
    assert left, "no run was killed while it wrote"
