"""The best epoch of a log, when training stops, and TensorBoard's files."""

import sys
from dataclasses import replace

import numpy as np
import pytest

import train
from common.files import read_jsonl
from conftest import SMALL
from training.logs import epoch_key, prune_tensorboard, write_tensorboard
from training.state import TrainState


def row(cider, bleu_4, loss):
    """A row of the log."""
    return {"val/cider": cider, "val/bleu_4": bleu_4, "val/loss": loss}


@pytest.mark.parametrize(
    ("metric", "num_images", "rows"),  # from worst to best
    [
        ("cider", 2, [row(0.1, 0.9, 1), row(0.2, 0.1, 2)]),
        ("cider", 2, [row(0.0, 0.1, 1), row(0.0, 0.2, 2)]),
        ("cider", 2, [row(0.1, 0.2, 2), row(0.1, 0.2, 1)]),
        ("cider", 2, [row(0.0, 1e-80, 2), row(0.0, 1e-155, 1)]),  # what prints as 0.0000 is 0
        ("bleu_4", 2, [row(0.9, 0.1, 1), row(0.1, 0.2, 2)]),
        ("bleu_4", 2, [row(0.1, 0.2, 1), row(0.2, 0.2, 2)]),
        ("cider", 1, [row(0.0, 0.2, 2), row(0.0, 0.1, 1)]),  # CIDEr says nothing
        ("bleu_4", 1, [row(0.0, 0.1, 1), row(0.0, 0.2, 2)]),
    ],
)
def test_the_best_epoch_has_the_highest_key(metric, num_images, rows):
    keys = [epoch_key(one, metric, num_images) for one in rows]
    assert keys == sorted(keys) and keys[0] != keys[1]


@pytest.mark.parametrize(
    ("num_images", "rows", "counts"),
    [
        (2, [row(0.1, 0.1, 3), row(0.1, 0.1, 4), row(0.0, 0.1, 1), row(0.2, 0.0, 9)], [0, 1, 2, 0]),
        (
            2,
            [row(0.0, 0.0, 3), row(0.0, 0.0, 4), row(0.0, 0.0, 5), row(0.1, 0.0, 9), row(0.0, 0.0, 1)],
            [0, 0, 0, 0, 1],
        ),
        (2, [row(0.0, 0.0, 3), row(0.0, 0.0, 4), row(0.0, 0.0, 2), row(0.0, 0.0, 5), row(0.0, 0.0, 6)], [0] * 5),
        (1, [row(0.0, 0.5, 3), row(0.0, 0.6, 4), row(0.0, 0.7, 5)], [0, 0, 0]),
    ],
)
def test_epochs_without_improvement_count_only_where_the_score_tells(num_images, rows, counts):
    state = TrainState(*[None] * 5, "", [])
    for one, count in zip(rows, counts, strict=True):
        state.end_epoch(epoch_key(one, "cider", num_images))
        assert state.epochs_since_improvement == count
    assert state.epoch == len(rows)


def read_tensorboard(folder):
    """The epochs of each curve, picture and text, and the first text."""
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    everything = module.EventAccumulator(str(folder), size_guidance={module.IMAGES: 0, module.TENSORS: 0})
    everything.Reload()
    tags = everything.Tags()
    found = {tag: everything.Scalars(tag) for tag in tags["scalars"]}
    found |= {tag: everything.Images(tag) for tag in tags["images"]}
    found |= {tag: everything.Tensors(tag) for tag in tags["tensors"]}
    texts = [event.tensor_proto.string_val[0].decode() for event in found.get("captions/text_summary", [])]
    return {tag: [event.step for event in events] for tag, events in found.items()}, texts


def write_epoch(folder, epoch):
    write_tensorboard(folder, {"epoch": epoch, "lr": 0.1}, lambda: ([np.zeros((4, 6, 3), np.uint8)], f"text {epoch}"))


def test_a_resumed_run_keeps_its_epochs(tmp_path):
    for epoch in (1, 2, 3):  # the third was not complete
        write_epoch(tmp_path, epoch)
    prune_tensorboard(tmp_path, 2)
    write_epoch(tmp_path, 3)
    epochs, texts = read_tensorboard(tmp_path)
    assert epochs == {tag: [1, 2, 3] for tag in ("lr", "attention/1", "captions/text_summary")}
    assert texts == ["text 1", "text 2", "text 3"]


def test_files_of_later_epochs_are_removed(tmp_path):
    for epoch in (1, 2, 11):
        (tmp_path / f"events.out.tfevents.1.host.2.{epoch}.epoch-{epoch}").write_bytes(b"")
    prune_tensorboard(tmp_path, 2)
    assert {path.suffix for path in tmp_path.iterdir()} == {".epoch-1", ".epoch-2"}
    prune_tensorboard(tmp_path, 0)
    assert not list(tmp_path.iterdir())


def test_nothing_is_drawn_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    write_tensorboard(tmp_path / "tensorboard", {"epoch": 1}, draw=lambda: pytest.fail("drawn"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_and_its_resume_show_all_epochs_once(shapes, tmp_path, command):
    pytest.importorskip("tensorboard")
    train.main(replace(SMALL, data_folder=str(shapes), run_folder=str(tmp_path)))
    assert command(train, "--resume", tmp_path / "last.pt", "--epochs", 3)[0] == 0
    epochs, texts = read_tensorboard(tmp_path / "tensorboard")
    tags = read_jsonl(tmp_path / "log.jsonl")[0].keys() - {"epoch"}
    tags |= {"attention/1", "attention/2", "captions/text_summary"}
    assert epochs == {tag: [1, 2, 3] for tag in tags}
    assert all(text.startswith("| photo | caption | references |") for text in texts)
