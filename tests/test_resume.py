"""Interrupted and killed runs, and full disks: a resumed run equals an uninterrupted one."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import train
import utils
from common import distributed
from common.files import read_jsonl
from conftest import SMALL, flags, logged_epochs, weights
from training import start
from training.logs import write_tensorboard
from utils import InputError


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def assert_same_run(whole, parts):
    """Assert that two run folders hold the same weights and logs, except for times."""
    for name in ("last.pt", "best.pt"):
        assert_same_weights(weights(whole / name), weights(parts / name))
    for one, other in zip(read_jsonl(whole / "log.jsonl"), read_jsonl(parts / "log.jsonl"), strict=True):
        for name in one.keys() - {"seconds", "captions_per_second"}:
            assert one[name] == other[name], name


@pytest.mark.parametrize(("fine_tune", "precision"), [(True, "fp32"), (False, "bf16")])
@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(shapes, tmp_path, fine_tune, precision):
    folder = shutil.copytree(shapes, tmp_path / "copy", ignore=shutil.ignore_patterns("features"))
    settings = replace(
        SMALL,
        data_folder=str(folder),
        epochs=3,
        fine_tune_encoder=fine_tune,
        precision=precision,
        lr_schedule="step",  # a cosine would depend on the number of epochs
    )
    train.main(replace(settings, run_folder=str(tmp_path / "whole")))
    train.main(replace(settings, run_folder=str(tmp_path / "parts"), epochs=1))
    torch.rand(7)  # other draws in between
    train.main(train.Settings(resume=str(tmp_path / "parts" / "last.pt"), epochs=3))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_a_resumed_run_uses_the_device_that_was_saved_unless_one_is_given(command, run_folder, tmp_path, monkeypatch):
    """The device meta, which every machine has, stands for the CUDA device that "auto" would choose."""
    folder = shutil.copytree(run_folder, tmp_path / "run")
    original = utils.choose_device
    for module in (distributed, start):
        monkeypatch.setattr(module, "choose_device", lambda name: original("meta" if name == "auto" else name))
    devices = []
    monkeypatch.setattr(train, "start_run", lambda settings, checkpoint, device: devices.append(device) or stop())

    def stop():
        raise InputError("far enough")

    resume = ("--resume", folder / "last.pt", "--epochs", 3)
    for given, device in (((), "cpu"), (("--device", "auto"), "meta"), (("--device", "cpu"), "cpu")):
        _, _, err = command(train, *resume, *given)
        assert err.endswith("far enough\n") and devices.pop() == torch.device(device)


def test_a_saved_device_that_is_not_there_is_named(command, run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    checkpoint = torch.load(folder / "last.pt", weights_only=True)
    checkpoint["settings"]["device"] = "cuda:99"
    torch.save(checkpoint, folder / "last.pt")
    status, _, err = command(train, "--resume", folder / "last.pt", "--epochs", 3)
    assert status == 2 and err.count("\n") == 1 and "last.pt was trained with --device cuda:99: " in err, err


def after_step(monkeypatch, step, act):
    """Call `act` after this many training steps."""
    steps = []

    def acting(original):
        def take_step(*arguments):
            result = original(*arguments)
            steps.append(1)
            if len(steps) == step:
                act()
            return result

        return take_step

    for name in ("train_step", "scst_step"):
        monkeypatch.setattr(train, name, acting(getattr(train, name)))


@pytest.mark.parametrize(
    ("step", "workers", "number", "others"),  # within the first epoch of three steps, at its end, in the second
    [
        (2, 0, signal.SIGINT, {"objective": "scst", "gradient_accumulation_steps": 2}),
        (3, 0, signal.SIGTERM, {"scheduled_sampling_max_prob": 0.5, "attention": "hard", "graph_layers": 1}),
        (4, 2, signal.SIGTERM, {"hflip": True}),
    ],
)
@pytest.mark.slow
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
    assert status == 128 + number and err.splitlines()[-1].endswith(f"continue with python train.py --resume {last}")
    progress = torch.load(last, weights_only=True)["progress"]
    assert 3 * progress["epoch"] + progress["step"] == step
    train.main(train.Settings(resume=str(last)))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_a_run_folder_takes_one_process_at_a_time_and_a_signal_to_the_group_leaves_its_workers_alone(
    shapes, tmp_path, command
):
    folder, fresh = tmp_path / "run", flags(shapes, tmp_path / "run")
    running = [sys.executable, train.__file__, *fresh, "--workers", "2", "--epochs", "999", "--patience", "999"]
    with open(tmp_path / "errors", "w") as errors:
        process = subprocess.Popen(running, stderr=errors, start_new_session=True)
    while not read_jsonl(folder / "log.jsonl"):
        assert process.poll() is None
        time.sleep(0.05)
    for arguments in (fresh, [*fresh, "--overwrite"], ["--resume", folder / "last.pt"]):
        status, _, err = command(train, *arguments)
        assert status == 2 and f"{folder} is in use by another train.py: wait until it ends" in err, err
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", train.__file__, *fresh, "--overwrite"]
    result = subprocess.run([sys.executable, *launch], capture_output=True, text=True, timeout=300)
    assert result.stderr.count("train.py: error: ") == result.stderr.count("is in use by another train.py") == 2
    os.killpg(process.pid, signal.SIGTERM)
    status, err = process.wait(), (tmp_path / "errors").read_text()
    assert status == 128 + signal.SIGTERM and err.rstrip().endswith("last.pt"), err
    epochs = len(read_jsonl(folder / "log.jsonl")) + 1
    status, _, err = command(train, "--resume", folder / "last.pt", "--epochs", epochs)
    assert status == 0 and logged_epochs(folder) == list(range(1, epochs + 1)), err


def test_a_killed_run_goes_on_from_its_last_save_within_the_epoch(shapes, tmp_path, monkeypatch):
    class Killed(BaseException):
        """An exception that no code catches."""

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


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_disk_names_the_log(shapes, tmp_path, monkeypatch, command):
    monkeypatch.setattr(train, "append_jsonl", lambda _, row, original=train.append_jsonl: original("/dev/full", row))
    status, _, err = command(train, *flags(shapes, tmp_path / "run"))
    assert status == 2 and err.splitlines()[-1] == "train.py: error: /dev/full: No space left on device", err
    monkeypatch.undo()
    train.main(train.Settings(resume=str(tmp_path / "run" / "last.pt")))
    assert logged_epochs(tmp_path / "run") == [1, 2]


def test_a_full_disk_is_no_traceback_of_tensorboards_thread(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=None))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4096))
    with pytest.raises(OSError, match="No space left on device") as error:
        write_tensorboard(tmp_path / "tensorboard", {"epoch": 1}, lambda: ([], ""))
    assert error.value.filename == str(tmp_path / "tensorboard")


def test_a_torn_log_does_not_block_a_resumed_run(shapes, run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"epoch": 3, "lo')
    train.main(train.Settings(resume=str(folder / "last.pt"), epochs=3))
    assert logged_epochs(folder) == [1, 2, 3]
