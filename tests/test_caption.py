"""One photo in, a sentence and a picture out."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import caption
import train
from conftest import SMALL
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


def test_the_edges_that_mattered_for_a_word_are_drawn(command, shapes, tmp_path):
    settings = replace(SMALL, data_folder=str(shapes), run_folder=str(tmp_path / "run"), graph_layers=2, epochs=1)
    train.main(settings)
    arguments = (photo_of(shapes), "--checkpoint", tmp_path / "run" / "best.pt", "--output", tmp_path / "out")
    status, out, _ = command(caption, *arguments, "--max_length", 4)
    assert status == 0
    word = re.search(r"\.png: (\w+)", out).group(1)
    status, out, _ = command(caption, *arguments, "--max_length", 4, "--edges", word)
    picture = tmp_path / "out" / f"{photo_of(shapes).stem}-edges.png"
    assert status == 0 and str(picture) in out
    with Image.open(picture) as drawn:
        red, green, blue = np.asarray(drawn.convert("RGB")).astype(int).reshape(-1, 3).T
    assert ((red > green + 60) & (green > blue + 60)).sum() > 100  # orange arrows
    picture.unlink()
    absent = next(other for other in ("red", "green", "blue", "yellow") if other not in out)
    status, out, _ = command(caption, *arguments, "--max_length", 4, "--edges", absent)
    assert status == 0 and f"{absent} is not in this caption" in out and not picture.exists()
    status, _, error = command(caption, *arguments, "--edges", "and/or")
    assert status == 2 and "--edges and/or" in error and "does not know this word" in error


def test_arrows_go_to_where_the_decoder_looked():
    edges = {(0, 3): 0.5, (1, 3): 0.25}
    figure = caption.draw_edges(Image.new("RGB", (80, 40)), "dog", np.array([0.1, 0.1, 0.1, 0.7]), edges)
    arrows = figure.axes[0].texts
    assert [(arrow.xyann, arrow.xy) for arrow in arrows] == [((20, 10), (60, 30)), ((60, 10), (60, 30))]
    assert arrows[0].arrow_patch.get_linewidth() == 2 * arrows[1].arrow_patch.get_linewidth()


def test_without_attention_the_picture_is_the_photo(command, shapes, tmp_path):
    settings = replace(SMALL, data_folder=str(shapes), run_folder=str(tmp_path / "run"), attention="none", epochs=1)
    train.main(settings)
    arguments = (photo_of(shapes), "--checkpoint", tmp_path / "run" / "best.pt", "--output", tmp_path / "out")
    assert command(caption, *arguments, "--max_length", 4)[0] == 0
    with Image.open(tmp_path / "out" / photo_of(shapes).name) as picture:
        assert picture.width < 300


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
        (("{photo}", "--edges", "red"), "best.pt has no graph to look at, train with"),
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
