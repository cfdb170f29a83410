"""Training: it learns, and refuses bad input with one line."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock, call

import numpy as np
import pytest
import torch
from PIL import Image

import create_input_files
import train
from common.files import read_jsonl
from conftest import CPU, SMALL, build, flags, logged_epochs, step_by_step, weights
from datasets import Example, collate, in_order, make_loader
from features.feature_cache import build_dataset
from models import Captioner, load_captioner
from modules.encoders import Encoder
from modules.show_attend_tell import ShowAttendTell
from training import start
from training.losses import grounding_loss
from training.optim import make_optimizer


def test_accumulating_gives_the_same_step(shapes):
    settings = replace(SMALL, dropout=0.0, encoder_weights="", fine_tune_encoder=False)
    torch.manual_seed(0)
    captions = [[[1, *range(4, 4 + n), 2] for n in lengths] for lengths in ((3, 1), (2, 2), (5,), (1, 1, 2))]
    batch = collate([Example(i, torch.rand(16, 64).half(), one) for i, one in enumerate(captions)])
    gradients = []
    for parts in (1, 3, 9):
        torch.manual_seed(0)
        captioner = build(settings, 12).train()
        optimizer = make_optimizer(captioner, settings)
        chosen = replace(settings, gradient_accumulation_steps=parts, grad_clip=0.0)
        loss, words = train.train_step(captioner, optimizer, batch, chosen, CPU)
        gradients.append((loss, words, [one.grad for one in captioner.decoder.parameters()]))
    for one in gradients[1:]:
        torch.testing.assert_close(one, gradients[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "others",
    [
        {"cell": "gru", "attention": "none", "graph_layers": 1},
        {"decoder": "transformer", "encoder_layers": 1, "encoder_positions": "learned"},
    ],
)
@pytest.mark.slow
def test_two_processes_train_as_one_does(shapes, tmp_path, others):
    """The same batches on two processes of torchrun: the same losses, scores and features."""
    folder = shutil.copytree(shapes, tmp_path / "copy", ignore=shutil.ignore_patterns("features"))
    settings = replace(SMALL, data_folder=str(folder), fine_tune_encoder=False, dropout=0.0, **others)
    arguments = flags(folder, tmp_path / "two", replace(settings, gradient_accumulation_steps=2))
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", train.__file__, *arguments]
    result = subprocess.run([sys.executable, *launch], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("24 training images") == 1
    cached = {path.name: np.load(path) for path in (folder / "features").iterdir()}
    shutil.rmtree(folder / "features")
    train.main(replace(settings, run_folder=str(tmp_path / "one")))
    assert cached.keys() == {path.name for path in (folder / "features").iterdir()}
    for name, features in cached.items():
        np.testing.assert_allclose(features, np.load(folder / "features" / name), rtol=2e-3, atol=1e-3)  # float16
    rows = (read_jsonl(tmp_path / name / "log.jsonl") for name in ("one", "two"))
    for one, two in zip(*rows, strict=True):
        for name in ("train/loss", "val/loss", "val/cider", "val/bleu_4", "val/rouge_l"):
            assert two[name] == pytest.approx(one[name], rel=1e-4), name


def test_a_run_leaves_its_files_and_checkpoints_hold_only_plain_things(run_folder):
    files = {path.name for path in run_folder.iterdir()}
    assert files - {"tensorboard"} == {"last.pt", "best.pt", "log.jsonl", "curves.png"}
    best = torch.load(run_folder / "best.pt", weights_only=True)
    last = torch.load(run_folder / "last.pt", weights_only=True)
    assert {"optimizer", "rng", "progress", "ema", "data"} == last.keys() - best.keys()
    assert best["words"][:4] == ["<pad>", "<start>", "<end>", "<unk>"] and best["image_size"] == 32
    assert logged_epochs(run_folder) == [1, 2]


def test_grounding_moves_the_attention_into_the_boxes(command, shapes, tmp_path):
    losses = {}
    for weight in (0, 3):
        settings = replace(SMALL, epochs=4, grounding_weight=weight, ema_decay=0.0)
        assert command(train, *flags(shapes, tmp_path / str(weight), settings))[0] == 0
        captioner = load_captioner(tmp_path / str(weight) / "last.pt", "cpu")
        dataset = build_dataset(shapes, "train", captioner, CPU)
        dataset.use_names(captioner.vocabulary)
        (batch,) = make_loader(dataset, [in_order(len(dataset))])
        with torch.no_grad():
            output = captioner(batch.inputs, batch.words, batch.lengths)
        loss = grounding_loss(output, batch.object_boxes, batch.named)
        losses[weight] = loss.item() / batch.named.any(-1).sum().item()
    assert losses[3] < losses[0] - 0.15


def test_the_validation_loss_is_that_of_each_word_of_each_caption(shapes, run_folder):
    captioner = load_captioner(run_folder / "best.pt", "cpu")
    epoch = torch.load(run_folder / "best.pt", weights_only=True)["epoch"]
    validation = build_dataset(shapes, "val", captioner, CPU)
    log_prob, words = 0.0, 0
    with torch.no_grad():
        for i in range(len(validation)):
            _, image, captions, *_ = validation[i, False]
            regions = captioner.encode(image.unsqueeze(0)).regions
            log_prob += sum(step_by_step(captioner.decoder, regions, caption[1:])[0] for caption in captions)
            words += sum(len(caption) - 1 for caption in captions)
    assert read_jsonl(run_folder / "log.jsonl")[epoch - 1]["val/loss"] == pytest.approx(-log_prob / words, rel=1e-4)


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
    fresh = build(settings, len(words)).state_dict()
    trained = weights(tmp_path / "last.pt")
    assert all(torch.equal(fresh[name], trained[name]) for name in fresh if name.startswith("encoder"))
    assert not all(torch.equal(fresh[name], trained[name]) for name in fresh if name.startswith("decoder"))


@pytest.mark.slow
def test_scst_raises_the_reward_of_the_sampled_captions(command, shapes, run_folder, tmp_path):
    arguments = ["--data_folder", shapes, "--run_folder", tmp_path / "run", "--max_length", 12, "--epochs", 12]
    arguments += ["--init_from", run_folder / "best.pt", "--objective", "scst", "--fine_tune_encoder"]
    arguments += ["--learning_rate", 5e-3, "--patience", 12, "--gradient_accumulation_steps", 2, "--precision", "fp32"]
    status, _, err = command(train, *arguments)
    assert status == 0, err
    rewards = [row["train/reward"] for row in read_jsonl(tmp_path / "run" / "log.jsonl")]
    assert 0 < sum(rewards[:3]) < 0.9 * sum(rewards[-3:])


@pytest.mark.slow
def test_scst_learns_with_dropout_and_hard_attention_at_its_expectation(shapes, tmp_path, monkeypatch):
    settings = replace(SMALL, data_folder=str(shapes), attention="hard", epochs=1, fine_tune_encoder=False)
    train.main(replace(settings, run_folder=str(tmp_path / "start")))
    modes = set()

    def noting(name, original):
        def note(decoder, *arguments):
            modes.add((name, decoder.dropout.training, decoder.attention.training))
            return original(decoder, *arguments)

        monkeypatch.setattr(ShowAttendTell, name, note)

    noting("step", ShowAttendTell.step)  # samples captions and searches them
    noting("forward", ShowAttendTell.forward)
    start = str(tmp_path / "start" / "last.pt")
    train.main(replace(settings, run_folder=str(tmp_path / "run"), objective="scst", init_from=start))
    assert modes == {("step", False, False), ("forward", True, False), ("forward", False, False)}  # the last validates
    baselines = [weights(tmp_path / name / "last.pt")["decoder.attention.baseline"] for name in ("start", "run")]
    assert baselines[0] == baselines[1] != 0  # it follows the words' loss, which rewards are not


def test_plot_draws_several_runs_into_one_picture(command, run_folder, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(run_folder, tmp_path / name)
    status, out, _ = command(train, "--plot", tmp_path / "a", tmp_path / "b")
    assert status == 0 and out == f"{tmp_path / 'curves.png'}\n"
    assert Image.open(tmp_path / "curves.png").size == (1200, 350)


def test_tensorboard_gets_each_epochs_numbers_and_samples_where_it_is_installed(shapes, tmp_path, monkeypatch):
    make_writer = MagicMock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=make_writer))
    train.main(replace(SMALL, data_folder=str(shapes), run_folder=str(tmp_path), fine_tune_encoder=False))
    suffixes = [{"filename_suffix": f".epoch-{epoch}"} for epoch in (1, 2)]
    assert make_writer.call_args_list == [call(str(tmp_path / "tensorboard"), **suffix) for suffix in suffixes]
    writer = make_writer.return_value.__enter__.return_value
    for row in read_jsonl(tmp_path / "log.jsonl"):
        for name in ("train/loss", "val/loss", "lr", "val/cider"):
            assert call(name, row[name], row["epoch"]) in writer.add_scalar.call_args_list
    pictures = [(each.args[0], each.args[2]) for each in writer.add_image.call_args_list]
    assert pictures == [(f"attention/{i}", epoch) for epoch in (1, 2) for i in (1, 2)]
    assert [(each.args[0], each.args[2]) for each in writer.add_text.call_args_list] == [
        ("captions", 1),
        ("captions", 2),
    ]


def test_early_stopping_and_decay(shapes, tmp_path):
    settings = replace(
        SMALL, data_folder=str(shapes), run_folder=str(tmp_path), epochs=9, patience=2, learning_rate=1e-9
    )
    train.main(replace(settings, fine_tune_encoder=False, lr_schedule="step", learning_rate_decay=0.5))
    rows = read_jsonl(tmp_path / "log.jsonl")
    assert [row["lr"] for row in rows] == pytest.approx([1e-9, 0.5e-9, 0.25e-9])


def test_one_validation_image_is_judged_by_its_loss(tmp_path, command):
    data = str(tmp_path / "data")
    create_input_files.main(create_input_files.Settings(output_folder=data, num_scenes=8, image_size=32))
    changes = replace(SMALL, learning_rate=0.1, epochs=8, patience=1)
    status, out, err = command(train, *flags(data, tmp_path / "run", changes))
    assert status == 0 and out.count("CIDEr of one validation image is always 0") == 1, err
    losses = [row["val/loss"] for row in read_jsonl(tmp_path / "run" / "log.jsonl")]
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)["epoch"]
    assert len(losses) == 8 and losses[best - 1] == min(losses) < losses[0]
    assert f"best validation loss {min(losses):.4f}: " in out


def test_flips_that_change_no_caption_are_named(shapes, tmp_path, command):
    folder = shutil.copytree(shapes, tmp_path / "copy")
    for path in folder.glob("*.json"):
        path.write_text(path.read_text().replace('"left"', '"links"').replace('"right"', '"rechts"'))
    arguments = ("--epochs", "1", "--hflip")
    assert "--hflip flips photos but no words" in command(train, *flags(folder, tmp_path / "a"), *arguments)[1]
    assert "--hflip flips" not in command(train, *flags(shapes, tmp_path / "b"), *arguments)[1]


def spoil_bias(monkeypatch, spoil):
    """Call a function with the output layer's bias of each captioner that train.py builds."""

    def spoiled(*arguments, original=Captioner, **settings):
        captioner = original(*arguments, **settings)
        spoil(captioner.decoder.output.bias)
        return captioner

    monkeypatch.setattr(start, "Captioner", spoiled)


def test_a_loss_that_is_not_finite_stops_with_epoch_step_and_rate(command, shapes, tmp_path, monkeypatch):
    spoil_bias(monkeypatch, lambda bias: bias.data[5:6].fill_(math.nan))
    status, _, err = command(train, *flags(shapes, tmp_path / "run"))
    assert status == 2 and "the loss is nan at epoch 1, step 1, learning rate 0.01: lower --learning_rate" in err


@pytest.mark.parametrize("grad_clip", [5.0, 0.0])
def test_a_gradient_that_is_not_finite_stops_and_reaches_no_checkpoint(
    command, shapes, tmp_path, monkeypatch, grad_clip
):
    """The second step's gradient is infinite, its loss is not."""
    factors = iter([1, math.inf])
    spoil_bias(monkeypatch, lambda bias: bias.register_hook(lambda gradient: gradient * next(factors)))
    settings = replace(SMALL, grad_clip=grad_clip, save_minutes=0.0)  # a checkpoint before each step
    status, _, err = command(train, *flags(shapes, tmp_path / "run", settings))
    assert status == 2 and "the norm of the gradient is " in err and " at epoch 1, step 2, learning rate" in err, err
    checkpoint = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert checkpoint["progress"]["step"] == 1
    for tensors in (checkpoint["model"], checkpoint["ema"]):
        assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data_folder", "missing"), "no data folder missing: run create_input_files.py"),
        (("--resume", "missing.pt"), "no such file: missing.pt"),
        (("--init_from", "missing.pt"), "no such file: missing.pt"),
        (
            ("--resume", "a.pt", "--init_from", "b.pt"),
            "--init_from b.pt cannot be combined with --resume: remove one of them",
        ),
        (("--resume", "{run}/best.pt"), "cannot be resumed: give the run's last.pt"),
        (("--resume", "{run}/last.pt", "--hidden_dim", "99"), "--hidden_dim 99 does not go with"),
        (("--init_from", "{run}/best.pt", "--hidden_dim", "99"), "which was trained with 16"),
        (("--run_folder", "{run}"), "holds a run: continue it with --resume"),
        (("--run_folder", "{run}/last.pt/run"), "last.pt/run cannot be written"),
        (("--encoder_weights", "missing.pth"), "missing.pth"),
        (("--encoder_weights", "{run}/log.jsonl"), "log.jsonl is refused"),
        (("--plot", "{run}", "missing"), "--plot missing: no run there"),
        (("--objective", "scst"), "--objective scst requires a trained model"),
        (("--geometry",), "--geometry requires --encoder_layers"),
        (
            ("--grounding_weight", "1", "--attention", "none"),
            "--grounding_weight 1.0 cannot be combined with --attention none: remove one of them",
        ),
        (("--fine_tune_encoder", "--unfreeze_from", "layer9"), "--unfreeze_from layer9: resnet18 has conv1"),
        (("--freeze_embeddings",), "--freeze_embeddings requires --pretrained_embeddings or --init_from or --resume"),
        (("--pretrained_embeddings", "missing.txt"), "--pretrained_embeddings missing.txt: no such file"),
        (("--graph_edges", "all"), "--graph_edges all requires --graph_layers"),
        (("--graph_layers", "1", "--graph_heads", "3"), "--graph_heads 3: does not divide the 512 features"),
        (("--decoder", "transformer", "--heads", "7"), "--heads 7: does not divide --hidden_dim 512"),
        (("--encoder_layers", "1", "--heads", "7"), "--heads 7: does not divide the 512 features"),
        (("--decoder", "transformer", "--cell", "gru"), "--cell gru requires --decoder recurrent"),
        (("--ffn_dim", "64"), "--ffn_dim 64 requires --decoder transformer or --encoder_layers"),
        (("--warmup_ratio", "-1.5"), "--warmup_ratio -1.5: must be at least -1"),
        (("--decoder", "up_down", "--layers", "2"), "--layers 2 requires --decoder recurrent or adaptive"),
        (("--learning_rate", "nan"), "--learning_rate nan: must be at least 0"),
        (("--dropout", "1.5"), "--dropout 1.5: must be below 1"),
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
    metadata = json.loads((folder / "dataset.json").read_text())
    metadata["splits"]["val"]["images"] = 0
    (folder / "dataset.json").write_text(json.dumps(metadata))
    status, _, err = command(train, *flags(folder, tmp_path / "run"))
    assert status == 2 and "the val split" in err and not (tmp_path / "run").exists()
