"""Settings and data of runs that start from a checkpoint: what --resume and --init_from take over or refuse."""

import shutil
from dataclasses import asdict, make_dataclass, replace

import pytest
import torch
from test_resume import assert_same_weights

import train
from conftest import SMALL, flags, logged_epochs, prepare_shapes
from training.start import merge_settings
from utils import InputError, parse_settings


def test_merged_settings_take_what_was_not_given():
    checkpoint = {"settings": asdict(train.Settings(hidden_dim=7, epochs=3)), "defaults": asdict(train.Settings())}
    given = train.Settings(epochs=9)
    settings = merge_settings(given, checkpoint, "a.pt", ["hidden_dim", "epochs"], may_differ=["epochs"])
    assert (settings.hidden_dim, settings.epochs) == (7, 9)
    with pytest.raises(InputError, match=r"--epochs 9 does not go with a\.pt, which was trained with 3"):
        merge_settings(given, checkpoint, "a.pt", ["epochs"], may_differ=[])
    default = train.Settings().epochs
    given = parse_settings(train.Settings, ["--epochs", str(default)])  # a flag counts at its default, too
    assert merge_settings(given, checkpoint, "a.pt", ["epochs"], may_differ=["epochs"]).epochs == default


def edited(**defaults):
    """Settings as if the user had edited these defaults at the top of train.py."""
    edits = [(name, type(value), value) for name, value in defaults.items()]
    return make_dataclass("Edited", edits, bases=(train.Settings,), frozen=True)


def test_an_edited_default_counts_when_resuming_but_for_paths(run_folder, tmp_path, capsys):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    settings = edited(epochs=3, run_folder="runs/next", encoder_weights="resnet101.pth")
    train.main(settings(resume=str(folder / "last.pt")))
    assert logged_epochs(folder) == [1, 2, 3] and "epochs is 3, where " in capsys.readouterr().out


@pytest.mark.parametrize("edit", [{"hidden_dim": 99}, {"dropout": 0.75}])
def test_an_edited_default_that_makes_another_run_is_refused(run_folder, edit):
    with pytest.raises(InputError, match=rf"--{min(edit)} \S+ does not go with .*last\.pt, which was trained with"):
        train.main(edited(**edit)(resume=str(run_folder / "last.pt")))


def test_an_edited_default_of_another_start_is_refused(run_folder):
    last = str(run_folder / "last.pt")
    with pytest.raises(InputError, match=r"--init_from b\.pt cannot be combined with --resume: remove one of them"):
        train.main(edited(init_from="b.pt")(resume=last))
    with pytest.raises(InputError, match=r"--pretrained_embeddings b\.txt cannot be combined with --init_from"):
        train.main(edited(pretrained_embeddings="b.txt", run_folder=str(run_folder / "new"))(init_from=last))


def test_a_data_folder_given_at_its_default_counts_when_resuming(command, shapes, run_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    arguments = ("--resume", folder / "last.pt", "--epochs", 3, "--data_folder", train.Settings().data_folder)
    status, _, err = command(train, *arguments)
    assert status == 2 and f"{train.Settings().data_folder} does not hold the data that" in err
    shutil.copytree(shapes, tmp_path / train.Settings().data_folder)
    status, _, err = command(train, *arguments)
    assert status == 0 and (tmp_path / "data").is_dir() and logged_epochs(folder) == [1, 2, 3], err


@pytest.fixture(scope="module")
def other_data(tmp_path_factory):
    """A prepared folder of other shapes."""
    return prepare_shapes(tmp_path_factory.mktemp("other") / "shapes", num_scenes=25)


def test_other_data_is_refused_when_resuming(command, shapes, other_data, run_folder, tmp_path):
    data, folder = shutil.copytree(shapes, tmp_path / "data"), shutil.copytree(run_folder, tmp_path / "run")
    arguments = ("--resume", folder / "last.pt", "--data_folder", data)
    assert command(train, *arguments, "--epochs", 2)[0] == 0
    before = (folder / "last.pt").read_bytes()
    status, _, err = command(train, *arguments[:2], "--epochs", 3, "--data_folder", other_data)
    assert status == 2 and f"{other_data} does not hold the data that" in err and f"trained on in {data}: " in err
    assert (folder / "last.pt").read_bytes() == before and logged_epochs(folder) == [1, 2]
    shutil.copytree(other_data, data, dirs_exist_ok=True)  # prepared again
    status, _, err = command(train, *arguments, "--epochs", 3)
    assert status == 2 and f"{data} does not hold the data that" in err


def test_a_run_finds_its_data_from_another_working_directory_and_at_home_again(command, shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shapes, "data/shapes")
    arguments = flags("data/shapes", "runs/small", replace(SMALL, fine_tune_encoder=False, features_folder="cache"))
    assert command(train, *arguments, "--epochs", 1)[0] == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    resume = ("--resume", "../runs/small/last.pt", "--epochs")
    status, _, err = command(train, *resume, 2)
    assert status == 0 and not list((tmp_path / "elsewhere").iterdir()), err
    shutil.move(tmp_path / "data", tmp_path / "moved")
    status, _, err = command(train, *resume, 3)
    assert status == 2 and f"that ../runs/small/last.pt was trained on in {tmp_path}/data/shapes: give the " in err
    status, _, err = command(train, *resume, 3, "--data_folder", "../moved/shapes")
    assert status == 0, err
    shutil.move(tmp_path / "moved", tmp_path / "data")
    status, _, err = command(train, *resume, 4)
    assert status == 0 and logged_epochs(tmp_path / "runs" / "small") == [1, 2, 3, 4], err


def test_another_run_folder_is_refused_when_resuming(command, run_folder, tmp_path):
    status, _, err = command(train, "--resume", run_folder / "last.pt", "--run_folder", tmp_path / "other")
    assert status == 2 and "--resume continues in" in err and not (tmp_path / "other").exists()


@pytest.fixture
def init_from(command, shapes, run_folder, tmp_path):
    """Start a run from the weights of `run_folder` with more flags: (flags) -> exit status, errors."""

    def start(*arguments, checkpoint=run_folder / "best.pt"):
        folders = ("--data_folder", shapes, "--run_folder", tmp_path / "run", "--init_from", checkpoint)
        return command(train, *folders, "--epochs", 1, "--max_length", 6, *arguments)[::2]

    return start


def test_init_from_takes_weights_words_and_settings_that_were_not_given(init_from, run_folder, tmp_path):
    trained = torch.load(run_folder / "best.pt", weights_only=True)
    older = trained | {key: dict(trained[key]) for key in ("settings", "defaults")}
    for key in ("settings", "defaults"):
        del older[key]["features_folder"]  # a setting that train.py did not have yet
    torch.save(older, tmp_path / "older.pt")
    status, err = init_from("--learning_rate", 0, "--dropout", 0.25, checkpoint=tmp_path / "older.pt")
    assert status == 0, err
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    names = [name for name in trained["model"] if name.startswith("decoder")]
    assert_same_weights({name: best["model"][name] for name in names}, {name: trained["model"][name] for name in names})
    assert best["words"] == trained["words"] and best["settings"]["dropout"] == 0.25
    assert best["model_settings"] == trained["model_settings"] | {"dropout": 0.25}


@pytest.mark.parametrize(("flag", "value"), [("hidden_dim", 512), ("cell", "gru"), ("attention", "dot")])
def test_init_from_refuses_settings_that_the_weights_depend_on(init_from, tmp_path, flag, value):
    status, err = init_from("--dropout", 0.25, f"--{flag}", value)
    assert status == 2 and f"--{flag} {value} does not go with" in err and not (tmp_path / "run").exists(), err


def test_flags_of_layers_that_are_not_there_are_refused_from_a_checkpoint_too(init_from, command, run_folder):
    resume = ("--resume", run_folder / "last.pt", "--epochs", 9)
    for _, err in (init_from("--graph_edges", "grid"), command(train, *resume, "--graph_edges", "grid")[1:]):
        assert "--graph_edges grid requires --graph_layers" in err


def test_a_run_that_started_from_another_is_resumed_with_its_origin(init_from, command, run_folder, tmp_path):
    last = tmp_path / "run" / "last.pt"
    assert init_from("--freeze_embeddings")[0] == 0
    status, _, err = command(train, "--resume", last, "--epochs", 2)
    origin = torch.load(last, weights_only=True)["settings"]["init_from"]
    assert status == 0 and origin == str(run_folder / "best.pt"), err


@pytest.mark.parametrize(
    "spoil",
    [
        lambda checkpoint: checkpoint["ema"].popitem(),
        lambda checkpoint: checkpoint["optimizer"]["state"][0].update(exp_avg=torch.zeros(1)),
        lambda checkpoint: checkpoint["optimizer"]["param_groups"][0]["params"].reverse(),
        lambda checkpoint: checkpoint["progress"].update(step=-1),
        lambda checkpoint: checkpoint["rng"].clear(),
    ],
    ids=["ema", "moments", "parameters", "progress", "rng"],
)
def test_a_damaged_training_state_is_refused(command, run_folder, tmp_path, spoil):
    checkpoint = torch.load(run_folder / "last.pt", weights_only=True)
    spoil(checkpoint)
    torch.save(checkpoint, tmp_path / "last.pt")
    status, _, err = command(train, "--resume", tmp_path / "last.pt", "--epochs", 3)
    assert status == 2 and "last.pt: its training state is not what train.py writes for this model: start" in err, err
