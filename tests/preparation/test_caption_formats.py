"""Captions in every format that people have: the same photos and words, or one clear line."""

import json
import unicodedata
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

import create_input_files
from preparation import caption_formats
from preparation.caption_formats import random_split, read_records
from preparation.storage import SPLITS, read_captions
from text.tokenizer import tokenize
from utils import InputError

FLICKR8K = Path(__file__).parent.parent.parent / "shared" / "flickr8k"
SAID = {"a.jpg": ["A dog, running .", "Two dogs"], "b.jpg": ['The "big" cat', "It's a cat"], "c.jpg": ["One man"]}
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
    for name in SAID:
        Image.new("RGB", (20, 10), (200, 100, 0)).save(folder / name)
    return folder


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return [path]


def write_karpathy(folder, photos):
    images = [
        {"filename": name, "split": SPLIT[name], "sentences": [{"tokens": tokenize(raw), "raw": raw} for raw in said]}
        for name, said in SAID.items()
    ]
    return write(folder / "captions.any", json.dumps({"images": images}))


def write_kaggle(folder, photos):
    lines = ["image,caption"]
    lines += ['{},"{}"'.format(name, raw.replace('"', '""')) for name, said in SAID.items() for raw in said]
    return write(folder / "captions.any", "\n".join(lines))


def write_own_csv(folder, photos):
    lines = ["\ufeffSplit;File;Caption", ""]  # as Excel writes it in some countries
    for name, said in SAID.items():
        lines += ['{};{};"{}"'.format(SPLIT[name], name, raw.replace('"', '""')) for raw in said]
    return write(folder / "captions.any", "\r\n".join(lines))


def write_flickr30k(folder, photos):
    lines = ["image_name| comment_number| comment"]
    lines += [f"{name}| {i}| {raw}" for name, said in SAID.items() for i, raw in enumerate(said)]
    lines[1] = lines[1].replace("| 0| ", "| 0   ")  # as one line of the published file
    return write(folder / "captions.any", "\n".join(lines))


def write_token(folder, photos):
    lines = [f"{name}#{i}\t{raw}" for name, said in SAID.items() for i, raw in enumerate(said)]
    lines.append("a.jpg.1#0\tA photo that is nowhere")  # as in the published file
    for split, name in {"train": "trainImages", "val": "devImages", "test": "testImages"}.items():
        write(folder / f"Flickr_8k.{name}.txt", "".join(f"{one}\n" for one in SPLIT if SPLIT[one] == split))
    return write(folder / "captions.any", "\n".join(lines) + "\n")


def write_coco(folder, photos):
    paths = []
    for split in ("train", "val", "test"):
        names = [name for name in SAID if SPLIT[name] == split]
        content = {
            "info": {},
            "images": [{"id": 100 + ord(name[0]), "file_name": name} for name in names],
            "annotations": [
                {"id": i, "image_id": 100 + ord(name[0]), "caption": raw} for name in names
                for i, raw in enumerate(SAID[name])
            ],
        }  # fmt: skip
        paths += write(folder / f"captions_{split}2014.json", json.dumps(content))
    return paths


def write_folder(folder, photos):
    for name, said in SAID.items():
        write(photos / f"{name[0]}.txt", "\n".join([*said, ""]))
    return [photos]


def write_tutorial(folder, photos):
    folder.mkdir()
    words = sorted({word for said in WORDS.values() for one in said for word in one} - {"man"})
    numbers = {word: i for i, word in enumerate(words, start=1)}
    numbers |= {"<unk>": len(words) + 1, "<start>": len(words) + 2, "<end>": len(words) + 3, "<pad>": 0}
    (folder / "WORDMAP_own_2_cap.json").write_text(json.dumps(numbers))
    for name, split in SPLIT.items():
        said = (WORDS[name] * 2)[:2]
        told = [["<start>", *(word if word in numbers else "<unk>" for word in one), "<end>"] for one in said]
        rows = [[numbers[word] for word in one] + [0] * (10 - len(one)) for one in told]
        stem = f"{split.upper()}_{{}}_own_2_cap"
        (folder / f"{stem.format('CAPTIONS')}.json").write_text(json.dumps(rows))
        (folder / f"{stem.format('CAPLENS')}.json").write_text(json.dumps([len(one) for one in told]))
        with h5py.File(folder / f"{stem.format('IMAGES')}.hdf5", "w") as file:
            file.attrs["captions_per_image"] = 2
            images = file.create_dataset("images", (1, 3, 16, 16), np.uint8)
            images[0] = np.arange(3 * 256).reshape(3, 16, 16) % 256
    return [folder]


WRITERS = {
    "karpathy": write_karpathy,
    "kaggle": write_kaggle,
    "own": write_own_csv,
    "flickr30k": write_flickr30k,
    "token": write_token,
    "coco": write_coco,
    "folder": write_folder,
    "tutorial": write_tutorial,
}
KINDS = {"kaggle": "csv", "own": "csv"}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_format_is_told_and_read(command, tmp_path, photos, writer):
    paths = WRITERS[writer](tmp_path / "given", photos)
    kind = KINDS.get(writer, writer)
    arguments = ("--dataset", "own", "--captions", *paths, "--output_folder", tmp_path / "out", "--image_size", 8)
    if not paths[0].is_dir():
        arguments += ("--images", photos)
    assert read_records([str(path) for path in paths], str(photos), "auto")[1] == kind
    for forced in ((), ("--format", kind, "--overwrite")):
        status, out, err = command(create_input_files, *arguments, "--min_word_freq", 1, *forced)
        assert status == 0, err
        metadata = json.loads((tmp_path / "out" / "dataset.json").read_text())
        assert metadata["source"]["images"] == str(paths[0] if paths[0].is_dir() else photos)
        has_splits = kind not in ("flickr30k", "folder") and writer != "kaggle"
        assert ("no splits given" in out) != has_splits
        found = {}
        for split in SPLITS:
            entries, captions = read_captions(tmp_path / "out", split)
            with h5py.File(tmp_path / "out" / f"{split}_images.hdf5") as file:
                assert file["images"].shape == (len(entries), 3, 8, 8)
            for entry, said in zip(entries, captions.decode(), strict=True):
                found[entry["image"]] = (split, said)
        if kind == "tutorial":
            unknown = [["one", "<unk>"], ["one", "<unk>"]]
            assert list(found.values()) == list(zip(SPLITS, (WORDS["a.jpg"], WORDS["b.jpg"], unknown), strict=True))
        else:
            assert {name: said for name, (_, said) in found.items()} == WORDS
            assert not has_splits or {name: split for name, (split, _) in found.items()} == SPLIT


def test_the_tutorials_images_and_words_are_taken_over(command, tmp_path, photos):
    (folder,) = write_tutorial(tmp_path / "given", photos)
    arguments = ("--dataset", "own", "--captions", folder, "--output_folder", tmp_path / "out", "--image_size", 16)
    status, out, err = command(create_input_files, *arguments)
    assert status == 0, err
    assert (
        "those of the word map" in out and "test: 1 images, 2 captions of 2 to 2 words (median 2), 50.00% <unk>" in out
    )
    with h5py.File(tmp_path / "out" / "val_images.hdf5") as file:
        assert (file["images"][0] == np.arange(3 * 256).reshape(3, 16, 16) % 256).all()
    words = json.loads((tmp_path / "out" / "word_map.json").read_text())
    assert list(words)[:6] == ["<pad>", "<start>", "<end>", "<unk>", "a", "big"] and "man" not in words


def test_a_photo_is_found_whatever_the_case_and_hidden_folders_are_not_looked_into(tmp_path, photos):
    write_folder(None, photos)
    (photos / "a.txt").rename(photos / "a.TXT")
    (photos / "b.jpg").rename(photos / "b.JPG")
    (photos / ".thumbnails").mkdir()
    Image.new("RGB", (2, 2)).save(photos / ".thumbnails" / "a.jpg")
    (photos / "no photo.txt").write_text("lonely")
    found = read_records([str(photos)], "", "auto")[0]
    assert [(photo.name, len(photo.captions)) for photo in found] == [("a.jpg", 2), ("b.JPG", 2), ("c.jpg", 1)]


def test_one_of_cocos_files_is_split_by_the_seed(tmp_path, photos):
    paths = write_coco(tmp_path / "given", photos)
    assert [photo.split for photo in read_records([str(paths[0])], str(photos), "auto")[0]] == [""]


def test_cocos_photos_lie_in_a_folder_of_the_split(tmp_path, photos):
    (tmp_path / "coco").mkdir()
    photos.rename(tmp_path / "coco" / "train2014")
    path = write_coco(tmp_path / "given", photos)[0]
    ((photo,), _) = read_records([str(path)], str(tmp_path / "coco"), "auto")
    assert photo.name == "train2014/a.jpg" and photo.path.is_file() and photo.image_id == 100 + ord("a")


def test_photos_of_one_name_in_two_folders_are_two(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "ü dog.png")
        (tmp_path / name / "ü dog.txt").write_text(f"dog {name}\n", encoding="utf-8")
    photos, kind = read_records([str(tmp_path)], "", "auto")
    assert kind == "folder"
    assert {photo.name: photo.captions[0]["raw"] for photo in photos} == {
        "one/ü dog.png": "dog one",
        "two/ü dog.png": "dog two",
    }


def test_images_and_never_captions_are_split():
    photos = [caption_formats.ImageRecord(None, str(i), i, "", []) for i in range(40)]
    for seed in (0, 1):
        split = random_split(photos, seed)
        assert [photo.name for photo in split] == [photo.name for photo in photos]
        assert [sum(photo.split == name for photo in split) for name in SPLITS] == [32, 4, 4]
    assert random_split(photos, 1) == split != random_split(photos, 0)
    assert [[photo.split for photo in random_split(photos[:n], 0)].count("train") for n in (1, 2, 3)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("Two dogs, don't  run... 42!", "two dogs dont run 42"),
        ("A t-shirt (red) & #3_x", "a t shirt red 3 x"),
        ("Cafe\u0301 ÉLAN", "caf\u00e9 élan"),  # composed
        ("İstanbul", "i\u0307stanbul"),  # lower case first, then composed
        ("एक कुत्ता दौड़ता है।", "एक कुत्ता दौड़ता है"),  # vowel signs stay
        ("\u0645\u06cc\u200c\u062e\u0648\u0631", "\u0645\u06cc\u200c\u062e\u0648\u0631"),  # Persian, joined
        ("\u200c -- ...", ""),
        ("I \u2764\ufe0f Hunde\u00adh\u00fctten 5\ufe0f\u20e3", "i hundeh\u00fctten 5\u20e3"),  # emoji, a soft hyphen
        ("它在跑。", "它在跑"),
    ],
)
def test_tokenize(caption, words):
    assert tokenize(caption) == unicodedata.normalize("NFC", words).split()


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
            '{"images": [], "annotations": [{"image_id": 1, "caption": "a"}, {"image_id": "x", "caption": ""}]}',
            "2 images have captions only, such as image_id 1",
        ),
        ("[" * 100_000, "is not valid JSON"),
        ("caption,image\nA dog", "line 2: no image is named"),
        ('image,caption\na.jpg,"A dog\nb.jpg,A cat', "is not a CSV: unexpected end of data"),
        ('{"annotations": [{"image_id": 1}], "images": []}', "no key 'caption'"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(command, tmp_path, photos, content, message):
    paths = write(tmp_path / "given.any", content)
    arguments = ("--dataset", "own", "--captions", *paths, "--images", photos, "--output_folder", tmp_path / "out")
    status, _, err = command(create_input_files, *arguments)
    line = err.strip().splitlines()[-1]
    assert status == 2 and line.startswith("create_input_files.py: error: ") and message in line, err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_paths_that_do_not_fit_are_named(tmp_path, photos):
    path = str(write(tmp_path / "given.any", "image,caption\na.jpg,A dog")[0])
    for paths, kind, message in (
        ([str(photos / "none")], "auto", "none: no such file or folder"),
        ([path, path], "auto", "only COCO's own may be several, this is --format csv"),
        ([str(photos)], "csv", "is a folder, which --format csv is not"),
        ([path], "folder", "is a file, which --format folder is not"),
    ):
        with pytest.raises(InputError, match=message):
            read_records(paths, str(photos), kind)


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


def test_the_tutorials_files_must_belong_together(tmp_path, photos):
    (folder,) = write_tutorial(tmp_path / "given", photos)
    path = folder / "VAL_CAPTIONS_own_2_cap.json"
    path.write_text(json.dumps([[99, 98, 97], [99, 98, 97]]))
    with pytest.raises(InputError, match=r"do not belong together"):
        read_records([str(folder)], "", "auto")
    word_map = folder / "WORDMAP_own_2_cap.json"
    words = word_map.read_text()
    word_map.write_text(words.replace('"a"', '"\\ud800"'))
    with pytest.raises(InputError, match=r"surrogates not allowed"):
        read_records([str(folder)], "", "auto")
    word_map.write_text(words)
    path.write_text("[]")
    with pytest.raises(InputError, match=r"do not belong together"):
        read_records([str(folder)], "", "auto")


@pytest.mark.skipif(not FLICKR8K.is_dir(), reason="Flickr8k does not lie beside the checkout")
def test_two_formats_of_flickr8k_say_the_same():
    """What the README says of their words."""
    karpathy, kaggle = (
        {
            photo.name: [caption["words"] for caption in photo.captions]
            for photo in read_records([str(path)], "", "auto")[0]
        }
        for path in (FLICKR8K / "dataset_flickr8k.json", FLICKR8K / "captions.txt")
    )
    assert karpathy.keys() == kaggle.keys() and sum(map(len, karpathy.values())) == 35_000
    other = [(one, two) for name in kaggle for one, two in zip(karpathy[name], kaggle[name], strict=True) if one != two]
    symbols = sum(any(symbol in " ".join(one) for symbol in "()#&") for one, _ in other)
    joined = sum("".join(one) == "".join(two) for one, two in other)
    assert (len(other), symbols, joined) == (28, 21, 7)


def test_sides_of_boxes_may_be_whole_numbers(tmp_path, photos):
    thing = {"words": ["red", "circle"], "box": [0, 0.5, 1, 1]}
    image = {"filename": "a.jpg", "split": "val", "objects": [thing], "sentences": [{"tokens": ["a"], "raw": "A"}]}
    path = write(tmp_path / "given.any", json.dumps({"images": [image]}))[0]
    assert read_records([str(path)], str(photos), "auto")[0][0].objects == [thing]
