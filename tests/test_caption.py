"""caption.py: a sentence and pictures for each photo, and its errors."""

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
from modules.beam_search import beam_search
from preparation.images import load_image


def photo_of(shapes):
    return sorted((shapes / "photos").glob("test_*.png"))[0]


def test_a_photo_gets_a_sentence_and_a_picture(command, shapes, run_folder, tmp_path):
    arguments = (photo_of(shapes), "--checkpoint", run_folder / "best.pt", "--output_folder", tmp_path / "out")
    status, out, _ = command(caption, *arguments, "--max_length", 6)
    sentence, log_probability = re.search(r"\.png: (.*) \(log-probability (-[\d.]+)\)", out).groups()
    captioner, vocabulary = load_captioner(run_folder / "best.pt", "cpu")
    image = torch.from_numpy(load_image(photo_of(shapes), 32)).unsqueeze(0)
    with torch.inference_mode():
        captions, log_probs = beam_search(captioner.decoder, captioner.encode_images(image), 5, 6)
    assert status == 0 and sentence.split() == vocabulary.decode(captions[0, 0])
    assert float(log_probability) == pytest.approx(log_probs[0, 0].item(), abs=0.01)
    with Image.open(tmp_path / "out" / photo_of(shapes).name) as picture:
        assert picture.width > 300 and np.asarray(picture.convert("L")).std() > 5


@pytest.fixture(scope="module")
def graph_arguments(shapes, tmp_path_factory):
    """The command line that captions a photo with a model that has graph layers."""
    folder = tmp_path_factory.mktemp("graph")
    train.main(replace(SMALL, data_folder=str(shapes), run_folder=str(folder), graph_layers=2, epochs=1))
    return (photo_of(shapes), "--checkpoint", folder / "best.pt", "--max_length", 4)


def test_the_edges_that_mattered_for_a_word_are_plotted(command, shapes, graph_arguments, tmp_path):
    arguments = (*graph_arguments, "--output_folder", tmp_path)
    status, out, _ = command(caption, *arguments)
    assert status == 0
    word = re.search(r"\.png: (\w+)", out).group(1)
    status, out, _ = command(caption, *arguments, "--graph_word", word)
    picture = tmp_path / f"{photo_of(shapes).stem}-edges.png"
    assert status == 0 and str(picture) in out
    with Image.open(picture) as plotted:
        red, green, blue = np.asarray(plotted.convert("RGB")).astype(int).reshape(-1, 3).T
    assert ((red > green + 60) & (green > blue + 60)).sum() > 100  # orange arrows


def test_a_graph_word_that_the_caption_lacks_plots_nothing(command, shapes, graph_arguments, tmp_path):
    arguments = (*graph_arguments, "--output_folder", tmp_path)
    _, out, _ = command(caption, *arguments)
    absent = next(color for color in ("red", "green", "blue", "yellow") if color not in out)
    status, out, _ = command(caption, *arguments, "--graph_word", absent)
    assert status == 0 and f"{absent} is not in this caption" in out
    assert [path.name for path in tmp_path.iterdir()] == [photo_of(shapes).name]


def test_an_unknown_graph_word_is_an_error(command, graph_arguments, tmp_path):
    status, _, error = command(caption, *graph_arguments, "--output_folder", tmp_path, "--graph_word", "and/or")
    assert status == 2 and "--graph_word and/or" in error and "does not know this word" in error


def test_without_attention_the_picture_is_the_photo(command, shapes, tmp_path):
    settings = replace(SMALL, data_folder=str(shapes), run_folder=str(tmp_path / "run"), attention="none", epochs=1)
    train.main(settings)
    arguments = (photo_of(shapes), "--checkpoint", tmp_path / "run" / "best.pt", "--output_folder", tmp_path / "out")
    assert command(caption, *arguments, "--max_length", 4)[0] == 0
    with Image.open(tmp_path / "out" / photo_of(shapes).name) as picture:
        assert picture.width < 300


def test_several_photos_of_the_same_name_get_a_picture_each(command, shapes, run_folder, tmp_path):
    photos = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        photos.append(shutil.copy(photo_of(shapes), tmp_path / folder / "photo.png"))
    arguments = (*photos, "--checkpoint", run_folder / "best.pt", "--output_folder", tmp_path / "out")
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
        (("{photo}", "--output_folder", "{photo}"), "File exists"),
        (("{photo}", "--graph_word", "red"), "best.pt has no graph to plot, train with"),
        (("{photo}", "--output_folder", "{folder}"), "a picture would replace the photo"),
    ],
)
def test_bad_input_ends_in_one_line_and_writes_nothing(command, shapes, run_folder, tmp_path, arguments, message):
    photo = photo_of(shapes)
    before = photo.read_bytes()
    arguments = [argument.format(photo=photo, folder=photo.parent) for argument in arguments]
    common = ("--checkpoint", run_folder / "best.pt", "--output_folder", tmp_path / "out")
    status, _, err = command(caption, arguments[0], *common, *arguments[1:])
    assert status == 2 and message in err.splitlines()[-1] and "Traceback" not in err
    assert not (tmp_path / "out").exists() and photo.read_bytes() == before
