"""Runs that are interrupted, killed or out of disk, and go on as if nothing had happened."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, make_dataclass, replace
from types import SimpleNamespace

import pytest
import torch

import train
import utils
from common import distributed
from common.files import read_jsonl
from conftest import SMALL, flags, prepare_shapes, weights
from training import start
from training.logs import write_tensorboard
from training.start import merge_settings
from utils import InputError


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def assert_same_run(whole, parts):
    """Two run folders hold the same weights and the same log, times aside."""
    for name in ("last.pt", "best.pt"):
        assert_same_weights(weights(whole / name), weights(parts / name))
    for one, other in zip(read_jsonl(whole / "log.jsonl"), read_jsonl(parts / "log.jsonl"), strict=True):
        for name in one.keys() - {"seconds", "captions_per_second"}:
            assert one[name] == other[name], name


@pytest.mark.parametrize("fine_tune", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(shapes, tmp_path, fine_tune, precision):
    folder = shutil.copytree(shapes, tmp_path / "copy", ignore=shutil.ignore_patterns("features"))
    settings = replace(
        SMALL,
        data_folder=str(folder),
        epochs=3,
        fine_tune_encoder=fine_tune,
        precision=precision,
        lr_schedule="step",  # a cosine would know at the first epoch how many are to come
    )
    train.main(replace(settings, run_folder=str(tmp_path / "whole")))
    train.main(replace(settings, run_folder=str(tmp_path / "parts"), epochs=1))
    torch.rand(7)  # whatever happened in between
    train.main(train.Settings(resume=str(tmp_path / "parts" / "last.pt"), epochs=3))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_a_resumed_run_uses_the_device_that_was_saved_unless_one_is_given(command, run_folder, tmp_path, monkeypatch):
    """Where a device is there, "auto" takes it: here meta, a device that every machine has, stands for CUDA."""
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
    """Let training `act` after so many steps."""
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
    ("step", "workers", "number", "others"),  # in the first epoch of three steps, at its end, in the second
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
def test_a_signal_to_the_whole_group_leaves_the_workers_alone(shapes, tmp_path):
    arguments = [*flags(shapes, tmp_path / "run"), "--workers", "2", "--epochs", "99", "--patience", "99"]
    process = subprocess.Popen(
        [sys.executable, train.__file__, *arguments], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not read_jsonl(tmp_path / "run" / "log.jsonl"):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM and err.rstrip().endswith("last.pt"), err


@pytest.fixture
def running(shapes, tmp_path):
    """The folder of a run that another process trains, and that process."""
    arguments = [*flags(shapes, tmp_path / "run"), "--epochs", "999", "--patience", "999"]
    process = subprocess.Popen([sys.executable, train.__file__, *arguments], stderr=subprocess.DEVNULL)
    while not read_jsonl(tmp_path / "run" / "log.jsonl"):
        assert process.poll() is None
        time.sleep(0.05)
    yield tmp_path / "run", process
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_run_folder_takes_one_process_at_a_time(shapes, running, command):
    folder, process = running
    fresh = flags(shapes, folder)
    for arguments in (fresh, [*fresh, "--overwrite"], ["--resume", folder / "last.pt"]):
        status, _, err = command(train, *arguments)
        assert status == 2 and f"{folder} is in use by another train.py: wait until it ends" in err, err
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", train.__file__, *fresh, "--overwrite"]
    result = subprocess.run([sys.executable, *launch], capture_output=True, text=True, timeout=300)
    assert result.stderr.count("train.py: error: ") == result.stderr.count("is in use by another train.py") == 2
    process.kill()
    process.wait()
    epochs = len(read_jsonl(folder / "log.jsonl")) + 1
    status, _, err = command(train, "--resume", folder / "last.pt", "--epochs", epochs)
    assert status == 0 and resumed_epochs(folder) == list(range(1, epochs + 1)), err


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


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_disk_names_the_log(shapes, tmp_path, monkeypatch, command):
    monkeypatch.setattr(train, "append_jsonl", lambda _, row, original=train.append_jsonl: original("/dev/full", row))
    status, _, err = command(train, *flags(shapes, tmp_path / "run"))
    assert status == 2 and err.splitlines()[-1] == "train.py: error: /dev/full: No space left on device", err
    monkeypatch.undo()
    train.main(train.Settings(resume=str(tmp_path / "run" / "last.pt")))
    assert resumed_epochs(tmp_path / "run") == [1, 2]


def test_a_full_disk_is_no_traceback_of_tensorboards_thread(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=None))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4096))
    with pytest.raises(OSError, match="No space left on device") as error:
        write_tensorboard(tmp_path / "tensorboard", [{"epoch": 1}])
    assert error.value.filename == str(tmp_path / "tensorboard")


def test_a_torn_log_does_not_block_a_resumed_run(shapes, run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"epoch": 3, "lo')
    train.main(train.Settings(resume=str(folder / "last.pt"), epochs=3))
    assert [row["epoch"] for row in read_jsonl(folder / "log.jsonl")] == [1, 2, 3]


def test_merged_settings_take_what_was_not_given():
    checkpoint = {"settings": asdict(train.Settings(hidden_dim=7, epochs=3)), "defaults": asdict(train.Settings())}
    given = train.Settings(epochs=9)
    settings = merge_settings(given, checkpoint, "a.pt", ["hidden_dim", "epochs"], may_differ=["epochs"])
    assert (settings.hidden_dim, settings.epochs) == (7, 9)
    with pytest.raises(InputError, match=r"--epochs 9 does not go with a\.pt, which was trained with 3"):
        merge_settings(given, checkpoint, "a.pt", ["epochs"], may_differ=[])


def resumed_epochs(folder):
    """The epochs in the log of a run folder."""
    return [row["epoch"] for row in read_jsonl(folder / "log.jsonl")]


def test_a_flag_given_at_its_default_counts_when_resuming(command, shapes, run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    default = train.Settings().epochs
    status, _, err = command(train, "--resume", folder / "last.pt", "--epochs", default, "--patience", default)
    assert status == 0 and resumed_epochs(folder) == list(range(1, default + 1)), err


def test_an_edited_default_counts_when_resuming(monkeypatch, run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    edited = make_dataclass(  # as if the user had edited the top of train.py
        "Edited", [("epochs", int, 3)], bases=(train.Settings,), frozen=True
    )
    train.main(edited(resume=str(folder / "last.pt")))
    assert resumed_epochs(folder) == [1, 2, 3]


@pytest.mark.parametrize("name", ["hidden_dim", "dropout"])
def test_an_edited_default_that_makes_another_run_is_refused(run_folder, name):
    kind = type(getattr(train.Settings(), name))
    edited = make_dataclass("Edited", [(name, kind, kind(0.75) or 99)], bases=(train.Settings,), frozen=True)
    with pytest.raises(InputError, match=rf"--{name} \S+ does not go with .*last\.pt, which was trained with"):
        train.main(edited(resume=str(run_folder / "last.pt")))


def test_a_data_folder_given_at_its_default_counts_when_resuming(command, shapes, run_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    arguments = ("--resume", folder / "last.pt", "--epochs", 3, "--data_folder", train.Settings().data_folder)
    status, _, err = command(train, *arguments)
    assert status == 2 and f"{train.Settings().data_folder} is no data folder: give the one that" in err
    shutil.copytree(shapes, tmp_path / train.Settings().data_folder)
    status, _, err = command(train, *arguments)
    assert status == 0 and (tmp_path / "data").is_dir() and resumed_epochs(folder) == [1, 2, 3], err


@pytest.fixture(scope="module")
def other_data(tmp_path_factory):
    """A prepared folder of other shapes."""
    return prepare_shapes(tmp_path_factory.mktemp("other") / "shapes", num_scenes=25)


def test_other_data_is_refused_when_resuming(command, shapes, other_data, run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    before = (folder / "last.pt").read_bytes()
    status, _, err = command(train, "--resume", folder / "last.pt", "--epochs", 3, "--data_folder", other_data)
    assert status == 2 and f"{other_data} does not hold the data that" in err and f"trained on in {shapes}: " in err
    assert (folder / "last.pt").read_bytes() == before and resumed_epochs(folder) == [1, 2]


def test_data_prepared_again_is_refused_when_resuming(command, shapes, other_data, tmp_path):
    data = shutil.copytree(shapes, tmp_path / "data")
    train.main(replace(SMALL, data_folder=str(data), run_folder=str(tmp_path / "run"), epochs=1))
    shutil.rmtree(data)
    shutil.copytree(other_data, data)
    status, _, err = command(train, "--resume", tmp_path / "run" / "last.pt", "--epochs", 2)
    assert status == 2 and f"{data} does not hold the data that" in err


def test_a_run_finds_its_data_from_another_working_directory(command, shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shapes, "data/shapes")
    arguments = flags("data/shapes", "runs/small", replace(SMALL, fine_tune_encoder=False, features_folder="cache"))
    assert command(train, *arguments, "--epochs", 1)[0] == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    status, _, err = command(train, "--resume", "../runs/small/last.pt", "--epochs", 2)
    assert status == 0 and resumed_epochs(tmp_path / "runs" / "small") == [1, 2], err
    assert not list((tmp_path / "elsewhere").iterdir())
    shutil.move(tmp_path / "data", tmp_path / "moved")
    status, _, err = command(train, "--resume", "../runs/small/last.pt", "--epochs", 3)
    assert (
        status == 2 and f"the one that ../runs/small/last.pt was trained on, {tmp_path}/data/shapes, as --data" in err
    )
    arguments = ("--epochs", 3, "--data_folder", "../moved/shapes")
    status, _, err = command(train, "--resume", "../runs/small/last.pt", *arguments)
    assert status == 0 and resumed_epochs(tmp_path / "runs" / "small") == [1, 2, 3], err


def test_a_resume_elsewhere_does_not_break_the_next_at_home(command, shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shapes, "data")
    assert command(train, *flags("data", "run"), "--epochs", 1)[0] == 0
    shutil.copytree("data", "copy")
    assert command(train, "--resume", "run/last.pt", "--epochs", 2, "--data_folder", "copy")[0] == 0
    shutil.rmtree("copy")
    status, _, err = command(train, "--resume", "run/last.pt", "--epochs", 3)
    assert status == 0 and resumed_epochs(tmp_path / "run") == [1, 2, 3], err


def test_another_run_folder_is_refused_when_resuming(command, run_folder, tmp_path):
    status, _, err = command(train, "--resume", run_folder / "last.pt", "--run_folder", tmp_path / "other")
    assert status == 2 and "--resume continues in" in err and not (tmp_path / "other").exists()


@pytest.mark.parametrize(("flag", "value"), [("dropout", 0.5), ("dropout", 0.25)])
def test_init_from_takes_settings_that_no_weight_depends_on(command, shapes, run_folder, tmp_path, flag, value):
    arguments = ("--data_folder", shapes, "--run_folder", tmp_path / "run", "--init_from", run_folder / "best.pt")
    status, _, err = command(train, *arguments, "--epochs", 1, "--max_length", 6, f"--{flag}", value)
    assert status == 0, err
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert best["settings"][flag] == best["model_settings"][flag] == value


@pytest.mark.parametrize("start", ["--init_from", "--resume"])
def test_flags_of_layers_that_are_not_there_are_refused_from_a_checkpoint_too(
    command, shapes, run_folder, tmp_path, start
):
    checkpoint = run_folder / ("best.pt" if start == "--init_from" else "last.pt")
    arguments = (start, checkpoint, "--graph_edges", "grid", "--epochs", 9)
    arguments += ("--data_folder", shapes, "--run_folder", tmp_path / "run") * (start == "--init_from")
    status, _, err = command(train, *arguments)
    assert status == 2 and "--graph_edges is a setting of --graph_layers: give --graph_layers, too" in err, err


def test_a_checkpoint_may_be_older_than_a_setting(command, shapes, run_folder, tmp_path):
    checkpoint = torch.load(run_folder / "best.pt", weights_only=True)
    for key in ("settings", "defaults"):
        del checkpoint[key]["features_folder"]
    torch.save(checkpoint, tmp_path / "old.pt")
    arguments = ("--data_folder", shapes, "--run_folder", tmp_path / "run", "--init_from", tmp_path / "old.pt")
    status, _, err = command(train, *arguments, "--epochs", 1, "--max_length", 6)
    assert status == 0, err


@pytest.mark.parametrize(("flag", "value"), [("hidden_dim", 512), ("cell", "gru"), ("attention", "dot")])
def test_init_from_refuses_settings_that_the_weights_depend_on(command, shapes, run_folder, tmp_path, flag, value):
    arguments = ("--data_folder", shapes, "--run_folder", tmp_path / "run", "--init_from", run_folder / "best.pt")
    status, _, err = command(train, *arguments, "--dropout", 0.25, f"--{flag}", value)
    assert status == 2 and f"--{flag} {value} does not go with" in err and not (tmp_path / "run").exists(), err


def test_a_run_that_started_from_another_is_resumed_with_its_origin(command, shapes, run_folder, tmp_path):
    best, last = run_folder / "best.pt", tmp_path / "run" / "last.pt"
    arguments = ("--data_folder", shapes, "--run_folder", tmp_path / "run", "--init_from", best, "--max_length", 6)
    assert command(train, *arguments, "--freeze_embeddings", "--epochs", 1)[0] == 0
    status, _, err = command(train, "--resume", last, "--epochs", 2)
    assert status == 0 and torch.load(last, weights_only=True)["settings"]["init_from"] == str(best), err


@pytest.mark.parametrize(("name", "value"), [("run_folder", "runs/next"), ("encoder_weights", "resnet101.pth")])
def test_an_edited_default_of_a_path_blocks_no_resume(run_folder, tmp_path, name, value):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    edited = make_dataclass("Edited", [(name, str, value), ("epochs", int, 3)], bases=(train.Settings,), frozen=True)
    train.main(edited(resume=str(folder / "last.pt")))
    assert resumed_epochs(folder) == [1, 2, 3]


def test_a_setting_that_differs_from_the_runs_is_printed(capsys, run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    train.main(train.Settings(resume=str(folder / "last.pt"), epochs=3))
    assert "epochs is 3, where " in capsys.readouterr().out
