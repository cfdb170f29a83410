"""One photo in, a sentence and a picture out."""

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import caption
from models import load_captioner
from search import beam_search


def photo_of(shapes, number=0):
    return sorted((shapes / "photos").glob("test_*.png"))[number]


def test_a_photo_gets_a_sentence_and_a_picture(command, shapes, run_folder, tmp_path):
    arguments = (photo_of(shapes), "--checkpoint", run_folder / "best.pt", "--output", tmp_path / "out")
    status, out, _ = command(caption, *arguments, "--max_length", 6)
    sentence, log_probability = re.search(r"\.png: (.*) \(log-probability (-[\d.]+)\)", out).groups()
    captioner, vocabulary, _ = load_captioner(run_folder / "best.pt", "cpu")
    image = torch.from_numpy(caption.load_image(photo_of(shapes), 32)).unsqueeze(0)
    with torch.inference_mode():
        captions, totals = beam_search(captioner.decoder, captioner.regions(image), 5, 6)
    assert status == 0 and sentence.split() == vocabulary.decode(captions[0, 0])
    assert float(log_probability) == pytest.approx(totals[0, 0].item(), abs=0.01)
    with Image.open(tmp_path / "out" / photo_of(shapes).name) as picture:
        assert picture.width > 300 and np.asarray(picture.convert("L")).std() > 5


def test_tiles_are_bright_where_the_decoder_looked():
    photo = Image.new("RGB", (80, 40), (200, 200, 200))
    figure = caption.draw_attention(photo, ["one", "two"], np.eye(4)[[1, 2]])
    tiles = [axes for axes in figure.axes if axes.get_title()]
    assert [tile.get_title() for tile in tiles] == ["one", "two"]
    first, second = (np.asarray(tile.images[0].get_array())[..., 0] for tile in tiles)
    assert first.shape == (40, 80)
    assert first[:20, 40:].mean() > 2 * first[20:, :40].mean()  # region 1 is at the top right
    assert second[20:, :40].mean() > 2 * second[:20, 40:].mean()  # region 2 at the bottom left


def test_several_photos_of_one_name_get_a_picture_each(command, shapes, run_folder, tmp_path):
    photos = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        photos.append(shutil.copy(photo_of(shapes), tmp_path / folder / "photo.png"))
    arguments = (*photos, "--checkpoint", run_folder / "best.pt", "--output", tmp_path / "out")
    assert command(caption, *arguments, "--max_length", 1)[0] == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"photo.png", "photo-2.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing.jpg",), "missing.jpg: no such file"),
        ((__file__,), "test_caption.py: not a photo"),
        (("{photo}", "--checkpoint", "missing.pt"), "no such file: missing.pt"),
        (("{photo}", "--beam_size", "0"), "--beam_size 0: must be at least 1"),
        (("{photo}", "--max_length", "0"), "--max_length 0: must be at least 1"),
        (("{photo}", "--output", "{photo}"), "File exists"),
        (("{photo}", "--output", "{folder}"), "a picture would replace the photo"),
    ],
)
def test_bad_input_ends_in_one_line_and_draws_nothing(command, shapes, run_folder, tmp_path, arguments, message):
    photo = photo_of(shapes)
    before = photo.read_bytes()
    arguments = [argument.format(photo=photo, folder=photo.parent) for argument in arguments]
    common = ("--checkpoint", run_folder / "best.pt", "--output", tmp_path / "out")
    status, _, err = command(caption, arguments[0], *common, *arguments[1:])
    assert status == 2 and message in err.splitlines()[-1] and "Traceback" not in err
    assert not (tmp_path / "out").exists() and photo.read_bytes() == before
