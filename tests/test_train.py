"""Training: it learns, resumes exactly, and refuses what cannot be."""

import json
import math
import shutil
from dataclasses import asdict, replace

import pytest
import torch
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
    assert_same_weights(weights(tmp_path / "whole" / "last.pt"), weights(tmp_path / "parts" / "last.pt"))
    assert_same_weights(weights(tmp_path / "whole" / "best.pt"), weights(tmp_path / "parts" / "best.pt"))
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("whole", "parts")]
    for one, other in zip(*logs, strict=True):
        for name in one.keys() - {"seconds", "captions_per_second", "images_per_second"}:
            assert one[name] == other[name], name


@pytest.mark.parametrize("step", [2, 5])  # in the first epoch of three steps, and in the second
def test_an_interrupted_run_leaves_a_usable_last_pt(shapes, tmp_path, monkeypatch, step):
    settings = replace(SMALL, data_folder=str(shapes))
    train.main(replace(settings, run_folder=str(tmp_path / "whole")))
    steps = []

    def interrupted(*arguments, original=train.train_step):
        steps.append(1)
        if len(steps) == step:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train_step", interrupted)
        train.main(replace(settings, run_folder=str(tmp_path / "parts")))
    train.main(train.Settings(resume=str(tmp_path / "parts" / "last.pt")))
    assert_same_weights(weights(tmp_path / "whole" / "last.pt"), weights(tmp_path / "parts" / "last.pt"))


def test_a_run_leaves_its_files_and_checkpoints_hold_only_plain_things(run_folder):
    assert {path.name for path in run_folder.iterdir()} == {"last.pt", "best.pt", "log.jsonl", "curves.png"}
    best = torch.load(run_folder / "best.pt", weights_only=True)
    last = torch.load(run_folder / "last.pt", weights_only=True)
    assert {"optimizer", "rng", "patience", "average"} == last.keys() - best.keys()
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
    losses = [train.train_step(*arguments)[0] for _ in range(150)]
    assert losses[0] > 1.5 and losses[-1] < 0.1


def test_the_loss_of_a_ragged_batch_is_that_of_its_captions_alone(tiny_decoder):
    captions = [[[1, 4, 5, 2], [1, 6, 2]], [[1, 5, 5, 5, 2]]]  # the second image has one caption only
    regions = torch.rand(2, 4, 6)
    batch = collate([(i, regions[i], captions[i]) for i in range(2)])
    outputs = tiny_decoder(batch.images, batch.words, batch.lengths)
    loss, word_loss = train.captioning_loss(*outputs, batch.lengths, 0.7)
    log_probability, words, terms = 0.0, 0, []
    for image, caption in ((0, captions[0][0]), (0, captions[0][1]), (1, captions[1][0])):
        tensors = (regions[image : image + 1], torch.tensor([[caption]]), torch.tensor([[len(caption) - 1]]))
        logits, targets, weights = tiny_decoder(*tensors)
        log_probability += logits.log_softmax(1).gather(1, targets.unsqueeze(1)).sum()
        words += len(targets)
        terms.append((1 - weights[:, 0, 0].sum(0)).square().mean())
    torch.testing.assert_close(word_loss, -log_probability / words)
    torch.testing.assert_close(loss, word_loss + 0.7 * torch.stack(terms).mean())


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
    loss, word_loss = train.captioning_loss(logits, targets, weights, lengths, 0.0, 0.3)
    torch.testing.assert_close(loss, functional.cross_entropy(logits, targets, label_smoothing=0.3))
    torch.testing.assert_close(word_loss, functional.cross_entropy(logits, targets))


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
