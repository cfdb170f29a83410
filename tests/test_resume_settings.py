"""Settings and data of runs that go on from a checkpoint: what --resume and --init_from take over, and refuse."""

import shutil
from dataclasses import asdict, make_dataclass, replace

import pytest
import torch

import train
from conftest import SMALL, flags, logged_epochs, prepare_shapes
from training.start import merge_settings
from utils import InputError


def test_merged_settings_take_what_was_not_given():
    checkpoint = {"settings": asdict(train.Settings(hidden_dim=7, epochs=3)), "defaults": asdict(train.Settings())}
    given = train.Settings(epochs=9)
    settings = merge_settings(given, checkpoint, "a.pt", ["hidden_dim", "epochs"], may_differ=["epochs"])
    assert (settings.hidden_dim, settings.epochs) == (7, 9)
    with pytest.raises(InputError, match=r"--epochs 9 does not go with a\.pt, which was trained with 3"):
        merge_settings(given, checkpoint, "a.pt", ["epochs"], may_differ=[])


def test_a_flag_given_at_its_default_counts_when_resuming(command, shapes, run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    default = train.Settings().epochs
    status, _, err = command(train, "--resume", folder / "last.pt", "--epochs", default, "--patience", default)
    assert status == 0 and logged_epochs(folder) == list(range(1, default + 1)), err


def test_an_edited_default_counts_when_resuming(monkeypatch, run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    edited = make_dataclass(  # as if the user had edited the top of train.py
        "Edited", [("epochs", int, 3)], bases=(train.Settings,), frozen=True
    )
    train.main(edited(resume=str(folder / "last.pt")))
    assert logged_epochs(folder) == [1, 2, 3]


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
    assert status == 0 and (tmp_path / "data").is_dir() and logged_epochs(folder) == [1, 2, 3], err


@pytest.fixture(scope="module")
def other_data(tmp_path_factory):
    """A prepared folder of other shapes."""
    return prepare_shapes(tmp_path_factory.mktemp("other") / "shapes", num_scenes=25)


def test_other_data_is_refused_when_resuming(command, shapes, other_data, run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    before = (folder / "last.pt").read_bytes()
    status, _, err = command(train, "--resume", folder / "last.pt", "--epochs", 3, "--data_folder", other_data)
    assert status == 2 and f"{other_data} does not hold the data that" in err and f"trained on in {shapes}: " in err
    assert (folder / "last.pt").read_bytes() == before and logged_epochs(folder) == [1, 2]


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
    assert status == 0 and logged_epochs(tmp_path / "runs" / "small") == [1, 2], err
    assert not list((tmp_path / "elsewhere").iterdir())
    shutil.move(tmp_path / "data", tmp_path / "moved")
    status, _, err = command(train, "--resume", "../runs/small/last.pt", "--epochs", 3)
    assert (
        status == 2 and f"the one that ../runs/small/last.pt was trained on, {tmp_path}/data/shapes, as --data" in err
    )
    arguments = ("--epochs", 3, "--data_folder", "../moved/shapes")
    status, _, err = command(train, "--resume", "../runs/small/last.pt", *arguments)
    assert status == 0 and logged_epochs(tmp_path / "runs" / "small") == [1, 2, 3], err


def test_a_resume_elsewhere_does_not_break_the_next_at_home(command, shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shapes, "data")
    assert command(train, *flags("data", "run"), "--epochs", 1)[0] == 0
    shutil.copytree("data", "copy")
    assert command(train, "--resume", "run/last.pt", "--epochs", 2, "--data_folder", "copy")[0] == 0
    shutil.rmtree("copy")
    status, _, err = command(train, "--resume", "run/last.pt", "--epochs", 3)
    assert status == 0 and logged_epochs(tmp_path / "run") == [1, 2, 3], err


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
    assert status == 2 and "--graph_edges grid requires --graph_layers" in err, err


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
    assert logged_epochs(folder) == [1, 2, 3]


def test_a_setting_that_differs_from_the_runs_is_printed(capsys, run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    train.main(train.Settings(resume=str(folder / "last.pt"), epochs=3))
    assert "epochs is 3, where " in capsys.readouterr().out
