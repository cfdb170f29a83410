"""Runs that are interrupted, killed or out of disk, and go on as if nothing had happened."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch

import train
from conftest import SMALL, flags, weights
from runs import settings_from
from utils import InputError, read_log


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def assert_same_run(whole, parts):
    """Two run folders hold the same weights and the same log, times aside."""
    for name in ("last.pt", "best.pt"):
        assert_same_weights(weights(whole / name), weights(parts / name))
    for one, other in zip(read_log(whole / "log.jsonl"), read_log(parts / "log.jsonl"), strict=True):
        for name in one.keys() - {"seconds", "captions_per_second", "images_per_second"}:
            assert one[name] == other[name], name


@pytest.mark.parametrize("fine_tune", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(shapes, tmp_path, fine_tune, precision):
    folder = shutil.copytree(shapes, tmp_path / "copy", ignore=shutil.ignore_patterns("features"))
    settings = replace(
        SMALL,
        data_folder=str(folder),
        epochs=3,
        fine_tune_encoder=fine_tune,
        precision=precision,
        schedule="step",  # a cosine would know at the first epoch how many are to come
    )
    train.main(replace(settings, run_folder=str(tmp_path / "whole")))
    train.main(replace(settings, run_folder=str(tmp_path / "parts"), epochs=1))
    torch.rand(7)  # whatever happened in between
    train.main(train.Settings(resume=str(tmp_path / "parts" / "last.pt"), epochs=3))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def after_step(monkeypatch, step, act):
    """Let training `act` after so many steps."""
    steps = []

    def acting(*arguments, original=train.train_step):
        result = original(*arguments)
        steps.append(1)
        if len(steps) == step:
            act()
        return result

    monkeypatch.setattr(train, "train_step", acting)


@pytest.mark.parametrize(
    ("step", "workers", "number", "others"),  # in the first epoch of three steps, at its end, in the second
    [
        (2, 0, signal.SIGINT, {"objective": "cider", "accumulate": 2}),
        (3, 0, signal.SIGTERM, {"scheduled_sampling": 0.5, "attention": "hard", "graph_layers": 1}),
        (4, 2, signal.SIGTERM, {"mirror": True}),
    ],
)
def test_a_signal_saves_the_epoch_under_way_and_the_resumed_run_equals_the_whole(
    shapes, run_folder, tmp_path, monkeypatch, command, request, step, workers, number, others
):
    former = signal.signal(number, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
    request.addfinalizer(lambda: signal.signal(number, former))
    if "objective" in others:
        others["init_from"] = str(run_folder / "best.pt")
    settings = replace(SMALL, data_folder=str(shapes), workers=workers, **others)
    train.main(replace(settings, run_folder=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        after_step(patch, step, lambda: signal.raise_signal(number))
        status, _, err = command(train, *flags(shapes, tmp_path / "parts", settings))
    last = tmp_path / "parts" / "last.pt"
    assert status == 128 + number and err.splitlines()[-1].endswith(f"python train.py --resume {last} goes on")
    progress = torch.load(last, weights_only=True)["progress"]
    assert 3 * progress["epoch"] + progress["step"] == step
    train.main(train.Settings(resume=str(last)))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_signal_to_the_whole_group_leaves_the_workers_alone(shapes, tmp_path):
    arguments = [*flags(shapes, tmp_path / "run"), "--workers", "2", "--epochs", "99", "--patience", "99"]
    process = subprocess.Popen(
        [sys.executable, train.__file__, *arguments], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not read_log(tmp_path / "run" / "log.jsonl"):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM and err.rstrip().endswith("goes on"), err


def test_a_killed_run_goes_on_from_its_last_save_within_the_epoch(shapes, tmp_path, monkeypatch):
    class Killed(BaseException):
        """What no code catches."""

    def kill():
        raise Killed

    settings = replace(SMALL, data_folder=str(shapes), save_minutes=0.0)  # before every step
    train.main(replace(settings, run_folder=str(tmp_path / "whole")))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        after_step(patch, 5, kill)
        train.main(replace(settings, run_folder=str(tmp_path / "parts")))
    progress = torch.load(tmp_path / "parts" / "last.pt", weights_only=True)["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 1)
    train.main(train.Settings(resume=str(tmp_path / "parts" / "last.pt")))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(shapes, run_folder, tmp_path, monkeypatch, command):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    before = (folder / "last.pt").read_bytes()

    def full(checkpoint, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", file.name)

    monkeypatch.setattr(torch, "save", full)
    status, _, err = command(train, "--resume", folder / "last.pt", "--epochs", 3)
    assert status == 2 and err.splitlines()[-1].endswith("No space left on device"), err
    assert (folder / "last.pt").read_bytes() == before and not list(folder.glob(".*"))


def test_a_torn_log_does_not_block_a_resumed_run(shapes, run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"epoch": 3, "lo')
    train.main(train.Settings(resume=str(folder / "last.pt"), epochs=3))
    assert [row["epoch"] for row in read_log(folder / "log.jsonl")] == [1, 2, 3]


def test_settings_from_takes_what_was_not_given():
    checkpoint = {"settings": asdict(train.Settings(hidden_size=7, epochs=3))}
    given = replace(train.Settings(), epochs=9)
    settings = settings_from(checkpoint, "a.pt", given, ["hidden_size", "epochs"], free=["epochs"])
    assert (settings.hidden_size, settings.epochs) == (7, 9)
    with pytest.raises(InputError, match=r"--epochs 9 does not go with a\.pt, which was trained with 3"):
        settings_from(checkpoint, "a.pt", given, ["epochs"])
