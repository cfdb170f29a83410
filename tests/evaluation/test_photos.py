"""Photos are found by file, folder and standard input, and loaded in batches without the broken ones."""

import io
import os
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from evaluation.photos import collect_photos, load_photos
from preparation.images import load_image
from utils import InputError
from visualization.photos import open_for_picture
from visualization.pictures import plot_attention, save_picture


@pytest.fixture
def folder(tmp_path):
    """A folder of b.jpg, sub/a.png, a hidden photo, a text file and one of our pictures."""
    (tmp_path / "sub").mkdir()
    for name in ("b.jpg", "sub/a.png", ".hidden.png"):
        Image.new("RGB", (20, 10), "red").save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not a photo")
    save_picture(plot_attention(Image.new("RGB", (9, 9)), [], np.ones((1, 1))), tmp_path / "b_attention.png")
    return tmp_path


def test_folders_stand_for_their_photos(folder):
    photos = [str(folder / "b.jpg"), str(folder / "sub" / "a.png")]
    assert collect_photos(["x.jpg", str(folder)]) == ["x.jpg", *photos]
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match="empty has no photos"):
        collect_photos([str(folder / "empty")])


def test_names_come_from_standard_input(folder, monkeypatch):
    names = f"{folder}/sub\r\n\n~/cat.jpg\nname with spaces.jpg\n".encode() + b"\xff.jpg"
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(names)))
    expected = [str(folder / "sub" / "a.png"), os.path.expanduser("~/cat.jpg"), "name with spaces.jpg"]
    assert collect_photos(["-"]) == [*expected, os.fsdecode(b"\xff.jpg")]
    with pytest.raises(InputError, match="no file names on standard input"):
        collect_photos(["-"])


def test_batches_leave_broken_photos_out(folder):
    photos = [str(folder / name) for name in ("b.jpg", "notes.txt", "missing.jpg", "sub/a.png", "notes.txt")]
    broken: list[str] = []
    batches = list(load_photos(photos, 2, 8, "pad", broken, with_pictures=True))
    assert [indices for indices, *_ in batches] == [[0], [3]]
    for (i,), images, pictures in batches:
        np.testing.assert_array_equal(images[0].numpy(), load_image(photos[i], 8, "pad"))
        assert list(pictures) == [i] and pictures[i] == open_for_picture(photos[i], "pad")
    assert len(broken) == 3 and "missing.jpg: no such file" in broken[1]
