"""The commands of benchmarks/record.py: the scripts take them, finished ones are not repeated, stopped ones resumed."""

import importlib
import itertools
from types import SimpleNamespace

import pytest
import record

import utils


@pytest.fixture
def run_record(command, monkeypatch, shapes, tmp_path):
    """Run record.py with scripts that only leave what they would: -> exit status, the commands that were run."""
    folder = tmp_path / "runs"
    failing = []

    def run(*arguments):
        commands = []

        def fake(command):
            script, flags = command[1].name, list(map(str, command[2:]))
            folder = "tools." if "tools" in command[1].parts else ""
            module = importlib.import_module(folder + script.removesuffix(".py"))
            utils.parse_settings(module.Settings, flags)  # each flag is one of the script's
            commands.append((script, flags))
            if script in failing:
                return SimpleNamespace(returncode=2)
            if script == "train.py" and "--run_folder" in flags:
                run_folder = record.Path(flags[flags.index("--run_folder") + 1])
                run_folder.mkdir(parents=True)
                (run_folder / "last.pt").touch()
            if "--output" in flags:
                output = record.Path(flags[flags.index("--output") + 1])
                output.parent.mkdir(exist_ok=True)
                output.touch()
            return SimpleNamespace(returncode=0)

        monkeypatch.setattr(record.subprocess, "run", fake)
        monkeypatch.setattr(record, "read_captions", read_training)
        fixed = ("--data_folder", shapes, "--output_folder", folder, "--epochs", 3, "--scst_epochs", 2)
        status, _, _ = command(record, *fixed, *arguments)
        return status, commands

    def read_training(data_folder, _, read=record.read_captions):  # shapes as small as these have no photos to validate
        return read(data_folder, "train")

    return SimpleNamespace(run=run, folder=folder, failing=failing)


def test_the_scripts_take_the_commands(run_record):
    status, commands = run_record.run("--seeds", 4, 5)
    assert status == 0
    scripts = [script for script, _ in commands]
    tools = ["average_checkpoints.py", "index_captions.py"]
    assert scripts == ["train.py"] * 3 + tools + ["eval.py"] * 6  # the folder is prepared already
    flags = [dict(itertools.pairwise(each)) for _, each in commands]
    assert flags[0]["--seed"] == "4" and flags[0]["--epochs"] == "3"
    for each, seed in zip(flags[1:3], "45", strict=True):
        assert each["--init_from"] == str(run_record.folder / "cross_entropy" / "best.pt")
        assert (each["--objective"], each["--epochs"], each["--seed"]) == ("scst", "2", seed)
    assert flags[-3]["--checkpoint"] == str(run_record.folder / "soup" / "best.pt")


def test_every_second_photo_is_in_each_half(run_record, shapes):
    run_record.run("--seeds", 0)
    halves = [(run_record.folder / f"{half}.txt").read_text().split("\n")[:-1] for half in record.HALVES]
    names = sorted(entry["image"] for entry in record.read_captions(shapes, "train").entries)
    assert halves == [names[::2], names[1::2]]


def test_what_is_finished_is_not_repeated_and_what_stopped_is_resumed(run_record):
    run_record.failing.append("eval.py")
    status, commands = run_record.run("--seeds", 0)
    assert status == 2 and [script for script, _ in commands] == ["train.py"] * 2 + ["index_captions.py", "eval.py"]
    run_record.failing.clear()
    (run_record.folder / "scst0" / record.FINISHED).unlink()  # as if it had been killed
    status, commands = run_record.run("--seeds", 0)
    assert status == 0
    resumed = ("train.py", ["--resume", str(run_record.folder / "scst0" / "last.pt")])
    assert commands[0] == resumed and all(script == "eval.py" for script, _ in commands[1:])


def test_one_training_needs_no_mean(run_record):
    status, commands = run_record.run("--seeds", 0)
    assert (
        status == 0 and [script for script, _ in commands] == ["train.py"] * 2 + ["index_captions.py"] + ["eval.py"] * 4
    )
