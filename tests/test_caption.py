"""caption.py: a sentence and pictures for each photo, and its errors."""

import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import caption
import eval as eval_script
from conftest import SMALL, beams, build
from decoding.beam_search import beam_search
from evaluation.photo_regions import photo_records
from models import load_captioner, model_settings
from preparation.detection import Detector, detect_objects
from preparation.images import load_image


def picture_of(photo, folder, kind="attention"):
    return folder / f"{photo.stem}_{kind}.png"


@pytest.fixture(scope="module")
def photo(shapes):
    """The first photo of the test split."""
    return min((shapes / "photos").glob("test_*.png"))


@pytest.mark.slow
def test_caption_imports_only_what_it_needs():
    """A command that draws nothing does not wait for the packages that draw."""
    code = "import caption, sys; print({'matplotlib', 'skimage', 'nltk', 'pycocoevalcap'} & set(sys.modules))"
    folder = Path(caption.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def random_model(run_folder, path, **changes):
    """Write a checkpoint of a random model with other settings than the small run; return its path."""
    checkpoint = torch.load(run_folder / "best.pt", weights_only=True)
    torch.manual_seed(0)
    captioner = build(replace(SMALL, **changes), checkpoint["words"])
    checkpoint["model_settings"] = model_settings(replace(SMALL, **changes))
    torch.save(checkpoint | {"model": captioner.state_dict()}, path)
    return path


@pytest.fixture
def several(shapes, tmp_path):
    """Two photos in a folder, and a broken one between them."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, photo in zip(("a.png", "c.png"), sorted((shapes / "photos").glob("test_*.png")), strict=True):
        shutil.copy(photo, folder / name)
    (folder / "b.png").write_text("broken")
    return folder


def test_a_photo_gets_a_sentence_and_a_picture(command, photo, run_folder, tmp_path):
    arguments = (photo, "--checkpoint", run_folder / "best.pt", "--output_folder", tmp_path / "out")
    status, out, _ = command(caption, *arguments, "--max_length", 6)
    sentence, log_probability = re.search(r"\.png: (.*) \(log-probability (-[\d.]+)\)", out).groups()
    captioner = load_captioner(run_folder / "best.pt", "cpu")
    image = torch.from_numpy(load_image(photo, 32)).unsqueeze(0)
    with torch.inference_mode():
        captions, log_probs = beam_search(captioner.decoder, captioner.encode(image).regions, beams(5, 6))
    assert status == 0 and sentence.split() == captioner.vocabulary.decode(captions[0, 0])
    assert float(log_probability) == pytest.approx(log_probs[0, 0].item(), abs=0.01)
    with Image.open(picture_of(photo, tmp_path / "out")) as picture:
        assert picture.width > 300 and np.asarray(picture.convert("L")).std() > 5


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_a_model_of_objects_captions_a_photo_with_its_objects(command, photo, objects_run, tmp_path, resize):
    checkpoint = torch.load(objects_run / "best.pt", weights_only=True) | {"resize": resize}
    torch.save(checkpoint, tmp_path / "best.pt")
    rows = [
        {"image_id": photo.name, "category": "red circle", "bbox": [8, 4, 16, 24], "score": 0.9},
        {"image_id": "of another photo", "category": "star", "bbox": [8, 4, 16, 24], "score": 0.9},
    ]
    (tmp_path / "objects.json").write_text(json.dumps(rows))
    wide = tmp_path / photo.name
    Image.open(photo).resize((64, 32)).save(wide)
    arguments = ("--checkpoint", tmp_path / "best.pt", "--output_folder", tmp_path, "--max_length", 4, "--json")
    objects = ("--objects", tmp_path / "objects.json")
    status, out, err = command(caption, wide, *arguments, *objects, "--precision", "fp32")
    assert status == 0 and "1 objects in 1 photos" in err
    captioner = load_captioner(tmp_path / "best.pt", "cpu")
    image = torch.from_numpy(load_image(wide, 32, resize)).unsqueeze(0)
    left, right = (0, 8 / 32) if resize == "crop" else (8 / 64, 24 / 64)
    with torch.inference_mode():
        encoded = captioner.encode(image, boxes=torch.tensor([[[left, 4 / 32, right, 28 / 32]]]))
        captions, log_probs = beam_search(captioner.decoder, encoded.regions, beams(5, 4), encoded.mask)
    row = json.loads(out)
    assert row["caption"].split() == captioner.vocabulary.decode(captions[0, 0])
    assert row["log_prob"] == pytest.approx(log_probs[0, 0].item(), abs=1e-3)
    with Image.open(picture_of(photo, tmp_path)) as picture:
        assert picture.width > 300
    objects = [[{"box": [8 / 64, 4 / 32, 24 / 64, 28 / 32]}], []]
    records = captioner.caption_images([wide, wide], objects=objects, max_length=4, precision="fp32")
    assert records[0].caption == row["caption"] and records[0].log_prob == pytest.approx(row["log_prob"], abs=1e-3)
    assert [len(record.boxes) for record in records] == [18, 17]  # cells, the whole photo, the object


def test_the_shapes_have_their_objects_in_their_captions_file(command, shapes, objects_run):
    arguments = ("--checkpoint", objects_run / "best.pt", "--objects", shapes / "dataset_shapes.json")
    status, out, err = command(caption, shapes / "photos", *arguments, "--no-pictures")
    assert status == 0 and out.count("log-probability") == 28 and "objects in 28 photos, 0 photos have none" in err


def test_a_detector_finds_the_objects_itself(command, photo, objects_run, detector_weights, tmp_path):
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    detector = Detector(name, detector_weights, torch.device("cpu"))
    detect_objects(photo_records([photo]), tmp_path / "objects.json", detector)
    found = []
    common = (caption, photo, "--checkpoint", objects_run / "best.pt", "--no-pictures", "--json")
    detect = ("--detect", name, "--detector_weights", detector_weights)
    for arguments in (("--objects", tmp_path / "objects.json"), detect):
        status, out, err = command(*common, *arguments)
        assert status == 0 and " objects in 1 photos" in err and " 0 objects" not in err.replace("\n", " "), err
        found.append(json.loads(out))
    assert found[0] == found[1]


def test_objects_and_model_must_fit(command, photo, run_folder, objects_run, tmp_path):
    objects = tmp_path / "objects.json"
    objects.write_text("[]")
    arguments = ("--checkpoint", objects_run / "best.pt", "--objects", objects, "--no-pictures")
    status, out, err = command(caption, photo, photo, *arguments)
    assert status == 0 and out.count("log-prob") == 2 and "0 objects in 0 photos, 1 photos have none" in err
    for run, arguments, message in (
        (objects_run, (), "requires objects: pass those that a detector found in the photos as --objects FILE, or"),
        (objects_run, ("--objects", objects, "--detect", "x"), "cannot be combined with --detect: remove one of them"),
        (run_folder, ("--detect", "x"), "--detect x: the model does not look at objects, leave it out"),
        (objects_run, ("--detector_weights", "x"), "--detector_weights x requires --detect"),
        (objects_run, ("--detect", "x"), "--detect x: not one of fasterrcnn_mobilenet_v3_large_320_fpn"),
        (run_folder, ("--objects", objects), f"--objects {objects}: the model does not look at objects, leave it"),
        (objects_run, ("--objects", tmp_path / "object.json"), f"object.json: no such file, did you mean {objects}?"),
    ):
        status, _, err = command(caption, photo, "--checkpoint", run / "best.pt", *arguments)
        assert status == 2 and message in err


def test_a_model_of_objects_is_scored_with_their_boxes(command, shapes, run_folder, objects_run, no_meteor, tmp_path):
    checkpoints = (objects_run / "best.pt", run_folder / "last.pt")
    arguments = ("--data_folder", shapes, "--beam_sizes", 2, "--output_folder", tmp_path)
    assert command(eval_script, "--checkpoint", *reversed(checkpoints), *arguments)[0] == 0
    scores = json.loads((tmp_path / f"scores_ensemble2_{shapes.name}_test.json").read_text())["scores"]
    assert len(scores) == 3 and all({"pointing", "correctness"} <= row.keys() for row in scores)


def test_decoding_is_as_the_flags_say(command, photo, run_folder):
    def captions(*flags):
        arguments = ("--checkpoint", run_folder / "best.pt", "--no-pictures", "--json", "--max_length", 8, *flags)
        status, out, _ = command(caption, photo, *arguments)
        assert status == 0
        return [row["caption"].split() for row in json.loads(out).get("n_best", [json.loads(out)])]

    (best,) = captions()
    assert len(set(best)) < len(best)  # two epochs: it repeats a word
    (varied,) = captions("--no_repeat_ngram", 1)
    assert len(set(varied)) == len(varied)
    (other_ending,) = captions("--banned_endings", best[-1])
    assert other_ending[-1] != best[-1]
    assert len(captions("--min_length", 7)[0]) >= 7
    for words in captions("--samples", 4, "--n_best", 4, "--min_length", 3, "--no_repeat_ngram", 1):
        assert len(words) >= 3 and len(set(words)) == len(words)
    sampled = [captions("--samples", 4, "--n_best", 4, "--seed", seed, "--top_k", 3) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    diverse = captions("--beam_size", 4, "--num_beam_groups", 4, "--diversity_penalty", 99, "--n_best", 4)
    assert len({words[0] for words in diverse}) == 4  # each group begins with a word of its own
    with_views = captions("--checkpoint", run_folder / "best.pt", run_folder / "last.pt", "--views", "original", "crop")
    assert len(with_views) == 1


def test_a_head_of_a_transformer_is_drawn(command, run_folder, photo, tmp_path):
    checkpoint = random_model(run_folder, tmp_path / "best.pt", decoder="transformer", heads=2)
    arguments = (photo, "--checkpoint", checkpoint, "--max_length", 3)
    pictures = []
    for flags in ((), ("--alpha_layer", 1), ("--alpha_layer", 2, "--alpha_head", 2)):
        assert command(caption, *arguments, "--output_folder", tmp_path, *flags)[0] == 0
        pictures.append(picture_of(photo, tmp_path).read_bytes())
    assert len(set(pictures)) == 3
    status, _, err = command(caption, *arguments, "--output_folder", tmp_path, "--alpha_head", 3)
    assert status == 2 and err.endswith("--alpha_head 3: the decoder has 2: give 1 to 2, or 0\n")


def test_the_edges_that_mattered_for_a_word_are_plotted(command, run_folder, photo, tmp_path):
    checkpoint = random_model(run_folder, tmp_path / "best.pt", graph_layers=2)
    folder = tmp_path / "out"
    arguments = (photo, "--checkpoint", checkpoint, "--max_length", 4, "--output_folder", folder)
    _, out, _ = command(caption, *arguments)
    word = re.search(r"\.png: (\w+)", out)[1]
    absent = next(color for color in ("red", "green", "blue", "yellow") if color not in out)

    status, out, _ = command(caption, *arguments, "--graph_word", absent)
    assert status == 0 and f"{absent} is not in this caption" in out
    assert list(folder.iterdir()) == [picture_of(photo, folder)]

    status, out, _ = command(caption, *arguments, "--graph_word", word)
    picture = picture_of(photo, folder, "edges")
    assert status == 0 and str(picture) in out
    with Image.open(picture) as plotted:
        red, green, blue = np.asarray(plotted.convert("RGB")).astype(int).reshape(-1, 3).T
    assert ((red > green + 60) & (green > blue + 60)).sum() > 100  # orange arrows

    status, _, err = command(caption, *arguments, "--graph_word", "and/or")
    assert status == 2 and "--graph_word and/or" in err and "does not know this word" in err


def test_without_attention_the_picture_is_the_photo(command, run_folder, photo, tmp_path):
    checkpoint = random_model(run_folder, tmp_path / "best.pt", attention="none")
    assert command(caption, photo, "--checkpoint", checkpoint, "--output_folder", tmp_path, "--max_length", 4)[0] == 0
    with Image.open(picture_of(photo, tmp_path)) as picture:
        assert picture.width < 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing.jpg",), "missing.jpg: no such file"),
        ((__file__,), "test_caption.py: not a photo"),
        (("{photo}", "--checkpoint", "missing.pt"), "no such file: missing.pt"),
        (("{photo}", "--beam_size", "0"), "--beam_size 0: must be at least 1"),
        (("{photo}", "--output_folder", "{photo}"), "cannot be written"),
        (("{photo}", "--n_best", "6"), "--n_best 6: more than --beam_size 5"),
        (("{photo}", "--no-pictures", "--show"), "--show requires --pictures"),
        (("{photo}", "--checkpoint", "{folder}"), "is a folder, not a checkpoint: give"),
        (("{photo}", "--graph_word", "red"), "best.pt has no graph to plot, train with"),
        (("{photo}", "--alpha_layer", "1"), "--alpha_layer 1: only a transformer decoder has several"),
        (("{photo}", "--num_beam_groups", "2"), "--num_beam_groups 2: does not divide the beam size 5"),
        (("{photo}", "--top_k", "2"), "--top_k 2 requires --samples"),
        (("{photo}", "--diversity_penalty", "1"), "--diversity_penalty 1.0 requires --num_beam_groups above 1"),
        (("{photo}", "--min_length", "30"), "--min_length 30: must be below --max_length 30"),
        (("{photo}", "--banned_endings", "xyzzy"), "--banned_endings xyzzy: the model does not know this word"),
        (("{photo}", "--samples", "2", "--n_best", "3"), "--n_best 3: more than --samples 2"),
        (("--checkpoint", "x.pt"), "photos are missing: name files or folders, or drop photos on the page of tools/se"),
        (("{photo}", "--consensus_index", "{photo}"), "test_00026.png is refused: it is damaged, or holds more"),
    ],
)
def test_bad_input_ends_in_one_line_and_writes_nothing(command, photo, run_folder, tmp_path, arguments, message):
    before = photo.read_bytes()
    arguments = [argument.format(photo=photo, folder=photo.parent) for argument in arguments]
    common = ("--checkpoint", run_folder / "best.pt", "--output_folder", tmp_path / "out")
    status, _, err = command(caption, *common, *arguments)
    assert status == 2 and message in err.splitlines()[-1] and "Traceback" not in err
    assert not (tmp_path / "out").exists() and photo.read_bytes() == before


def test_files_of_the_user_are_never_replaced(command, run_folder, several):
    mine = several / "a_attention.png"
    shutil.copy(several / "c.png", mine)
    before = mine.read_bytes()
    arguments = ("--checkpoint", run_folder / "best.pt", "--output_folder", several, "--max_length", 2)
    status, out, err = command(caption, several / "c.png", several / "a.png", *arguments)
    assert status == 2 and "a_attention.png is not a picture of caption.py and is not replaced" in err and not out
    assert mine.read_bytes() == before and not (several / "c_attention.png").exists()
    assert command(caption, several / "c.png", *arguments)[0] == 0
    mine.unlink()
    status, out, _ = command(caption, several, *arguments)  # our own are
    assert status == 1 and "c_attention.png:" not in out  # our pictures are no photos


def test_broken_photos_are_skipped_and_listed_at_the_end(command, run_folder, several, tmp_path):
    arguments = ("--checkpoint", run_folder / "best.pt", "--output_folder", tmp_path / "out", "--max_length", 2)
    status, out, err = command(caption, several, tmp_path / "missing.jpg", *arguments)
    captioned = [line.split(":")[0] for line in out.splitlines() if "log-prob" in line]
    assert status == 1 and captioned == [str(several / "a.png"), str(several / "c.png")]
    assert "2 of 4 photos were skipped:" in err and "b.png: not a photo" in err and "missing.jpg: no such file" in err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a_attention.png", "c_attention.png"}


def test_json_lines_hold_the_captions_of_each_photo(command, run_folder, several, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = f"{several}/a.png\n{several}/c.png\n".encode()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(names)))
    arguments = ("--checkpoint", run_folder / "best.pt", "--max_length", 3)
    status, out, _ = command(caption, "-", "--json", "--no-pictures", "--n_best", 2, *arguments)
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [row["file"] for row in rows] == [str(several / "a.png"), str(several / "c.png")]
    for row in rows:
        assert len(row["n_best"]) == 2 and {"caption": row["caption"], "log_prob": row["log_prob"]} == row["n_best"][0]
        status, out, _ = command(caption, row["file"], "--no-pictures", "--n_best", 2, *arguments)
        first, second = re.findall(r"(?:: |  )(.*) \(log-probability (-[\d.]+)\)", out)
        assert first[0] == row["caption"] and float(second[1]) == pytest.approx(row["n_best"][1]["log_prob"], abs=0.006)
    assert not (tmp_path / "captions").exists()


def test_missing_glyphs_are_one_line(command, run_folder, several, tmp_path):
    checkpoint = torch.load(run_folder / "best.pt", weights_only=True)
    checkpoint["words"][4:] = [f"猫{i}\u0e01 $5_$" for i in range(len(checkpoint["words"]) - 4)]
    torch.save(checkpoint, tmp_path / "chinese.pt")
    arguments = ("--checkpoint", tmp_path / "chinese.pt", "--output_folder", tmp_path / "out", "--max_length", 3)
    status, _, err = command(caption, several / "a.png", several / "c.png", *arguments)
    lines = [line for line in err.splitlines() if "photo/s" not in line and line.strip()]
    assert status == 0 and lines == [
        "pictures show boxes for 2 characters that matplotlib's font lacks, such as \u0e01: install a font that has "
        "them and add it to font.family in matplotlibrc"
    ]
