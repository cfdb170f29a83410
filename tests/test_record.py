"""The commands of benchmarks/record.py: the scripts take them, finished ones are not repeated, stopped ones resumed."""

import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import record

import eval as eval_script
import train
import utils
from utils import parse_settings


@pytest.fixture
def run_record(command, monkeypatch, shapes, tmp_path):
    """Run record.py with scripts that only leave the files that they would: -> exit status, stderr, their commands."""
    folder = tmp_path / "runs"
    failing: dict[str, int] = {}  # scripts with their exit status

    def run(*arguments, data_folder=shapes):
        commands = []

        def fake(command):
            script, flags = command[0], command[1:]
            module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
            settings = utils.parse_settings(module.Settings, flags)  # each flag is one of the script's
            commands.append((script, flags))
            if script in failing:
                return failing[script]
            outputs = [Path(settings.output)] if script.startswith("tools") else []
            if script == "create_input_files.py":
                Path(settings.output_folder).symlink_to(shapes)
            if script == "train.py" and not settings.resume:
                outputs = [Path(settings.run_folder) / name for name in ("last.pt", "best.pt")]
            if script == "eval.py":
                outputs = [eval_script.output_path(settings, "scores_per_image")]
            for path in outputs:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            return 0

        monkeypatch.setattr(record, "run", fake)
        monkeypatch.setattr(record, "read_captions", read_training)
        fixed = ("--data_folder", data_folder, "--output_folder", folder, "--epochs", 3, "--scst_epochs", 2)
        status, _, err = command(record, *fixed, *arguments)
        return status, err, commands

    def read_training(data_folder, _, read=record.read_captions):  # shapes as small as these have no photos to validate
        return read(data_folder, "train")

    return SimpleNamespace(run=run, folder=folder, failing=failing)


def scripts(commands):
    return [script for script, _ in commands]


def test_the_scripts_take_the_commands(run_record):
    status, err, commands = run_record.run("--seeds", 4, 5)
    assert status == 0, err
    tools = ["tools/average_checkpoints.py", "tools/index_captions.py"]
    assert scripts(commands) == ["train.py"] * 3 + tools + ["eval.py"] * 6  # the folder is prepared already
    flags = [dict(itertools.pairwise(each)) for _, each in commands]
    assert flags[0]["--seed"] == "4" and flags[0]["--epochs"] == "3"
    for each, seed in zip(flags[1:3], "45", strict=True):
        assert each["--init_from"] == str(run_record.folder / "cross_entropy" / "best.pt")
        settings = parse_settings(train.Settings, commands[int(seed) - 3][1])
        assert (settings.objective, settings.epochs, settings.seed, settings.hflip) == ("scst", 2, int(seed), True)
        assert "attention_dim" not in settings.given  # the start's sizes
    assert parse_settings(train.Settings, commands[0][1]).attention_dim == 64
    assert flags[-3]["--checkpoint"] == str(run_record.folder / "soup" / "best.pt")
    best = commands[-3][1]
    views = best.index("--views")
    assert best[views + 1 : views + 4] == ["original", "hflip", "crop"] and flags[-3]["--beam_sizes"] == "10"
    assert flags[-3]["--consensus_index"] == str(run_record.folder / "consensus.pt")


def test_one_training_needs_no_mean_and_every_second_photo_is_in_each_half(run_record, shapes):
    status, _, commands = run_record.run("--seeds", 0)
    assert status == 0
    assert scripts(commands) == ["train.py"] * 2 + ["tools/index_captions.py"] + ["eval.py"] * 4
    halves = [(run_record.folder / f"{half}.txt").read_text().split("\n")[:-1] for half in record.HALVES]
    names = sorted(entry["image"] for entry in record.read_captions(shapes, "train").entries)
    assert halves == [names[::2], names[1::2]]


def test_what_is_finished_is_not_repeated_and_what_stopped_is_resumed(run_record, tmp_path):
    new = tmp_path / "prepared"  # becomes a link, whose own name the files of the scores do not have
    run_record.failing["eval.py"] = 2
    status, _, commands = run_record.run("--seeds", 0, data_folder=new)
    first = ["create_input_files.py", "train.py", "train.py", "tools/index_captions.py", "eval.py"]
    assert status == 2 and scripts(commands) == first
    run_record.failing.clear()
    (run_record.folder / "scst0" / record.FINISHED).unlink()  # as if it had been killed
    status, err, commands = run_record.run("--seeds", 0, data_folder=new)
    assert status == 0, err
    assert commands[0] == ("train.py", ["--resume", str(run_record.folder / "scst0" / "last.pt")])
    assert scripts(commands[1:]) == ["eval.py"] * 4
    assert run_record.run("--seeds", 0, data_folder=new) == (0, "", [])


def test_other_settings_need_another_folder(run_record):
    run_record.run("--seeds", 0, 1)
    for arguments, named in (
        (("--seeds", 0, 1, 2), "seeds [0, 1]"),
        (("--seeds", 0, 1, "--encoder", "vgg16"), "encoder"),
    ):
        status, err, commands = run_record.run(*arguments)
        assert status == 2 and f"--{named}" in err and "another --output_folder" in err and not commands
    assert run_record.run("--seeds", 0, 1, "--captions", "moved.json") == (0, "", [])
    assert json.loads((run_record.folder / "settings.json").read_text())["seeds"] == [0, 1]


def test_a_mistake_at_the_start_may_be_corrected(run_record):
    run_record.failing["train.py"] = 2
    assert run_record.run("--encoder_weights", "typo.pth")[0] == 2
    run_record.failing.clear()
    assert run_record.run("--encoder_weights", "right.pth")[0] == 0


def test_a_seed_is_given_once(run_record):
    status, err, commands = run_record.run("--seeds", 1, 1)
    assert status == 2 and "--seeds 1 1: give each seed only once" in err and not commands


def test_a_killed_script_is_named(run_record):
    run_record.failing["train.py"] = -signal.SIGKILL
    status, err, _ = run_record.run()
    assert status == 128 + signal.SIGKILL and err == "train.py was killed by signal 9: start again to continue\n"


def test_an_interrupted_script_has_the_time_to_save(tmp_path):
    """Ctrl-C reaches both processes: record.py waits for the script."""
    script = tmp_path / "slow.py"
    script.write_text(
        "import pathlib, time\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "try:\n    (folder / 'ready').touch()\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    time.sleep(1)\n    (folder / 'saved').touch()\n    raise SystemExit(130)\n"
    )
    program = f"import sys; sys.path[:0] = {sys.path!r}; import record; sys.exit(record.run([{str(script)!r}]))"
    process = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    while not (tmp_path / "ready").exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) == 130 and (tmp_path / "saved").exists()
