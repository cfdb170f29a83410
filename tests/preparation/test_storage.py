"""Prepared folders: packed captions, captions files, and folders that are incomplete or mixed up."""

import json
import shutil
from collections import Counter

import h5py
import numpy as np
import pytest

from preparation.storage import (
    PackedCaptions,
    PackedObjects,
    iter_captions,
    read_captions,
    read_metadata,
    write_captions,
)
from text.vocabulary import END, START, UNK, Vocabulary
from utils import InputError

CAPTIONS = [[["a", "dog"], ["two", "dogs", "<end>"]], [], [["a"]]]  # of three images


def test_packed_captions_are_the_captions():
    packed = PackedCaptions.pack(CAPTIONS)
    assert packed.decode() == CAPTIONS and len(packed) == 3 and packed.num_captions() == 3
    assert list(packed) == [[[0, 1], [2, 3, 4]], [], [[0]]]
    assert packed.lengths().tolist() == [2, 3, 1]
    assert packed.counts() == Counter({"a": 2, "dog": 1, "two": 1, "dogs": 1, "<end>": 1})


def test_encoded_captions_have_the_ids_of_a_vocabulary():
    encoded = PackedCaptions.pack(CAPTIONS).encode(Vocabulary.from_counts(Counter(["a", "dog"]), 1))
    assert list(encoded) == [[[START, 4, 5, END], [START, UNK, UNK, UNK, END]], [], [[START, 4, END]]]


def test_captions_files_are_json_that_is_read_line_by_line(tmp_path):
    contents = [{"image": "é", "captions": [{"words": words} for words in captions]} for captions in CAPTIONS]
    write_captions(tmp_path / "captions.json", contents)
    assert json.loads((tmp_path / "captions.json").read_text(encoding="utf-8")) == contents
    entries = []
    captions = iter_captions(tmp_path / "captions.json", entries, PackedObjects())
    assert PackedCaptions.pack(captions).decode() == CAPTIONS
    assert entries == [{"image": "é"}] * 3


@pytest.mark.parametrize(
    "line", ["{", '{"image": "b"}', '{"captions": 5}', "[3]", "5", '{"captions": [{"raw": "A dog"}]}', "[" * 100_000]
)
def test_damaged_captions_are_named(tmp_path, line):
    (tmp_path / "captions.json").write_text(f'[\n{{"image": "a", "captions": []}},\n{line}\n]\n')
    with pytest.raises(InputError, match=r"captions\.json, image 2: not valid JSON, run create_"):
        list(iter_captions(tmp_path / "captions.json", [], PackedObjects()))


def test_packed_objects_are_the_objects():
    dog = {"words": ["dog"], "box": [0.1, 0.2, 0.3, 0.4], "score": 0.3}
    images = [[dog, {"words": ["red", "circle"], "box": [0, 0.0, 1, 1]}], [], [dog | {"score": -0.5}]]
    packed = PackedObjects()
    for objects in images:
        packed.append(objects)
    assert list(packed) == images == [packed[i] for i in range(len(packed))]
    assert packed.any()
    packed.append(None)
    assert not packed.any() and not PackedObjects().any()


@pytest.fixture
def copied(shapes, tmp_path):
    """A copy of the shapes that may be damaged."""
    return shutil.copytree(shapes, tmp_path / "copied")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"is not a complete data folder, it has no dataset\.json"),
        ("[]", "dataset.json is not one of create_input_files.py: run it again with --overwrite"),
        ('{"image_size": 8, "resize": "pad", "splits": {}, "source": {}}', "dataset.json is not one of"),
        ({"region_features": 5}, "dataset.json is not one of"),
        ({"region_features": {"feature_dim": 5}}, "dataset.json is not one of"),
        ({"splits": {"train": {}}}, "dataset.json is not one of"),
    ],
)
def test_another_dataset_json_is_refused(copied, content, message):
    path = copied / "dataset.json"
    if content is None:
        path.unlink()
    elif isinstance(content, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | content))
    else:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_metadata(copied)


def test_an_empty_split_is_refused(copied):
    metadata = read_metadata(copied)
    metadata["splits"]["val"] = {"images": 0, "captions": 0, "digest": ""}
    with pytest.raises(InputError, match=r"the val split of .* is empty \(filled: train test\)"):
        read_captions(copied, "val", metadata)


@pytest.mark.parametrize("name", ["images.hdf5", "captions.json"])
def test_missing_files_and_those_of_another_split_are_refused(copied, name):
    shutil.copy(copied / f"train_{name}", copied / f"val_{name}")
    with pytest.raises(InputError, match=f"val_{name} is not the file that dataset.json describes"):
        read_captions(copied, "val")
    (copied / f"val_{name}").unlink()
    with pytest.raises(InputError, match=rf"val_{name}.*: run create_input_files\.py again with --overwrite"):
        read_captions(copied, "val")


def external_link(file, other):
    file["images"] = h5py.ExternalLink(other, "images")


def soft_link(file, other):
    file["folder"] = h5py.ExternalLink(other, "/")
    file["images"] = h5py.SoftLink("/folder/images")


def external_storage(file, other):
    file.create_dataset("images", (2, 3, 32, 32), np.uint8, external=[(other, 0, h5py.h5f.UNLIMITED)])


def virtual(file, other):
    layout = h5py.VirtualLayout((2, 3, 32, 32), np.uint8)
    layout[:] = h5py.VirtualSource(other, "images", (2, 3, 32, 32))
    file.create_virtual_dataset("images", layout)


@pytest.mark.parametrize("link", [external_link, soft_link, external_storage, virtual])
def test_images_that_lie_in_other_files_are_refused(copied, tmp_path, link):
    path, other = copied / "val_images.hdf5", str(tmp_path / "other.hdf5")
    path.rename(other)
    with h5py.File(other) as file:
        digest, shape = file.attrs["digest"], file["images"].shape
    assert shape == (2, 3, 32, 32)
    with h5py.File(path, "w") as file:
        file.attrs["digest"] = digest
        link(file, other)
        assert file["images"].shape == shape  # as a reader that does not look would get them
    with pytest.raises(InputError, match=r"val_images\.hdf5 is refused: images is a link or lies in other files"):
        read_captions(copied, "val")
