"""Training: it learns, resumes exactly, and refuses what cannot be."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.nn import functional

import train
from conftest import SMALL
from datasets import collate
from models import Encoder, build_captioner
from utils import InputError, read_log


def weights(path):
    return torch.load(path, weights_only=True)["model"]


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
    ("step", "workers", "number"),  # in the first epoch of three steps, at its end, in the second
    [(2, 0, signal.SIGINT), (3, 0, signal.SIGTERM), (4, 2, signal.SIGTERM)],
)
def test_a_signal_saves_the_epoch_under_way_and_the_resumed_run_equals_the_whole(
    shapes, tmp_path, monkeypatch, command, request, step, workers, number
):
    former = signal.signal(number, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
    request.addfinalizer(lambda: signal.signal(number, former))
    settings = replace(SMALL, data_folder=str(shapes), workers=workers, scheduled_sampling=0.5)
    train.main(replace(settings, run_folder=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        after_step(patch, step, lambda: signal.raise_signal(number))
        status, _, err = command(
            train, *flags(shapes, tmp_path / "parts"), "--workers", workers, "--scheduled_sampling", 0.5
        )
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


def test_accumulating_gives_the_same_step(shapes):
    settings = replace(SMALL, dropout=0.0, encoder_weights="", fine_tune_encoder=False)
    torch.manual_seed(0)
    captions = [[[1, *range(4, 4 + n), 2] for n in lengths] for lengths in ((3, 1), (2, 2), (5,), (1, 1, 2))]
    batch = collate([(i, torch.rand(4, 64).half(), one) for i, one in enumerate(captions)])
    gradients = []
    for parts in (1, 3, 9):
        torch.manual_seed(0)
        captioner = build_captioner(asdict(settings), 12, 32, "").train()
        optimizer = train.make_optimizer(captioner, settings)
        chosen = replace(settings, accumulate=parts, gradient_clip=0.0)
        loss, words = train.train_step(captioner, optimizer, batch, chosen, torch.device("cpu"), torch.float32)
        gradients.append((loss, words, [one.grad for one in captioner.decoder.parameters()]))
    for one in gradients[1:]:
        torch.testing.assert_close(one, gradients[0], rtol=1e-5, atol=1e-6)


def test_two_processes_train_as_one_does(shapes, tmp_path):
    """The same batches on two processes of torchrun: the same losses, scores and features."""
    folder = shutil.copytree(shapes, tmp_path / "copy", ignore=shutil.ignore_patterns("features"))
    arguments = [*flags(folder, tmp_path / "two"), "--no-fine_tune_encoder", "--dropout", "0", "--accumulate", "2"]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", train.__file__, *arguments]
    result = subprocess.run([sys.executable, *launch], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("24 training images") == 1
    cached = {path.name: path.read_bytes() for path in (folder / "features").iterdir()}
    shutil.rmtree(folder / "features")
    settings = replace(SMALL, data_folder=str(folder), fine_tune_encoder=False, dropout=0.0)
    train.main(replace(settings, run_folder=str(tmp_path / "one")))
    assert cached.keys() == {path.name for path in (folder / "features").iterdir()}
    for one, two in zip(
        read_log(tmp_path / "one" / "log.jsonl"), read_log(tmp_path / "two" / "log.jsonl"), strict=True
    ):
        for name in ("loss", "cider", "bleu_4", "rouge_l"):
            assert two[name] == pytest.approx(one[name], rel=1e-4), name


def test_a_run_leaves_its_files_and_checkpoints_hold_only_plain_things(run_folder):
    assert {path.name for path in run_folder.iterdir()} - {"tensorboard"} == {
        "last.pt",
        "best.pt",
        "log.jsonl",
        "curves.png",
    }
    best = torch.load(run_folder / "best.pt", weights_only=True)
    last = torch.load(run_folder / "last.pt", weights_only=True)
    assert {"optimizer", "rng", "progress", "average"} == last.keys() - best.keys()
    assert best["words"][:4] == ["<pad>", "<start>", "<end>", "<unk>"] and best["image_size"] == 32
    assert [row["epoch"] for row in read_log(run_folder / "log.jsonl")] == [1, 2]


def test_training_overfits_four_images():
    torch.manual_seed(0)
    captions = [[[1, *words, 2]] for words in ([4, 5, 6], [5, 5, 4, 6, 4], [6], [4, 4, 4, 4])]
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    batch = collate([(i, images[i], captions[i]) for i in range(4)])
    settings = replace(SMALL, dropout=0.0, doubly_stochastic=0.0, label_smoothing=0.0)
    captioner = build_captioner(asdict(settings), 7, 32, "").train()
    optimizer = train.make_optimizer(captioner, settings)
    arguments = (captioner, optimizer, batch, settings, torch.device("cpu"), torch.float32)
    losses = [loss / words for loss, words in (train.train_step(*arguments) for _ in range(150))]
    assert losses[0] > 1.5 and losses[-1] < 0.1


def test_the_loss_of_a_ragged_batch_is_that_of_its_captions_alone(tiny_decoder):
    captions = [[[1, 4, 5, 2], [1, 6, 2]], [[1, 5, 5, 5, 2]]]  # the second image has one caption only
    regions = torch.rand(2, 4, 6)
    batch = collate([(i, regions[i], captions[i]) for i in range(2)])
    outputs = tiny_decoder(batch.images, batch.words, batch.lengths)
    settings = replace(SMALL, doubly_stochastic=0.7, label_smoothing=0.0)
    loss, cross_entropy = train.captioning_loss(outputs, batch.lengths, settings, *batch.totals())
    log_probability, words, terms = 0.0, 0, []
    for image, caption in ((0, captions[0][0]), (0, captions[0][1]), (1, captions[1][0])):
        tensors = (regions[image : image + 1], torch.tensor([[caption]]), torch.tensor([[len(caption) - 1]]))
        logits, targets, weights = tiny_decoder(*tensors)
        log_probability += logits.log_softmax(1).gather(1, targets.unsqueeze(1)).sum()
        words += len(targets)
        terms.append((1 - weights[:, 0, 0].sum(0)).square().mean())
    torch.testing.assert_close(cross_entropy, -log_probability)
    torch.testing.assert_close(loss, cross_entropy / words + 0.7 * torch.stack(terms).mean())


def test_a_frozen_encoder_stays_as_it_is_and_runs_once_an_image(shapes, tmp_path, monkeypatch):
    encoded = []

    def counting(self, images, original=Encoder.forward):
        encoded.append(len(images))
        return original(self, images)

    monkeypatch.setattr(Encoder, "forward", counting)
    folder = shutil.copytree(shapes, tmp_path / "copy", ignore=shutil.ignore_patterns("features"))
    settings = replace(SMALL, data_folder=str(folder), run_folder=str(tmp_path), fine_tune_encoder=False, epochs=2)
    train.main(settings)
    assert sum(encoded) == 24 + 2
    torch.manual_seed(settings.seed)
    words = json.loads((shapes / "word_map.json").read_text())
    fresh = build_captioner(asdict(settings), len(words), 32, "").state_dict()
    trained = weights(tmp_path / "last.pt")
    assert all(torch.equal(fresh[name], trained[name]) for name in fresh if name.startswith("encoder"))
    assert not all(torch.equal(fresh[name], trained[name]) for name in fresh if name.startswith("decoder"))


def test_init_from_starts_a_new_run_with_the_weights_words_and_model_settings(command, shapes, run_folder, tmp_path):
    arguments = ("--data_folder", shapes, "--run_folder", tmp_path, "--init_from", run_folder / "best.pt")
    status, out, _ = command(
        train, *arguments, "--epochs", 1, "--learning_rate", 0, "--encoder_learning_rate", 0, "--max_length", 6
    )
    assert status == 0, out
    started, trained = weights(tmp_path / "best.pt"), weights(run_folder / "best.pt")
    assert all(torch.equal(started[name], trained[name]) for name in trained if name.startswith("decoder"))


def test_look_draws_several_runs_into_one_picture(command, run_folder, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(run_folder, tmp_path / name)
    status, out, _ = command(train, "--look", tmp_path / "a", tmp_path / "b")
    assert status == 0 and out == f"{tmp_path / 'curves.png'}\n"
    assert Image.open(tmp_path / "curves.png").size == (1200, 350)


def test_tensorboard_gets_each_epochs_numbers_where_it_is_installed(shapes, tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder):
            self.folder = folder

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def add_scalar(self, name, value, epoch):
            written.append((self.folder, name, value, epoch))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    train.main(replace(SMALL, data_folder=str(shapes), run_folder=str(tmp_path), fine_tune_encoder=False))
    rows = read_log(tmp_path / "log.jsonl")
    for name in ("loss", "learning_rate", "cider"):
        expected = [(tmp_path / "tensorboard", name, row[name], row["epoch"]) for row in rows]
        assert [one for one in written if one[1] == name] == expected


def test_a_torn_log_does_not_block_a_resumed_run(shapes, run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"epoch": 3, "lo')
    train.main(train.Settings(resume=str(folder / "last.pt"), epochs=3))
    assert [row["epoch"] for row in read_log(folder / "log.jsonl")] == [1, 2, 3]


def test_early_stopping_and_decay(shapes, tmp_path):
    settings = replace(
        SMALL, data_folder=str(shapes), run_folder=str(tmp_path), epochs=9, patience=2, learning_rate=1e-9
    )
    train.main(replace(settings, fine_tune_encoder=False, schedule="step", learning_rate_decay=0.5))
    rows = read_log(tmp_path / "log.jsonl")
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-9, 0.5e-9, 0.25e-9])


def test_the_learning_rate_rises_and_falls():
    cosine = train.Settings(epochs=10, warm_up=0.2)  # of 100 steps
    factors = [train.learning_rate_factor(cosine, step, 10) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 20, rel=1e-2) and factors.index(max(factors)) == 19
    assert factors[50] == pytest.approx(0.5) and 0 < factors[99] < 0.001
    falling = replace(cosine, warm_up=0.0, schedule="step", learning_rate_decay=0.5)
    assert [train.learning_rate_factor(falling, step, 10) for step in (0, 9, 10, 35)] == [1, 1, 0.5, 0.125]


def test_label_smoothing_is_that_of_torch():
    logits, targets = torch.randn(6, 9), torch.randint(9, (6,))
    weights, lengths = torch.rand(4, 1, 2, 3), torch.tensor([[4, 2]])
    settings = replace(SMALL, doubly_stochastic=0.0, label_smoothing=0.3)
    loss, cross_entropy = train.captioning_loss((logits, targets, weights), lengths, settings, 6, 2)
    torch.testing.assert_close(loss, functional.cross_entropy(logits, targets, label_smoothing=0.3))
    torch.testing.assert_close(cross_entropy, functional.cross_entropy(logits, targets, reduction="sum"))


@pytest.mark.parametrize("fine_tune", [True, False])
def test_the_average_follows_the_weights_and_leaves_a_frozen_encoder_alone(fine_tune):
    captioner = build_captioner(asdict(SMALL), 7, 32, "")
    captioner.encoder.requires_grad_(fine_tune)
    average = train.WeightAverage(captioner, 0.5)
    assert (average.captioner.encoder is captioner.encoder) != fine_tune
    bias, start = captioner.decoder.beta.bias, captioner.decoder.beta.bias.item()
    for step, following in enumerate((start + 1, start + 2)):
        bias.data.fill_(following)
        average.update(step)  # keeps 1/10 of the old at the first step, 2/11 at the second
    expected = 2 / 11 * (0.1 * start + 0.9 * (start + 1)) + 9 / 11 * (start + 2)
    assert average.captioner.decoder.beta.bias.item() == pytest.approx(expected)


def test_a_loss_that_is_not_finite_stops_with_epoch_step_and_rate(command, shapes, tmp_path, monkeypatch):
    def spoiled(*arguments, original=build_captioner):
        captioner = original(*arguments)
        captioner.decoder.output.bias.data[5] = math.nan
        return captioner

    monkeypatch.setattr(train, "build_captioner", spoiled)
    status, _, err = command(train, *flags(shapes, tmp_path / "run"))
    assert status == 2 and "the loss is nan at epoch 1, step 1, learning rate 0.01: lower --learning_rate" in err


def flags(shapes, run_folder):
    """The command line of the SMALL settings."""
    values = asdict(replace(SMALL, data_folder=str(shapes), run_folder=str(run_folder)))
    switches = {True: "--{}", False: "--no-{}"}
    arguments = []
    del values["look"]  # that draws and does not train
    for name, value in values.items():
        arguments += [switches[value].format(name)] if isinstance(value, bool) else [f"--{name}", str(value)]
    return arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data_folder", "missing"), "no data folder missing: run create_input_files.py"),
        (("--resume", "missing.pt"), "no such file: missing.pt"),
        (("--init_from", "missing.pt"), "no such file: missing.pt"),
        (("--resume", "a.pt", "--init_from", "b.pt"), "give one of them"),
        (("--resume", "{run}/best.pt"), "cannot be resumed: give the run's last.pt"),
        (("--resume", "{run}/last.pt", "--hidden_size", "99"), "--hidden_size 99 does not go with"),
        (("--init_from", "{run}/best.pt", "--hidden_size", "99"), "which was trained with 16"),
        (("--run_folder", "{run}"), "holds a run: continue it with --resume"),
        (("--run_folder", "{run}/last.pt/run"), "last.pt/run cannot be written"),
        (("--encoder", "resnet999"), "--encoder resnet999"),
        (("--encoder_weights", "missing.pth"), "missing.pth"),
        (("--encoder_weights", "{run}/log.jsonl"), "log.jsonl is refused"),
        (("--look", "{run}", "missing"), "--look missing: no run there"),
        (("--epochs", "0"), "--epochs 0: must be at least 1"),
        (("--learning_rate", "nan"), "--learning_rate nan: must be at least 0"),
        (("--dropout", "1.5"), "--dropout 1.5: must be below 1"),
        (("--label_smoothing", "1"), "--label_smoothing 1.0: must be below 1"),
        (("--device", "cuda:99"), "--device cuda:99"),
    ],
)
def test_bad_input_ends_in_one_line_and_writes_nothing(command, shapes, run_folder, tmp_path, arguments, message):
    before = {path: path.stat().st_mtime_ns for path in run_folder.iterdir()}
    arguments = [argument.format(run=run_folder) for argument in arguments]
    fresh = ("--data_folder", shapes, "--run_folder", tmp_path / "run", "--device", "cpu", "--encoder", "resnet18")
    status, _, err = command(train, *fresh, "--encoder_weights", "", *arguments)
    assert status == 2 and message in err.splitlines()[-1] and "Traceback" not in err, err
    assert not (tmp_path / "run").exists()
    assert before == {path: path.stat().st_mtime_ns for path in run_folder.iterdir()}


def test_an_empty_validation_split_is_named(command, shapes, tmp_path):
    folder = shutil.copytree(shapes, tmp_path / "copy")
    card = json.loads((folder / "dataset.json").read_text())
    card["splits"]["val"]["images"] = 0
    (folder / "dataset.json").write_text(json.dumps(card))
    status, _, err = command(train, *flags(folder, tmp_path / "run"))
    assert status == 2 and "the val split" in err and not (tmp_path / "run").exists()


def test_settings_from_takes_what_was_not_given():
    checkpoint = {"settings": asdict(train.Settings(hidden_size=7, epochs=3))}
    given = replace(train.Settings(), epochs=9)
    settings = train.settings_from(checkpoint, "a.pt", given, ["hidden_size", "epochs"], free=["epochs"])
    assert (settings.hidden_size, settings.epochs) == (7, 9)
    with pytest.raises(InputError, match=r"--epochs 9 does not go with a\.pt, which was trained with 3"):
        train.settings_from(checkpoint, "a.pt", given, ["epochs"])
