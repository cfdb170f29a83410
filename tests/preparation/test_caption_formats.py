"""Every caption format: the same photos and words, or one clear line."""

import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

import create_input_files
from preparation.caption_formats import FORMATS, random_split, read_records
from preparation.records import ImageRecord
from preparation.storage import SPLITS, read_captions
from text.tokenizer import tokenize
from utils import InputError

REAL_DATA = os.environ.get("CAPTIONING_REAL_DATA", "")  # a folder with flickr8k/
CAPTIONS = {"a.jpg": ["A dog, running .", "Two dogs"], "b.jpg": ['The "big" cat', "It's a cat"], "c.jpg": ["One man"]}
WORDS = {
    "a.jpg": [["a", "dog", "running"], ["two", "dogs"]],
    "b.jpg": [["the", "big", "cat"], ["its", "a", "cat"]],
    "c.jpg": [["one", "man"]],
}
SPLIT = {"a.jpg": "train", "b.jpg": "val", "c.jpg": "test"}


@pytest.fixture
def photos(tmp_path):
    """Three photos in a folder."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in CAPTIONS:
        Image.new("RGB", (20, 10), (200, 100, 0)).save(folder / name)
    return folder


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return [path]


def write_karpathy(folder, photos):
    images = [
        {
            "filename": name,
            "split": SPLIT[name],
            "sentences": [{"tokens": tokenize(raw), "raw": raw} for raw in captions],
        }
        for name, captions in CAPTIONS.items()
    ]
    return write(folder / "captions.any", json.dumps({"images": images}))


def write_kaggle(folder, photos):
    lines = ["image,caption"]
    lines += ['{},"{}"'.format(name, raw.replace('"', '""')) for name, captions in CAPTIONS.items() for raw in captions]
    return write(folder / "captions.any", "\n".join(lines))


def write_split_csv(folder, photos):
    lines = ["\ufeffSplit;File;Caption", ""]  # as Excel writes it in some countries
    for name, captions in CAPTIONS.items():
        lines += ['{};{};"{}"'.format(SPLIT[name], name, raw.replace('"', '""')) for raw in captions]
    return write(folder / "captions.any", "\r\n".join(lines))


def write_flickr30k(folder, photos):
    lines = ["image_name| comment_number| comment"]
    lines += [f"{name}| {i}| {raw}" for name, captions in CAPTIONS.items() for i, raw in enumerate(captions)]
    lines[1] = lines[1].replace("| 0| ", "| 0   ")  # as one line of the published file
    return write(folder / "captions.any", "\n".join(lines))


def write_token(folder, photos):
    lines = [f"{name}#{i}\t{raw}" for name, captions in CAPTIONS.items() for i, raw in enumerate(captions)]
    lines.append("a.jpg.1#0\tA photo that is nowhere")  # as in the published file
    for split, name in {"train": "trainImages", "val": "devImages", "test": "testImages"}.items():
        write(folder / f"Flickr_8k.{name}.txt", "".join(f"{photo}\n" for photo in SPLIT if SPLIT[photo] == split))
    return write(folder / "captions.any", "\n".join(lines) + "\n")


def write_coco(folder, photos):
    paths = []
    for split in ("train", "val", "test"):
        names = [name for name in CAPTIONS if SPLIT[name] == split]
        content = {
            "info": {},
            "images": [{"id": 100 + ord(name[0]), "file_name": name} for name in names],
            "annotations": [
                {"id": i, "image_id": 100 + ord(name[0]), "caption": raw} for name in names
                for i, raw in enumerate(CAPTIONS[name])
            ],
        }  # fmt: skip
        paths += write(folder / f"captions_{split}2014.json", json.dumps(content))
    return paths


def write_folder(folder, photos):
    for name, captions in CAPTIONS.items():
        write(photos / f"{name[0]}.txt", "\n".join([*captions, ""]))
    return [photos]


def write_tutorial(folder, photos):
    folder.mkdir()
    words = sorted({word for captions in WORDS.values() for words in captions for word in words} - {"man"})
    word2idx = {word: i for i, word in enumerate(words, start=1)}
    word2idx |= {"<unk>": len(words) + 1, "<start>": len(words) + 2, "<end>": len(words) + 3, "<pad>": 0}
    (folder / "WORDMAP_own_2_cap.json").write_text(json.dumps(word2idx))
    for name, split in SPLIT.items():
        captions = [["<start>", *words, "<end>"] for words in (WORDS[name] * 2)[:2]]
        encoded = [[word2idx.get(word, word2idx["<unk>"]) for word in words] for words in captions]
        padded = [word_ids + [0] * (10 - len(word_ids)) for word_ids in encoded]
        stem = f"{split.upper()}_{{}}_own_2_cap"
        (folder / f"{stem.format('CAPTIONS')}.json").write_text(json.dumps(padded))
        (folder / f"{stem.format('CAPLENS')}.json").write_text(json.dumps([len(words) for words in captions]))
        with h5py.File(folder / f"{stem.format('IMAGES')}.hdf5", "w") as file:
            file.attrs["captions_per_image"] = 2
            images = file.create_dataset("images", (1, 3, 16, 16), np.uint8)
            images[0] = np.arange(3 * 256).reshape(3, 16, 16) % 256
    return [folder]


WRITERS = {
    "karpathy": write_karpathy,
    "kaggle": write_kaggle,
    "split_csv": write_split_csv,
    "flickr30k": write_flickr30k,
    "token": write_token,
    "coco": write_coco,
    "folder": write_folder,
    "tutorial": write_tutorial,
}
KINDS = {"kaggle": "csv", "split_csv": "csv"}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_format_is_detected(tmp_path, photos, writer):
    paths = WRITERS[writer](tmp_path / "given", photos)
    kind = KINDS.get(writer, writer)
    detected = read_records([str(path) for path in paths], str(photos), "auto")
    assert detected == read_records([str(path) for path in paths], str(photos), kind)
    assert detected[1] == kind and kind in FORMATS


@pytest.mark.parametrize("writer", WRITERS)
def test_every_format_is_prepared(command, tmp_path, photos, writer):
    paths = WRITERS[writer](tmp_path / "given", photos)
    kind = KINDS.get(writer, writer)
    arguments = ("--dataset", "own", "--captions", *paths, "--output_folder", tmp_path / "out", "--image_size", 8)
    if not paths[0].is_dir():
        arguments += ("--images", photos)
    for forced in ((), ("--format", kind, "--overwrite")):
        status, out, err = command(create_input_files, *arguments, "--min_word_freq", 1, *forced)
        assert status == 0, err
        metadata = json.loads((tmp_path / "out" / "dataset.json").read_text())
        assert metadata["source"]["images"] == str(paths[0] if paths[0].is_dir() else photos)
        has_splits = kind not in ("flickr30k", "folder") and writer != "kaggle"
        assert ("no splits given" in out) != has_splits
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
    records = read_records([str(photos)], "", "auto")[0]
    assert [(record.name, len(record.captions)) for record in records] == [("a.jpg", 2), ("b.JPG", 2), ("c.jpg", 1)]
    assert "1 .txt files have no photo beside them, such as 'no photo.txt'" in capsys.readouterr().out


def test_one_of_cocos_files_has_no_splits(tmp_path, photos):
    paths = write_coco(tmp_path / "given", photos)
    assert [record.split for record in read_records([str(paths[0])], str(photos), "auto")[0]] == [""]


def test_cocos_photos_may_lie_in_a_folder_of_the_split(tmp_path, photos):
    (tmp_path / "coco").mkdir()
    photos.rename(tmp_path / "coco" / "train2014")
    path = write_coco(tmp_path / "given", photos)[0]
    ((record,), _) = read_records([str(path)], str(tmp_path / "coco"), "auto")
    assert record.name == "train2014/a.jpg" and record.path.is_file() and record.image_id == 100 + ord("a")


def test_photos_of_the_same_name_in_two_folders_are_two(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "ü dog.png")
        (tmp_path / name / "ü dog.txt").write_text(f"dog {name}\n", encoding="utf-8")
    records, kind = read_records([str(tmp_path)], "", "auto")
    assert kind == "folder"
    assert {record.name: record.captions[0]["raw"] for record in records} == {
        "one/ü dog.png": "dog one",
        "two/ü dog.png": "dog two",
    }


def test_coordinates_of_boxes_may_be_integers(tmp_path, photos):
    item = {"words": ["red", "circle"], "box": [0, 0.5, 1, 1]}
    image = {"filename": "a.jpg", "split": "val", "objects": [item], "sentences": [{"tokens": ["a"], "raw": "A"}]}
    path = write(tmp_path / "given.any", json.dumps({"images": [image]}))[0]
    assert read_records([str(path)], str(photos), "auto")[0][0].objects == [item]


def test_boxes_in_pixels_are_named(tmp_path, photos):
    item = {"words": ["red", "circle"], "box": [0, 12, 100, 60]}
    image = {"filename": "a.jpg", "split": "val", "objects": [item], "sentences": [{"tokens": ["a"], "raw": "A"}]}
    path = write(tmp_path / "given.any", json.dumps({"images": [image]}))[0]
    with pytest.raises(
        InputError, match=r"a\.jpg: a box is .* in fractions of the photo's sides, not \[0, 12, 100, 60\]"
    ):
        read_records([str(path)], str(photos), "auto")


# ------------------------------------------------------------------------------------------------ random splits

UNSPLIT = [ImageRecord(Path("photo.jpg"), str(i), i, "", b"[]") for i in range(40)]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_tenth_of_the_images_each_is_for_val_and_test(seed):
    records = random_split(UNSPLIT, seed)
    assert [record.name for record in records] == [record.name for record in UNSPLIT]
    assert [sum(record.split == name for record in records) for name in SPLITS] == [32, 4, 4]


def test_the_seed_chooses_the_split():
    assert random_split(UNSPLIT, 1) == random_split(UNSPLIT, 1) != random_split(UNSPLIT, 0)


@pytest.mark.parametrize(("count", "sizes"), [(1, [1, 0, 0]), (2, [1, 1, 0]), (3, [1, 1, 1])])
def test_few_images_are_split_too(count, sizes):
    records = random_split(UNSPLIT[:count], 0)
    assert [sum(record.split == name for record in records) for name in SPLITS] == sizes


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,caption,split\na.jpg,A dog,train\na.jpg,A cat,val", "line 3: a.jpg is in train and in val"),
        ("file,caption,split\na.jpg,A dog,", "has the split '', not one of"),
        ("image_name| comment_number| comment\na.jpg A dog", "line 2: not image_name"),
        ("a.jpg#0\tA dog\nA cat", "line 2: not an image's name"),
        ('{"images": [{"file_name": "a.jpg"}]}', "no key 'annotations'"),
        ('{"annotations": [], "images": [{"file_name": "a.jpg"}]}', "no key 'id'"),
        (
            '{"images": [{"file_name": "a.jpg", "id": 1}], "annotations": [{"image_id": 2, "caption": "A dog"}]}',
            "1 images have captions only, such as image_id 2",
        ),
        ('{"images": [{"file_name": 5, "id": 1}], "annotations": []}', "another form"),
        (
            '{"images": [{"filename": "a.jpg", "split": "val", "sentences": []},'
            '{"filename": "a.jpg", "split": "train", "sentences": []}]}',
            "names a.jpg as 2 images",
        ),
        ('{"images": [{"filename": "\\ud800", "split": "val", "sentences": []}]}', "surrogates not allowed"),
        ('{"images": [{"filename": "a.jpg", "split": "val", "sentences": [], "objects": [3]}]}', "another form"),
        (
            '{"images": [{"filename": "a.jpg", "split": "val", "sentences": [], '
            '"objects": [{"words": ["dog"], "box": [0, 0, 1, 1], "score": "high"}]}]}',
            "another form",
        ),
        (
            '{"images": [], "annotations": [{"image_id": 1, "caption": "a"}, {"image_id": "x", "caption": ""}]}',
            "2 images have captions only, such as image_id 1",
        ),
        ("[" * 100_000, "is not valid JSON"),
        ("caption,image\nA dog", "line 2: no image is named"),
        ('image,caption\na.jpg,"A dog\nb.jpg,A cat', "is not a CSV: unexpected end of data"),
        ('{"annotations": [{"image_id": 1}], "images": []}', "no key 'caption'"),
        ("{", "is not valid JSON"),
        ('{"pictures": []}', "no key 'images'"),
        ('{"images": []}', "names no images"),
        ('{"images": [{"filename": "c.jpg", "sentences": []}]}', "no key 'split' in images[0]"),
        ('{"images": [{"filename": "c.jpg", "split": "all", "sentences": []}]}', "has the split 'all'"),
        ('{"images": [{"filename": "c.jpg", "split": "val", "sentences": [{"raw": "x"}]}]}', "no key 'tokens'"),
        ('{"images": [{"filename": "c.jpg", "split": "val", "sentences": []}]}', "photos are unusable"),
        ("", "given.any: an empty file"),
        ("photo;text\nc.jpg;hello", "starts with 'photo;text': neither a CSV"),
        ("image,caption\nc.jpg", "line 2: no caption for 'c.jpg'"),
        ("image,caption\nc.jpg,A dog, a cat", "line 2: a caption with commas must be in quotes"),
        (
            '{"images": [{"filename": "c.jpg", "split": "val", "sentences": [{"raw": "x", "tokens": "x"}]}]}',
            "another form",
        ),
        ("[1, 2]", "images[0] has another form, is this Karpathy's JSON"),
        ('{"images": [3]}', "is this Karpathy's JSON"),
        (b"\xff\xfe\x00", "is not a text file in UTF-8"),
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
        read_records([str(tmp_path / name) for name in captions], str(photos), kind)


@pytest.mark.parametrize(
    "missing", ["Flickr_8k.devImages.txt", "TRAIN_CAPLENS_own_2_cap.json", "WORDMAP_own_2_cap.json"]
)
def test_missing_parts_are_named(tmp_path, photos, missing):
    writer = write_token if "Flickr" in missing else write_tutorial
    paths = writer(tmp_path / "given", photos)
    (tmp_path / "given" / missing).unlink()
    kind = "token" if "Flickr" in missing else "tutorial"
    with pytest.raises(InputError, match="WORDMAP" if "WORDMAP" in missing else missing):
        read_records([str(path) for path in paths], str(photos), kind)


@pytest.mark.parametrize("content", ["[]", "[[99, 98, 97], [99, 98, 97]]"])
def test_the_tutorials_files_must_belong_together(tmp_path, photos, content):
    (folder,) = write_tutorial(tmp_path / "given", photos)
    (folder / "VAL_CAPTIONS_own_2_cap.json").write_text(content)
    with pytest.raises(InputError, match=r"do not belong together"):
        read_records([str(folder)], "", "auto")


def test_the_tutorials_words_must_be_unicode(tmp_path, photos):
    (folder,) = write_tutorial(tmp_path / "given", photos)
    word_map = folder / "WORDMAP_own_2_cap.json"
    word_map.write_text(word_map.read_text().replace('"a"', '"\\ud800"'))
    with pytest.raises(InputError, match=r"surrogates not allowed"):
        read_records([str(folder)], "", "auto")


def test_the_tutorials_images_must_not_lie_in_other_files(tmp_path, photos):
    (folder,) = write_tutorial(tmp_path / "given", photos)
    path = next(folder.glob("VAL_IMAGES_*.hdf5"))
    path.rename(tmp_path / "other.hdf5")
    with h5py.File(path, "w") as file:
        file["images"] = h5py.ExternalLink(str(tmp_path / "other.hdf5"), "images")
        file.attrs["captions_per_image"] = 2
    with pytest.raises(InputError, match=r"VAL_IMAGES_.* is refused: images is a link or lies in other files"):
        read_records([str(folder)], "", "auto")


def test_split_lists_must_not_contradict_each_other(tmp_path, photos):
    (path,) = write_token(tmp_path / "given", photos)
    (path.parent / "Flickr_8k.testImages.txt").write_text("a.jpg\n")
    with pytest.raises(InputError, match=r"testImages\.txt: a\.jpg is also in the list of train"):
        read_records([str(path)], str(photos), "token")


@pytest.mark.skipif(not REAL_DATA, reason="CAPTIONING_REAL_DATA names no folder of real data")
def test_two_formats_of_flickr8k_have_the_same_words():
    """The differences that docs/data.md reports."""
    karpathy, kaggle = (
        {
            record.name: [caption["words"] for caption in record.captions]
            for record in read_records([str(Path(REAL_DATA) / "flickr8k" / name)], "", "auto")[0]
        }
        for name in ("dataset_flickr8k.json", "captions.txt")
    )
    assert karpathy.keys() == kaggle.keys() and sum(map(len, karpathy.values())) == 35_000
    pairs = [pair for name in kaggle for pair in zip(karpathy[name], kaggle[name], strict=True)]
    different = [(first, second) for first, second in pairs if first != second]
    symbols = sum(any(symbol in " ".join(words) for symbol in "()#&") for words, _ in different)
    joined = sum("".join(first) == "".join(second) for first, second in different)
    assert (len(different), symbols, joined) == (28, 21, 7)
