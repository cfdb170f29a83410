"""The feature cache, and prepared folders that must not be read."""

import json
import shutil
from dataclasses import replace

import h5py
import pytest
import torch

from conftest import CPU, SMALL, build
from preparation.storage import read_metadata, write_captions
from text.vocabulary import Vocabulary
from training.feature_cache import build_dataset
from utils import InputError


@pytest.fixture
def copied(shapes, tmp_path):
    """A copy of the shapes that a test may spoil."""
    return shutil.copytree(shapes, tmp_path / "copy")


def small_captioner(weights_seed=0, grid_size=0, fine_tune_encoder=False):
    torch.manual_seed(weights_seed)
    settings = replace(SMALL, grid_size=grid_size, region_dim=0, fine_tune_encoder=fine_tune_encoder)
    return build(settings, 10).eval()


def open_dataset(folder, captioner, hflip=False):
    return build_dataset(folder, "val", Vocabulary.load(folder), captioner, CPU, hflip=hflip)


def test_cached_features_are_the_encoders(copied):
    captioner = small_captioner()
    cached, plain = open_dataset(copied, captioner), open_dataset(copied, small_captioner(fine_tune_encoder=True))
    images = torch.stack([plain[i, False][1] for i in range(len(plain))])
    with torch.inference_mode():
        expected = captioner.encode_images(images)
    features = torch.stack([cached[i, False][1] for i in range(len(cached))])
    found = captioner.encode_images(features, is_features=True)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_flipped_images_have_left_and_right_exchanged(copied):
    captioner = small_captioner()
    cached = open_dataset(copied, captioner, hflip=True)
    plain = open_dataset(copied, small_captioner(fine_tune_encoder=True))
    word2idx, seen = Vocabulary.load(copied).word2idx, set()
    exchanged = {word2idx["left"]: word2idx["right"], word2idx["right"]: word2idx["left"]}
    for i in range(len(plain)):
        index, image, captions = plain[i, True]
        assert index == i and torch.equal(image, plain[i, False][1].flip(-1))
        assert captions == [[exchanged.get(word, word) for word in caption] for caption in plain[i, False][2]]
        assert captions == cached[i, True][2] and plain[i, False][2] == cached[i, False][2]
        seen.update(word for caption in captions for word in caption)
    assert seen & exchanged.keys()


def test_features_of_flipped_images_are_the_encoders(copied):
    captioner = small_captioner()
    cached = open_dataset(copied, captioner, hflip=True)
    plain = open_dataset(copied, small_captioner(fine_tune_encoder=True))
    for i in range(len(plain)):
        for flipped in (False, True):
            with torch.inference_mode():
                expected = captioner.encode_images(plain[i, flipped][1].unsqueeze(0))[0]
            torch.testing.assert_close(cached[i, flipped][1].float(), expected, rtol=1e-3, atol=1e-3)


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
        (lambda folder: (folder / "word_map.json").unlink(), "no such file: .*word_map.json"),
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
