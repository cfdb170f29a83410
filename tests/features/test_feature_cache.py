"""The feature cache, and damaged data folders."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch

import train
from common.files import hold_lock
from conftest import CPU, SMALL, build, flags
from features import feature_cache
from features.feature_cache import build_dataset
from preparation.storage import read_metadata, write_captions
from text.vocabulary import Vocabulary
from utils import InputError


@pytest.fixture
def copied(shapes, tmp_path):
    """A copy of the shapes, without features, for a test to change."""
    return shutil.copytree(shapes, tmp_path / "copy", ignore=shutil.ignore_patterns("features"))


def small_captioner(weights_seed=0, grid_size=0, fine_tune_encoder=False, words=10):
    torch.manual_seed(weights_seed)
    settings = replace(SMALL, grid_size=grid_size, region_dim=0, fine_tune_encoder=fine_tune_encoder)
    return build(settings, words).eval()


def open_dataset(folder, captioner, hflip=False, features_folder="", split="val"):
    return build_dataset(folder, split, captioner, CPU, hflip=hflip, features_folder=features_folder)


def test_flipped_images_have_left_and_right_exchanged(copied):
    vocabulary = Vocabulary.load(copied)
    cached = open_dataset(copied, small_captioner(words=vocabulary.idx2word), hflip=True)
    plain = open_dataset(copied, small_captioner(fine_tune_encoder=True, words=vocabulary.idx2word))
    word2idx, seen = vocabulary.word2idx, set()
    exchanged = {word2idx["left"]: word2idx["right"], word2idx["right"]: word2idx["left"]}
    for i in range(len(plain)):
        index, image, captions, *_ = plain[i, True]
        assert index == i and torch.equal(image, plain[i, False][1].flip(-1))
        assert captions == [[exchanged.get(word, word) for word in caption] for caption in plain[i, False][2]]
        assert captions == cached[i, True][2] and plain[i, False][2] == cached[i, False][2]
        seen.update(word for caption in captions for word in caption)
    assert seen & exchanged.keys()


def test_cached_features_are_the_encoders_of_flipped_images_too(copied):
    captioner = small_captioner()
    cached = open_dataset(copied, captioner, hflip=True)
    plain = open_dataset(copied, small_captioner(fine_tune_encoder=True))
    for i in range(len(plain)):
        for flipped in (False, True):
            features, image = cached[i, flipped][1], plain[i, flipped][1]
            with torch.inference_mode():
                found, expected = (captioner.encode(x.unsqueeze(0)).regions[0] for x in (features, image))
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(features.float(), expected, rtol=1e-3, atol=1e-3)


def test_the_cache_is_reused_but_never_for_anything_else(copied):
    (path,) = open_dataset(copied, small_captioner()).feature_paths
    written = path.stat().st_mtime_ns
    assert open_dataset(copied, small_captioner()).feature_paths == [path] and path.stat().st_mtime_ns == written
    assert open_dataset(copied, small_captioner(weights_seed=1)).feature_paths != [path]
    assert open_dataset(copied, small_captioner(grid_size=2)).feature_paths != [path]
    with h5py.File(copied / "val_images.hdf5", "a") as file:
        file["images"][0] = 0
        file.attrs["digest"] = "another"
    metadata = json.loads((copied / "dataset.json").read_text())
    metadata["splits"]["val"]["digest"] = "another"
    (copied / "dataset.json").write_text(json.dumps(metadata))
    assert open_dataset(copied, small_captioner()).feature_paths != [path]


def test_features_that_the_cache_cannot_hold_are_refused_and_nothing_is_left(copied):
    captioner = small_captioner()
    captioner.encoder.network.bn1.weight.data.fill_(1e6)
    before = set(copied.rglob("*"))
    with pytest.raises(InputError, match="resnet18's features do not fit into float16"):
        open_dataset(copied, captioner)
    assert set(copied.rglob("*")) - {copied / "features"} == before - {copied / "features"}


@pytest.fixture
def read_only(monkeypatch, tmp_path):
    """Return a function that makes folders unwritable; the user's cache is a temporary folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def forbid(*folders):
        def access(path, mode, original=os.access):
            return original(path, mode) and not any(folder in (path, *path.parents) for folder in folders)

        monkeypatch.setattr("common.files.os.access", access)  # root ignores permissions

    return forbid


def test_features_of_a_read_only_folder_lie_in_the_users_cache_unless_it_has_them(copied, tmp_path, read_only, capsys):
    (path,) = open_dataset(copied, small_captioner()).feature_paths
    read_only(copied)
    assert open_dataset(copied, small_captioner()).feature_paths == [path] and not capsys.readouterr().out
    shutil.rmtree(copied / "features")
    cache = tmp_path / "cache" / "image-captioning" / "features"
    for split in ("val", "train"):
        (path,) = open_dataset(copied, small_captioner(), split=split).feature_paths
        assert path.parent == cache and path.is_file()
    assert not (copied / "features").exists()
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and f"features are cached in {cache}" in out, out


def test_where_no_features_can_be_cached_is_named(copied, tmp_path, read_only):
    read_only(copied, tmp_path)
    with pytest.raises(InputError, match=f"neither in {copied}/features nor in {tmp_path}/cache/.*--features_folder"):
        open_dataset(copied, small_captioner())
    with pytest.raises(InputError, match=f"{tmp_path}/mine cannot be written"):
        open_dataset(copied, small_captioner(), features_folder=str(tmp_path / "mine"))


def test_features_that_do_not_fit_on_the_disk_are_not_begun(copied, monkeypatch):
    size = len(open_dataset(copied, small_captioner(fine_tune_encoder=True))) * 64 * 64 * 2  # regions, features, bytes
    usage = shutil.disk_usage(copied)
    before = set(copied.rglob("*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * size - 1))
    with pytest.raises(InputError, match=r"features take \d+ MB, .* has \d+ MB free: .* --features_folder"):
        open_dataset(copied, small_captioner(), hflip=True)
    assert set(copied.rglob("*")) == before
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * size))
    assert len(open_dataset(copied, small_captioner(), hflip=True).feature_paths) == 2
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    paths = open_dataset(copied, small_captioner(), hflip=True).feature_paths
    assert len(paths) == 2
    paths[1].rename(f"{paths[1]}.partial")  # what a killed run has written takes no further room
    assert open_dataset(copied, small_captioner(), hflip=True).feature_paths == paths


@pytest.fixture
def small_steps(monkeypatch):
    """Encode 4 images at once and save after 8; return the list of images that are encoded from now on."""
    encoded = []

    def make_loader(dataset, batches, original=feature_cache.make_loader):
        encoded.extend(index for batch in batches for index, _ in batch)
        return original(dataset, batches)

    monkeypatch.setattr(feature_cache, "BATCH_SIZE", 4)
    monkeypatch.setattr(feature_cache, "SAVE_EVERY", 2)
    monkeypatch.setattr(feature_cache, "make_loader", make_loader)
    return encoded


def interrupt(monkeypatch, call, error):
    """Raise an error at the n-th call of np.isfinite, which is called once per batch of features."""
    calls = iter(range(1, 1000))

    def isfinite(array, original=np.isfinite):
        if next(calls) == call:
            raise error
        return original(array)

    monkeypatch.setattr("numpy.isfinite", isfinite)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_features_are_continued_where_a_run_stopped(copied, tmp_path, monkeypatch, small_steps, error):
    captioner = small_captioner()
    (whole,) = open_dataset(copied, captioner, features_folder=str(tmp_path), split="train").feature_paths
    with monkeypatch.context() as patch:
        interrupt(patch, 4, error)
        with pytest.raises(type(error)) as raised:
            open_dataset(copied, captioner, split="train")
    (partial,) = (copied / "features").iterdir()  # the whole file lies elsewhere
    assert partial.name == f"{whole.name}.partial" and np.load(partial, mmap_mode="r").shape == (8, 64, 64)
    assert getattr(raised.value, "filename", str(partial)) == str(partial)
    del small_steps[:]
    (path,) = open_dataset(copied, captioner, split="train").feature_paths
    assert sorted(small_steps) == list(range(8, 24)) and list((copied / "features").iterdir()) == [path]
    assert path.read_bytes() == whole.read_bytes()


def test_an_error_of_another_process_ends_this_one_too(copied, monkeypatch):
    other = OSError(28, "No space left on device", "of another process")
    monkeypatch.setattr(feature_cache, "all_gather", lambda errors: [*errors, other])
    with pytest.raises(OSError, match="of another process"):
        open_dataset(copied, small_captioner())


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01", b"other", "another shape"])
def test_features_that_cannot_be_continued_are_begun_anew(copied, content):
    (path,) = open_dataset(copied, small_captioner()).feature_paths
    whole = path.read_bytes()
    if content == "another shape":
        np.save(path, np.ones((1, 2, 3), np.float16))
        content = path.read_bytes()
    path.unlink()
    path.with_name(f"{path.name}.partial").write_bytes(content)
    open_dataset(copied, small_captioner())
    assert path.read_bytes() == whole


@pytest.mark.slow
def test_two_programs_that_compute_the_same_features_at_once_both_train(copied, tmp_path):
    settings = replace(SMALL, fine_tune_encoder=False, epochs=1)
    commands = [[sys.executable, train.__file__, *flags(copied, tmp_path / name, settings)] for name in ("a", "b")]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    assert all(process.communicate()[1] is not None and process.returncode == 0 for process in processes)
    assert sorted(path.name[:4] for path in (copied / "features").iterdir()) == ["trai", "val_"]
    rows = [(tmp_path / name / "log.jsonl").read_text().split('"lr"')[0] for name in ("a", "b")]
    assert rows[0] == rows[1]


def test_features_that_another_program_computes_are_waited_for(copied, small_steps, capsys):
    """A thread holds the lock as another program would; it computes nothing, since torch.fx traces in one thread."""
    (path,) = open_dataset(copied, small_captioner()).feature_paths
    path.unlink()
    small_steps.clear()
    held = threading.Event()

    def hold():
        with hold_lock(path.with_name(f".{path.name}.lock"), ""):
            held.set()
            time.sleep(0.5)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    assert open_dataset(copied, small_captioner()).feature_paths == [path]
    holder.join()
    assert [path] == list((copied / "features").iterdir())
    assert sorted(small_steps) == [0, 1]  # each image of the split once
    assert capsys.readouterr().out.count("is being computed by another program, waiting for it") == 1


@pytest.mark.parametrize(("name", "value"), [("image_size", 64), ("resize", "pad")])
def test_images_of_another_size_or_form_are_refused(copied, name, value):
    captioner = small_captioner()
    setattr(captioner, name, value)
    with pytest.raises(InputError, match=rf"images of 32 pixels, made by squash.*--{name} {value}"):
        open_dataset(copied, captioner)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "dataset.json").unlink(), "not a complete data folder"),
        (lambda folder: (folder / "val_images.hdf5").unlink(), "val_images.hdf5 is missing or damaged"),
        (lambda folder: truncate(folder / "val_images.hdf5"), "val_images.hdf5 is missing or damaged"),
        (lambda folder: truncate(folder / "val_captions.json"), "val_captions.json, image 2: not valid JSON"),
        (lambda folder: (folder / "val_captions.json").unlink(), "no such file: .*val_captions.json"),
        (
            lambda folder: shutil.copy(folder / "test_images.hdf5", folder / "val_images.hdf5"),
            "val_images.hdf5 is not the",
        ),
        (lambda folder: write_captions(folder / "val_captions.json", []), "val_captions.json is not the file that"),
        (shutil.rmtree, "no data folder"),
    ],
)
def test_half_made_folders_are_refused(copied, spoil, message):
    spoil(copied)
    with pytest.raises(InputError, match=message):
        read_metadata(copied)  # as every script does first
        open_dataset(copied, small_captioner())
