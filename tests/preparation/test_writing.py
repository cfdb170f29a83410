"""Writing: the choice of training data, the order of images, the vocabulary, boxes, and the digest of a folder."""

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from create_input_files import Settings, fingerprint
from datasets import CaptionDataset
from preparation.records import ImageRecord, pack_captions
from preparation.storage import SPLITS, read_captions, read_metadata
from preparation.writing import subsample_train, write_folder
from text.vocabulary import Vocabulary
from utils import InputError

SETTINGS = Settings(dataset="own", images="photos", image_size=8, min_word_freq=1)


def record(name, split="train", captions=("a dog", "a red dog runs")):
    packed = pack_captions([{"words": text.split(), "raw": text} for text in captions if text])
    return ImageRecord(Path(name), name, name, split, packed)


def texts_of(records):
    return [[" ".join(caption["words"]) for caption in record.captions] for record in records]


def test_without_limits_all_training_data_is_kept(capsys):
    records = [record("a"), record("b", captions=())]
    assert subsample_train(records, SETTINGS) == records
    assert not capsys.readouterr().out


def test_only_images_that_had_captions_are_left_out():
    records = [record("a"), record("b", captions=["a red dog runs"]), record("c", captions=())]
    settings = replace(SETTINGS, max_caption_length=2, long_captions="drop")
    kept = subsample_train(records, settings)
    assert [record.name for record in kept] == ["a", "c"]  # c, without captions from the start, is reported later
    assert texts_of(kept) == [["a dog"], []]


def test_truncated_captions_keep_their_raw_text():
    (kept,) = subsample_train([record("a")], replace(SETTINGS, max_caption_length=2))
    assert texts_of([kept]) == [["a dog", "a red"]]
    assert [caption["raw"] for caption in kept.captions] == ["a dog", "a red dog runs"]


def test_max_train_images_keeps_the_order():
    records = [record(str(i)) for i in range(100)]
    names = [int(record.name) for record in subsample_train(records, replace(SETTINGS, max_train_images=30))]
    assert len(names) == 30 and names == sorted(names)


@pytest.fixture
def photos(tmp_path):
    """Forty photos, the i-th of color 6 * i, as records of all splits, the 31st broken."""
    records = []
    for i in range(40):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (9, 9), (6 * i, 0, 0)).save(path)
        split = SPLITS[min(2, i % 4)]
        captions = ["a dog", f"{split} only"]
        records.append(replace(record(path.name, split, captions), path=path))
    (tmp_path / "30.png").write_text("no photo")
    return records


@pytest.mark.parametrize(
    ("words", "expected"), [(None, ["a", "dog", "only", "train"]), (["dog", "cat"], ["dog", "cat"])]
)
def test_images_are_in_the_order_of_captions_and_words_those_of_training_or_given(tmp_path, photos, words, expected):
    folder = tmp_path / "out"
    folder.mkdir()
    write_folder(folder, photos, replace(SETTINGS, skip_broken=True), words)
    assert [read_metadata(folder)["splits"][split]["images"] for split in SPLITS] == [10, 10, 19]
    for split in SPLITS:
        entries, _, _ = read_captions(folder, split)
        with h5py.File(folder / f"{split}_images.hdf5") as file:
            colors = file["images"][:, 0, 4, 4]
        assert np.array_equal(colors, [6 * int(entry["image"].removesuffix(".png")) for entry in entries])
    assert Vocabulary.load(folder).idx2word[4:] == expected


def test_the_digest_is_that_of_images_captions_and_words(tmp_path, photos):
    def digest(name, records=photos, **changes):
        folder = tmp_path / name
        folder.mkdir()
        write_folder(folder, records, replace(SETTINGS, skip_broken=True, **changes), None)
        return read_metadata(folder)["digest"]

    others = [
        digest("image size", image_size=9),
        digest("words", vocab_size=2),
        digest("images", [*photos[:-1], replace(photos[-1], path=photos[0].path)]),
        digest("captions", [*photos[:-1], photos[-1].with_captions([{"words": ["a"], "raw": "a"}])]),
    ]
    assert len({digest("once"), *others}) == 5 and digest("again") == read_metadata(tmp_path / "once")["digest"]


def test_a_vocabulary_without_words_names_min_word_freq(tmp_path, photos):
    with pytest.raises(InputError, match="no word occurs 11 times in the training captions: give a smaller --min_w"):
        write_folder(tmp_path, photos, replace(SETTINGS, skip_broken=True, min_word_freq=11), None)


@pytest.mark.parametrize("size", [(160, 80), (80, 160), (100, 100)])
@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_boxes_lie_where_the_objects_are_in_the_square(tmp_path, size, resize):
    colors = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
    boxes = [[0.0, 0.0, 0.2, 0.2], [0.2, 0.4, 0.4, 0.7], [0.6, 0.3, 1.0, 0.6]]
    photo = Image.new("RGB", size)
    for color, box in zip(colors.values(), boxes, strict=True):
        photo.paste(color, tuple(round(edge * side) for edge, side in zip(box, size * 2, strict=True)))
    photo.save(tmp_path / "a.png")
    objects = [{"words": [color], "box": box} for color, box in zip(colors, boxes, strict=True)]
    records = [replace(record("a.png"), path=tmp_path / "a.png", objects=objects)]
    (tmp_path / "out").mkdir()
    write_folder(tmp_path / "out", records, replace(SETTINGS, image_size=80, resize=resize), None)
    (objects,) = read_captions(tmp_path / "out", "train").objects
    with h5py.File(tmp_path / "out" / "train_images.hdf5") as file:
        image = file["images"][0].astype(int)
    found = {item["words"][0]: item["box"] for item in objects}
    for name, color in colors.items():
        rows, columns = np.nonzero(abs(image - np.reshape(color, (3, 1, 1))).sum(0) < 100)
        if name in found:
            seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert np.abs(np.array(found[name]) * 80 - seen).max() <= 1
        else:
            assert not len(rows) and resize == "crop"
    assert len(found) == (2 if resize == "crop" and size[0] != size[1] else 3)


def test_an_image_without_objects_keeps_the_boxes_of_its_split(tmp_path, photos):
    objects = [{"words": ["dog"], "box": [0.1, 0.1, 0.9, 0.9]}]
    records = [replace(photos[0], objects=objects), replace(photos[4], objects=[])]
    write_folder(tmp_path, records, SETTINGS, None)
    assert CaptionDataset(tmp_path, "train", Vocabulary.load(tmp_path)).has_boxes


@pytest.mark.parametrize(("captions", "warned"), [(["собака", "кошка спит"], False), (["собака"], True)])
def test_captions_of_one_word_are_warned_of(tmp_path, photos, capsys, captions, warned):
    records = [replace(record("a", captions=captions), path=photos[0].path)]
    write_folder(tmp_path, records, SETTINGS, None)
    assert ("most captions have one word" in capsys.readouterr().out) == warned


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"overwrite": True, "output_folder": "elsewhere", "format": "csv", "captions": ("b.csv",)}, True),
        ({"images": "other photos"}, False),
        ({"seed": 1}, False),
        ({"resize": "pad"}, False),
    ],
)
def test_the_fingerprint_depends_on_what_shapes_the_folder(changes, same):
    settings, records = replace(SETTINGS, captions=("a.csv",)), [record("a")]
    assert (fingerprint(replace(settings, **changes), records) == fingerprint(settings, records)) == same


@pytest.mark.parametrize(
    "changes", [{"split": "val"}, {"objects": []}, {"objects": [{"words": ["cat"]}]}, {"name": "b"}]
)
def test_the_fingerprint_depends_on_the_records(changes):
    expected = fingerprint(SETTINGS, [record("a")])
    assert fingerprint(SETTINGS, [replace(record("a"), **changes)]) != expected
    assert fingerprint(SETTINGS, [record("a", captions=["a cat"])]) != expected
