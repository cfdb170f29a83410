"""Every caption format: the same photos and words, or one clear line."""

import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

import create_input_files
from caption_files import (
    CAPTIONS,
    KINDS,
    SPLIT,
    WORDS,
    WRITERS,
    write,
    write_coco,
    write_folder,
    write_token,
    write_tutorial,
)
from preparation.caption_formats import FORMATS, random_split, read_records
from preparation.records import ImageRecord
from preparation.storage import SPLITS, read_captions
from utils import InputError

REAL_DATA = os.environ.get("CAPTIONING_REAL_DATA", "")  # a folder with flickr8k/


@pytest.fixture
def photos(tmp_path):
    """Three photos in a folder."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in CAPTIONS:
        Image.new("RGB", (20, 10), (200, 100, 0)).save(folder / name)
    return folder


def read(paths, photos="", kind="auto"):
    """Read captions; returns their records."""
    return read_records([str(path) for path in paths], str(photos), kind)[0]


@pytest.mark.parametrize("writer", WRITERS)
def test_every_format_is_detected_and_prepared(command, tmp_path, photos, writer):
    paths = WRITERS[writer](tmp_path / "given", photos)
    kind = KINDS.get(writer, writer)
    detected = read_records([str(path) for path in paths], str(photos), "auto")
    assert detected == (read(paths, photos, kind), kind) and kind in FORMATS
    arguments = ("--dataset", "own", "--captions", *paths, "--output_folder", tmp_path / "out", "--image_size", 8)
    if not paths[0].is_dir():
        arguments += ("--images", photos)
    status, out, err = command(create_input_files, *arguments, "--min_word_freq", 1)
    assert status == 0, err
    metadata = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert metadata["source"]["images"] == str(paths[0] if paths[0].is_dir() else photos)
    has_splits = kind not in ("flickr30k", "folder") and writer != "kaggle"
    assert ("no splits given: 1 images for val and 1 for test, seed 0" in out) != has_splits
    found = {}
    for split in SPLITS:
        entries, packed, _ = read_captions(tmp_path / "out", split)
        with h5py.File(tmp_path / "out" / f"{split}_images.hdf5") as file:
            assert file["images"].shape == (len(entries), 3, 8, 8)
        for entry, captions in zip(entries, packed.decode(), strict=True):
            found[entry["image"]] = (split, captions)
    if kind == "tutorial":
        expected = (WORDS["a.jpg"], WORDS["b.jpg"], [["one", "<unk>"]] * 2)
        assert list(found.values()) == list(zip(SPLITS, expected, strict=True))
    else:
        assert {name: captions for name, (_, captions) in found.items()} == WORDS
        assert not has_splits or {name: split for name, (split, _) in found.items()} == SPLIT
    status, out, _ = command(create_input_files, *arguments, "--min_word_freq", 1, "--format", kind)
    assert status == 0 and "exists already, made with the same settings" in out


def test_the_tutorials_images_and_words_are_taken_over(command, tmp_path, photos):
    (folder,) = write_tutorial(tmp_path / "given", photos)
    arguments = ("--dataset", "own", "--captions", folder, "--output_folder", tmp_path / "out", "--image_size", 16)
    status, out, err = command(create_input_files, *arguments)
    assert status == 0, err
    assert "those of the word map" in out
    assert "test: 1 images, 2 captions of 2 to 2 words (median 2), 50.00% <unk>" in out
    with h5py.File(tmp_path / "out" / "val_images.hdf5") as file:
        assert (file["images"][0] == np.arange(3 * 256).reshape(3, 16, 16) % 256).all()
    words = json.loads((tmp_path / "out" / "word_map.json").read_text())
    assert list(words)[:6] == ["<pad>", "<start>", "<end>", "<unk>", "a", "big"] and "man" not in words


def test_hidden_folders_are_skipped_and_suffixes_may_be_upper_case(tmp_path, photos, capsys):
    write_folder(None, photos)
    (photos / "a.txt").rename(photos / "a.TXT")
    (photos / "b.jpg").rename(photos / "b.JPG")
    (photos / ".thumbnails").mkdir()
    Image.new("RGB", (2, 2)).save(photos / ".thumbnails" / "a.jpg")
    (photos / "no photo.txt").write_text("unpaired")
    records = read([photos])
    assert [(record.name, len(record.captions)) for record in records] == [("a.jpg", 2), ("b.JPG", 2), ("c.jpg", 1)]
    assert "1 .txt files have no photo beside them, such as 'no photo.txt'" in capsys.readouterr().out


def test_cocos_photos_may_lie_in_a_folder_of_the_split(tmp_path, photos):
    (tmp_path / "coco").mkdir()
    photos.rename(tmp_path / "coco" / "train2014")
    path = write_coco(tmp_path / "given", photos)[0]
    (record,) = read([path], tmp_path / "coco")
    assert (
        record.split == ""
        and record.name == "train2014/a.jpg"
        and record.path.is_file()
        and record.image_id == 100 + ord("a")
    )


def test_photos_of_the_same_name_in_two_folders_are_two(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "ü dog.png")
        (tmp_path / name / "ü dog.txt").write_text(f"dog {name}\n", encoding="utf-8")
    assert {record.name: record.captions[0]["raw"] for record in read([tmp_path])} == {
        "one/ü dog.png": "dog one",
        "two/ü dog.png": "dog two",
    }


@pytest.mark.parametrize("box", [[0, 0.5, 1, 1], [0, 12, 100, 60]])
def test_boxes_are_fractions_and_may_be_integers(tmp_path, photos, box):
    item = {"words": ["red", "circle"], "box": box}
    image = {"filename": "a.jpg", "split": "val", "objects": [item], "sentences": [{"tokens": ["a"], "raw": "A"}]}
    path = write(tmp_path / "given.any", json.dumps({"images": [image]}))
    if max(box) <= 1:
        assert read(path, photos)[0].objects == [item]
    else:
        with pytest.raises(
            InputError, match=r"a\.jpg: a box is .* in fractions of the photo's sides, not \[0, 12, 100"
        ):
            read(path, photos)


# ------------------------------------------------------------------------------------------------ random splits

UNSPLIT = [ImageRecord(Path("photo.jpg"), str(i), i, "", b"[]") for i in range(40)]


@pytest.mark.parametrize(("count", "sizes"), [(1, [1, 0, 0]), (2, [1, 1, 0]), (3, [1, 1, 1]), (40, [32, 4, 4])])
def test_a_tenth_of_the_images_each_is_for_val_and_test(count, sizes):
    records = random_split(UNSPLIT[:count], 0)
    assert [record.name for record in records] == [record.name for record in UNSPLIT[:count]]
    assert [sum(record.split == name for record in records) for name in SPLITS] == sizes


def test_the_seed_chooses_the_split():
    assert random_split(UNSPLIT, 1) == random_split(UNSPLIT, 1) != random_split(UNSPLIT, 0)


# ------------------------------------------------------------------------------------------------ errors


def karpathy_image(**changes):
    """Karpathy's JSON of one image."""
    return json.dumps({"images": [{"filename": "c.jpg", "split": "val", "sentences": []} | changes]})


def coco(images, annotations):
    return json.dumps({"images": images, "annotations": annotations})


DOG = {"words": ["dog"], "box": [0, 0, 1, 1]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "given.any starts with '': neither a CSV"),
        (b"\xff\xfe\x00", "is not a text file in UTF-8"),
        ("photo;text\nc.jpg;hello", "starts with 'photo;text': neither a CSV"),
        ("caption,image\nA dog", "line 2: no image"),
        ("image,caption\nc.jpg", "line 2: no caption"),
        ("image,caption\nc.jpg,A dog, a cat", "line 2: a caption with commas must be in quotes"),
        ('image,caption\na.jpg,"A dog\nb.jpg,A cat', "is not a CSV: unexpected end of data"),
        ("file,caption,split\na.jpg,A dog,train\na.jpg,A cat,val", "line 3: a.jpg is in train and in val"),
        ("file,caption,split\na.jpg,A dog,", "line 2: unknown split '', not one of"),
        ("image_name| comment_number| comment\na.jpg A dog", "line 2: not image_name"),
        ("a.jpg#0\tA dog\nA cat", "line 2: not an image's name"),
        ("{", "is not valid JSON"),
        ("[1, 2]", "images[0] has an unexpected format, is this Karpathy's JSON"),
        ('{"pictures": []}', "no key 'images'"),
        ('{"images": []}', "names no images"),
        ('{"images": [3]}', "is this Karpathy's JSON"),
        ('{"images": [{"filename": "c.jpg", "sentences": []}]}', "no key 'split' in images[0]"),
        (karpathy_image(), "photos are unusable"),
        (karpathy_image(split="all"), "c.jpg: unknown split 'all'"),
        (karpathy_image(filename="\ud800"), "surrogates not allowed"),
        (karpathy_image(sentences=[{"raw": "x"}]), "no key 'tokens'"),
        (karpathy_image(sentences=[{"raw": "x", "tokens": "x"}]), "unexpected format"),
        (karpathy_image(objects=[3]), "unexpected format"),
        (karpathy_image(objects=[DOG | {"score": "high"}]), "unexpected format"),
        (json.dumps({"images": 2 * json.loads(karpathy_image())["images"]}), "names c.jpg as 2 images"),
        ('{"images": [{"file_name": "a.jpg"}]}', "no key 'annotations'"),
        (coco([{"file_name": "a.jpg"}], []), "no key 'id'"),
        (coco([{"file_name": 5, "id": 1}], []), "unexpected format"),
        (coco([], [{"image_id": 1}]), "no key 'caption'"),
        (
            coco([{"file_name": "a.jpg", "id": 1}], [{"image_id": 2, "caption": "A dog"}]),
            "1 images have captions but are not listed under images, such as image_id 2",
        ),
    ],
)
def test_unreadable_captions_are_named_in_one_line(command, tmp_path, photos, content, message):
    path = tmp_path / "given.any"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    arguments = ("--dataset", "own", "--captions", path, "--images", photos, "--output_folder", tmp_path / "out")
    status, _, err = command(create_input_files, *arguments)
    line = err.strip().splitlines()[-1]
    assert status == 2 and line.startswith("create_input_files.py: error: ") and message in line, err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("captions", "kind", "message"),
    [
        (["given.any", "given.any"], "auto", "--format csv takes one file, only coco takes several"),
        (["photos"], "csv", "is a folder, but --format csv takes a file"),
        (["given.any"], "folder", "is a file, but --format folder takes a folder"),
    ],
)
def test_paths_that_do_not_fit_are_named(tmp_path, photos, captions, kind, message):
    write(tmp_path / "given.any", "image,caption\na.jpg,A dog")
    with pytest.raises(InputError, match=message):
        read([tmp_path / name for name in captions], photos, kind)


@pytest.mark.parametrize("name", ["devImages", "CAPLENS", "WORDMAP"])
def test_missing_parts_are_named(tmp_path, photos, name):
    paths = (write_token if name == "devImages" else write_tutorial)(tmp_path / "given", photos)
    next((tmp_path / "given").glob(f"*{name}*")).unlink()
    with pytest.raises(InputError, match=name):
        read(paths, photos, "token" if name == "devImages" else "tutorial")


@pytest.mark.parametrize("content", ["[]", "[[99, 98, 97], [99, 98, 97]]"])
def test_the_tutorials_files_must_belong_together(tmp_path, photos, content):
    (folder,) = write_tutorial(tmp_path / "given", photos)
    (folder / "VAL_CAPTIONS_own_2_cap.json").write_text(content)
    with pytest.raises(InputError, match=r"VAL_IMAGES.*, or does not belong to the captions"):
        read([folder])


def test_the_tutorials_images_must_not_lie_in_other_files(tmp_path, photos):
    (folder,) = write_tutorial(tmp_path / "given", photos)
    path = next(folder.glob("VAL_IMAGES_*.hdf5"))
    path.rename(tmp_path / "other.hdf5")
    with h5py.File(path, "w") as file:
        file["images"] = h5py.ExternalLink(str(tmp_path / "other.hdf5"), "images")
        file.attrs["captions_per_image"] = 2
    with pytest.raises(InputError, match=r"VAL_IMAGES_.* is refused: images is a link or lies in other files"):
        read([folder])


def test_split_lists_must_not_contradict_each_other(tmp_path, photos):
    (path,) = write_token(tmp_path / "given", photos)
    (path.parent / "Flickr_8k.testImages.txt").write_text("a.jpg\n")
    with pytest.raises(InputError, match=r"testImages\.txt: a\.jpg is also in the list of train"):
        read([path], photos)


@pytest.mark.skipif(not REAL_DATA, reason="CAPTIONING_REAL_DATA names no folder of real data")
def test_two_formats_of_flickr8k_have_the_same_words():
    """The differences that docs/data.md reports."""
    karpathy, kaggle = (
        {
            record.name: [caption["words"] for caption in record.captions]
            for record in read([Path(REAL_DATA) / "flickr8k" / name])
        }
        for name in ("dataset_flickr8k.json", "captions.txt")
    )
    assert karpathy.keys() == kaggle.keys() and sum(map(len, karpathy.values())) == 35_000
    pairs = [pair for name in kaggle for pair in zip(karpathy[name], kaggle[name], strict=True)]
    different = [(first, second) for first, second in pairs if first != second]
    symbols = sum(any(symbol in " ".join(words) for symbol in "()#&") for words, _ in different)
    joined = sum("".join(first) == "".join(second) for first, second in different)
    assert (len(different), symbols, joined) == (28, 21, 7)
