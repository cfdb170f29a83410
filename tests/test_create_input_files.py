"""The script as users run it: prepared folders, what is chosen, what is replaced, and errors in one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

import create_input_files
import train
from conftest import flags
from preparation.storage import read_captions


@pytest.fixture
def photos(tmp_path):
    """Three photos in a folder."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, name in enumerate(("a b.jpg", "é.png", "c.jpg")):
        Image.new("RGB", (20, 10), (80 * i, 0, 0)).save(folder / name)
    return folder


def karpathy(path, splits=("train", "restval", "test"), **extra):
    """Write Karpathy's JSON for the three photos; a split of None leaves the photo out."""
    sentences = [{"tokens": ["a", "cat"], "raw": "A cat."}, {"tokens": ["a", "dog"], "raw": "A dog!"}]
    images = [
        {"filename": name, "split": split, "imgid": 7, "sentences": sentences, **extra}
        for name, split in zip(("a b.jpg", "é.png", "c.jpg"), splits, strict=True)
        if split
    ]
    path.write_text(json.dumps({"images": images}))
    return path


def prepare(command, tmp_path, captions, images, *more):
    arguments = ("--dataset", "own", "--captions", captions, "--images", images, "--output_folder", tmp_path / "out")
    return command(create_input_files, *arguments, "--image_size", 8, "--min_word_freq", 1, *more)


def test_karpathy_json(command, tmp_path, photos):
    status, out, _ = prepare(command, tmp_path, karpathy(tmp_path / "captions.json"), photos)
    assert status == 0, out
    metadata = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert [metadata["splits"][split]["images"] for split in ("train", "val", "test")] == [2, 0, 1]
    entries = json.loads((tmp_path / "out" / "train_captions.json").read_text())
    assert entries[1] == {
        "image": "é.png",
        "image_id": 7,
        "captions": [{"words": ["a", "cat"], "raw": "A cat."}, {"words": ["a", "dog"], "raw": "A dog!"}],
    }
    with h5py.File(tmp_path / "out" / "train_images.hdf5") as file:
        assert file["images"].shape == (2, 3, 8, 8) and file["images"].dtype == np.uint8
        assert file["images"][1, 0].min() == 80
    words = json.loads((tmp_path / "out" / "word_map.json").read_text())
    assert words == {"<pad>": 0, "<start>": 1, "<end>": 2, "<unk>": 3, "a": 4, "cat": 5, "dog": 6}


def test_coco_has_its_photos_in_folders(command, tmp_path, photos):
    (tmp_path / "coco").mkdir()
    shutil.move(photos, tmp_path / "coco" / "val2014")
    captions = karpathy(tmp_path / "captions.json", (None, None, "test"), filepath="val2014", cocoid=42)
    status, _, _ = prepare(command, tmp_path, captions, tmp_path / "coco")  # a test split alone is a good folder
    entries = json.loads((tmp_path / "out" / "test_captions.json").read_text())
    assert status == 0 and entries[0]["image_id"] == 42 and entries[0]["image"] == "val2014/c.jpg"


# ------------------------------------------------------------------------------------------------ replaced folders


def test_a_folder_with_other_files_is_left_alone(command, tmp_path, photos):
    status, _, err = prepare(command, tmp_path, karpathy(tmp_path / "captions.json"), photos, "--output_folder", photos)
    assert status == 2 and "photos holds other files: give another --output_folder" in err
    assert len(list(photos.iterdir())) == 3


def test_overwrite_removes_owned_files_only(command, tmp_path, photos):
    output = tmp_path / "out"
    assert prepare(command, tmp_path, karpathy(tmp_path / "captions.json", ("train", "val", "test")), photos)[0] == 0
    assert command(create_input_files, "--preview", output)[0] == 0
    (output / "features").mkdir()
    (output / "notes.txt").write_text("mine")
    captions = karpathy(tmp_path / "captions.json", ("train", "train", None))
    status, _, err = prepare(command, tmp_path, captions, photos)
    assert status == 2 and "--overwrite replaces it" in err
    assert prepare(command, tmp_path, captions, photos, "--overwrite")[0] == 0
    names = {"train_images.hdf5", "train_captions.json", "word_map.json", "dataset.json", "notes.txt"}
    assert {path.name for path in output.iterdir()} == names


def test_a_half_replaced_folder_is_completed(command, tmp_path, photos):
    captions = karpathy(tmp_path / "captions.json", ("train", "train", None))
    assert prepare(command, tmp_path, captions, photos)[0] == 0
    (tmp_path / "out" / "dataset.json").unlink()  # what a killed run leaves
    (tmp_path / "out" / "notes.txt").write_text("mine")
    status, _, err = prepare(command, tmp_path, captions, photos, "--overwrite")
    assert status == 2 and "out holds other files: give another --output_folder" in err
    (tmp_path / "out" / "notes.txt").unlink()
    assert prepare(command, tmp_path, captions, photos)[0] == 0
    assert (tmp_path / "out" / "dataset.json").is_file()


def test_the_same_settings_change_nothing_and_others_need_overwrite(command, tmp_path, photos):
    captions = karpathy(tmp_path / "captions.json")
    assert prepare(command, tmp_path, captions, photos)[0] == 0
    written = (tmp_path / "out" / "dataset.json").stat().st_mtime_ns
    (tmp_path / "out" / "features").mkdir()
    status, out, _ = prepare(command, tmp_path, captions, photos)
    assert status == 0 and "exists already, made with the same settings" in out
    assert (tmp_path / "out" / "dataset.json").stat().st_mtime_ns == written
    assert (tmp_path / "out" / "features").exists()
    status, _, err = prepare(command, tmp_path, captions, photos, "--seed", 1)
    assert status == 2 and "--overwrite replaces it" in err


@pytest.mark.parametrize("name", ["train_images.hdf5", "train_captions.json", "word_map.json"])
@pytest.mark.parametrize("is_lost", [True, False], ids=["lost", "cut"])
def test_a_lost_file_is_no_dead_end(command, tmp_path, photos, name, is_lost):
    """What train.py says to do is possible, and works."""
    captions = karpathy(tmp_path / "captions.json", ("train", "val", "test"))
    assert prepare(command, tmp_path, captions, photos)[0] == 0
    path = tmp_path / "out" / name
    content = path.read_bytes()
    path.unlink() if is_lost else path.write_bytes(content[: len(content) // 2])
    status, _, err = command(train, *flags(tmp_path / "out", tmp_path / "run"))
    assert status == 2 and name in err and err.endswith(" run create_input_files.py again with --overwrite\n"), err
    status, _, err = prepare(command, tmp_path, tmp_path / "captions.json", photos)
    assert status == 2 and f"{name} is missing or was changed: --overwrite prepares the folder again" in err
    assert prepare(command, tmp_path, tmp_path / "captions.json", photos, "--overwrite")[0] == 0
    assert path.read_bytes() == content


# ------------------------------------------------------------------------------------------------ words and captions


def test_few_photos_keep_every_word(command, tmp_path, photos):
    captions = karpathy(tmp_path / "captions.json")
    status, out, _ = prepare(command, tmp_path, captions, photos, "--min_word_freq", 0)  # the default
    assert status == 0 and "--min_word_freq 1, the default for 2 training photos" in out
    assert "7 words: four special tokens and those at least 1 times" in out
    status, _, err = prepare(command, tmp_path, captions, photos, "--min_word_freq", 5, "--overwrite")
    assert status == 2 and "no word occurs 5 times in the training captions: give a smaller --min_word_freq" in err
    assert "exists already" in prepare(command, tmp_path, captions, photos)[1]  # it is 1 there, and nothing is replaced


@pytest.mark.parametrize(("settings", "expected"), [({}, 5), ({"max_train_images": 999}, 1), ({"num_scenes": 999}, 1)])
def test_many_photos_keep_frequent_words(settings, expected):
    settings = create_input_files.Settings(**settings)
    assert create_input_files.choose_min_word_freq(settings, []).min_word_freq == expected


def test_vocab_size_keeps_the_most_frequent_words(command, tmp_path, photos):
    captions = karpathy(tmp_path / "captions.json", splits=("train", "train", "val"))
    status, out, _ = prepare(command, tmp_path, captions, photos, "--vocab_size", 2)
    assert status == 0 and "6 words: four special tokens and those at least 1 times" in out
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["words"] == 6
    assert list(json.loads((tmp_path / "out" / "word_map.json").read_text()))[4:] == ["a", "cat"]


def test_training_images_are_chosen_with_the_seed(command, tmp_path, photos):
    captions = karpathy(tmp_path / "captions.json", splits=("train", "train", "val"))
    chosen = []
    for seed in (*range(8), 3):
        more = ("--max_train_images", 1, "--seed", seed, "--overwrite")
        status, out, _ = prepare(command, tmp_path, captions, photos, *more)
        assert status == 0 and f"1 of 2 training images, chosen with seed {seed}" in out
        splits = json.loads((tmp_path / "out" / "dataset.json").read_text())["splits"]
        assert [splits[split]["images"] for split in ("train", "val")] == [1, 1]
        chosen.append((tmp_path / "out" / "train_captions.json").read_text())
    assert len(set(chosen)) == 2 and chosen[3] == chosen[-1]


def captions_of(folder, split="train"):
    return read_captions(folder, split)[1].decode()


@pytest.fixture
def long_captions(tmp_path):
    """A CSV with two long training captions, one of them the only one of its image, and a long one for validation."""
    captions = ["A cat sleeps on a mat.", "A cat."]
    rows = [
        f'"{name}","{caption}","{split}"'
        for name, split in (("c.jpg", "train"), ("é.png", "val"))
        for caption in captions
    ]
    rows.append('"a b.jpg","A dog sleeps on a mat.","train"')
    path = tmp_path / "own.csv"
    path.write_text("\n".join(["file,caption,split", *rows]), encoding="utf-8")
    return path


@pytest.mark.parametrize("is_dropped", [False, True])
def test_long_training_captions_are_truncated_or_dropped(command, tmp_path, photos, long_captions, is_dropped):
    more = ("--max_caption_length", 3, *(("--long_captions", "drop") if is_dropped else ()))
    status, out, _ = prepare(command, tmp_path, long_captions, photos, *more)
    done = "dropped" if is_dropped else "truncated"
    assert status == 0 and f"2 training captions of more than 3 words are {done}" in out
    assert ("1 training images have no other captions, they are left out" in out) == is_dropped
    truncated = [[["a", "cat", "sleeps"], ["a", "cat"]], [["a", "dog", "sleeps"]]]
    assert captions_of(tmp_path / "out") == ([[["a", "cat"]]] if is_dropped else truncated)
    assert [len(words) for words in captions_of(tmp_path / "out", "val")[0]] == [6, 2]


def test_captions_per_image_are_chosen_with_the_seed(command, tmp_path, photos):
    path, chosen = tmp_path / "own.csv", set()
    rows = [f"{name},word{i},{split}" for i in range(9) for name, split in (("c.jpg", "train"), ("é.png", "val"))]
    path.write_text("\n".join(["file,caption,split", *rows]), encoding="utf-8")
    for seed in (1, 2, 1):
        prepare(command, tmp_path, path, photos, "--captions_per_image", 4, "--seed", seed, "--overwrite")
        (captions,) = captions_of(tmp_path / "out")
        assert len({tuple(words) for words in captions}) == 4 and len(captions_of(tmp_path / "out", "val")[0]) == 9
        chosen.add(str(captions))
    assert len(chosen) == 2


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--captions", "a.json"), "--dataset shapes reads no files: give another --dataset name for your --captions"),
        (("--dataset", "own"), "--dataset own requires --captions FILE and --images FOLDER, or --captions FOLDER"),
        (("--dataset", "own", "--captions", "utils.py", "--images", "none"), "--images none: no such folder\n"),
        (
            ("--dataset", "own", "--captions", "utils.py", "--images", "prepartion"),
            "--images prepartion: no such folder, did you mean preparation?",
        ),
        (
            ("--dataset", "own", "--captions", "tets/conftest.py"),
            "--captions tets/conftest.py: no such file or folder, did you mean tests?",
        ),
        (("--dataset", "../own", "--captions", "."), "--dataset '../own' is not a name: --output_folder takes a path"),
        (("--dataset", "..", "--captions", "."), "--dataset '..' is not a name"),
        (
            ("--dataset", "own", "--captions", ".", "--images", "."),
            "--images .: leave it out, --captions . is a folder",
        ),
        (("--long_captions", "drop"), "--long_captions drop requires --max_caption_length"),
        (("--num_scenes", 0), "--num_scenes 0: must be at least 1"),
        (("--device", "cpu"), "--device cpu requires --detect"),
        (("--num_shapes", 2, 10), "--num_shapes 10: must be at most 9"),
    ],
)
def test_settings_that_contradict_each_other_are_named(command, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(Path(create_input_files.__file__).parent)
    status, _, err = command(create_input_files, *arguments, "--output_folder", tmp_path / "out")
    assert status == 2 and message in err
    assert not (tmp_path / "out").exists()


def test_broken_photos_stop_the_run_or_are_skipped(command, tmp_path, photos):
    (photos / "c.jpg").write_text("no photo")
    (photos / "a b.jpg").unlink()
    captions = karpathy(tmp_path / "captions.json", ("train", "train", "train"))
    status, _, err = prepare(command, tmp_path, captions, photos)
    assert status == 2 and "c.jpg: not a photo" in err and "a b.jpg: no such file" in err
    assert "2 of 3 photos are unusable, listed above: --skip_broken skips them" in err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    status, _, err = prepare(command, tmp_path, captions, photos, "--skip_broken")
    assert status == 0 and "c.jpg: not a photo" in err and "a b.jpg: no such file" in err
    with h5py.File(tmp_path / "out" / "train_images.hdf5") as file:
        assert file["images"].shape == (1, 3, 8, 8)
    assert [len(captions) for captions in captions_of(tmp_path / "out")] == [2]


def test_a_disk_that_is_too_small_is_one_line(command, tmp_path, photos, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 500))
    status, _, err = prepare(command, tmp_path, karpathy(tmp_path / "captions.json"), photos)
    assert status == 2 and "3 images of 8 pixels take 5.76e-07 GB" in err.splitlines()[-1]
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the size of files")
def test_a_disk_that_fills_up_is_one_line(tmp_path, photos):
    captions = karpathy(tmp_path / "captions.json")
    script = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,) * 2); sys.argv = {}; "
        "runpy.run_path({!r}, run_name='__main__')"
    )
    arguments = ["create_input_files.py", "--dataset", "own", "--captions", captions, "--images", photos]
    arguments = [*map(str, arguments), "--output_folder", str(tmp_path / "out"), "--image_size", "300"]
    code = script.format(arguments, create_input_files.__file__)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2 and lines[-1].endswith(f"{tmp_path / 'out'} cannot be written: File too large"), lines
    assert "Traceback" not in result.stderr and not list(tmp_path.glob(".out*"))
