"""The reports that eval.py and caption.py write."""

import base64
import io
import json
from dataclasses import asdict

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import caption
import eval as eval_script
from conftest import report_data
from decoding.settings import DecodingSettings
from evaluation.ensemble import summarize_decoding
from models import load_captioner


@pytest.fixture
def evaluate(command, shapes, no_meteor):
    """Run eval.py on the training split without METEOR: arguments -> exit status, stderr."""

    def run(*arguments):
        common = ("--data_folder", shapes, "--split", "train", "--max_length", 3)
        status, _, err = command(eval_script, *common, *arguments)
        return status, err

    return run


def test_the_report_shows_the_split_and_another_model(evaluate, shapes, run_folder, tmp_path):
    last = run_folder / "last.pt"
    common = ("--checkpoint", run_folder / "best.pt", "--output_folder", tmp_path, "--report")
    status, err = evaluate(*common, "--compare", last, "--beam_sizes", 1, 3, "--report_photos", 5)
    assert status == 0, err
    path = tmp_path / f"report_best_{shapes.name}_train.html"
    data, results = report_data(path), json.loads((tmp_path / f"results_best_{shapes.name}_train.json").read_text())
    scores = json.loads((tmp_path / f"scores_best_{shapes.name}_train.json").read_text())
    per_image = json.loads((tmp_path / f"scores_per_image_best_{shapes.name}_train.json").read_text())
    assert data["models"] == [str(run_folder / "best.pt"), str(last)] and len(data["cards"]) == 5
    assert scores["comparison"]["file"] == str(last) and scores["comparison"]["tests"]["cider"]["p"] <= 1
    assert [row[0] for row in data["table"]] == ["beam", "1", "3"] and ["photos", "5 of 24"] in data["details"]
    captioner = load_captioner(last, "cpu")
    photos = [shapes / "photos" / card["name"] for card in data["cards"]]
    expected = captioner.caption_images(photos, beam_size=3, max_length=3)
    with h5py.File(shapes / "train_images.hdf5") as file:
        images = file["images"][:5]
    entries = json.loads((shapes / "train_captions.json").read_text())
    for i, (card, entry, record) in enumerate(zip(data["cards"], entries, expected, strict=False)):
        mine, other = card["captions"]
        assert " ".join(mine["words"]) == results[i]["caption"] and card["name"] == results[i]["image"]
        assert mine["scores"]["cider"] == pytest.approx(per_image[i]["cider"], abs=1e-4) and mine["cells"] == 16
        assert other["words"] == record.words and other["log_prob"] == pytest.approx(record.log_prob, abs=0.02)
        assert card["references"] == [" ".join(caption["words"]) for caption in entry["captions"]]
        photo = np.asarray(Image.open(io.BytesIO(base64.b64decode(card["photo"]))), int).transpose(2, 0, 1)
        assert np.abs(photo - images[i]).mean() < 12  # JPEG of 32 pixels
    path.write_text("mine")
    status, err = evaluate(*common)
    assert status == 2 and "is not a report of this program and is not replaced" in err and path.read_text() == "mine"


def test_the_report_of_results_has_no_attention(command, shapes, no_meteor, tmp_path):
    entries = json.loads((shapes / "train_captions.json").read_text())
    rows = [{"image_id": entry["image_id"], "caption": "a red <b>circle</b>"} for entry in entries]
    for name in ("mine", "theirs"):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    arguments = ("--data_folder", shapes, "--split", "train", "--results", tmp_path / "mine.json", "--report")
    status, out, err = command(eval_script, *arguments, "--compare", tmp_path / "theirs.json")
    path = tmp_path / f"report_mine_{shapes.name}_train.html"
    assert status == 0 and f"{path} shows them" in out, err
    data = report_data(path)
    assert len(data["cards"]) == 24 and "alpha" not in data["cards"][0]["captions"][1]
    assert data["cards"][0]["captions"][0]["words"] == ["a", "red", "b", "circle", "b"]  # as it is scored


@pytest.mark.parametrize("resize", ["squash", "pad"])
def test_the_report_of_photos_shows_them_as_the_model_saw_them(command, shapes, run_folder, tmp_path, resize):
    checkpoint = torch.load(run_folder / "best.pt", weights_only=True) | {"resize": resize}
    torch.save(checkpoint, tmp_path / "best.pt")
    photos = sorted((shapes / "photos").glob("test_*.png"))
    wide = tmp_path / "wide.png"
    Image.open(photos[0]).resize((96, 32)).save(wide)
    (tmp_path / "broken.png").write_text("no photo")
    arguments = ("--checkpoint", tmp_path / "best.pt", "--no-pictures", "--report", "--output_folder", tmp_path / "out")
    status, out, err = command(caption, wide, tmp_path / "broken.png", photos[1], *arguments)
    assert status == 1 and "1 of 3 photos were skipped" in err and "report.html shows all" in out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]
    data = report_data(tmp_path / "out" / "report.html")
    assert [card["name"] for card in data["cards"]] == [str(wide), str(photos[1])] and data["metrics"] == []
    size = {"squash": (96, 38), "pad": (256, 256)}[resize]  # a long photo is at most 2.5 times as wide as high
    assert (data["cards"][0]["width"], data["cards"][0]["height"]) == size
    for card in data["cards"]:
        assert f"{card['name']}: {' '.join(card['captions'][0]['words'])} (log" in out
        assert len(base64.b64decode(card["captions"][0]["alpha"])) == 16 * len(card["captions"][0]["words"])


def test_a_photo_that_cannot_be_read_leaves_the_report_alone(command, shapes, run_folder, tmp_path):
    arguments = ("--checkpoint", run_folder / "best.pt", "--no-pictures", "--report", "--output_folder", tmp_path)
    assert command(caption, next((shapes / "photos").glob("*.png")), *arguments)[0] == 0
    before = (tmp_path / "report.html").read_bytes()
    (tmp_path / "broken.png").write_text("no photo")
    status, out, err = command(caption, tmp_path / "broken.png", *arguments)
    assert status == 2 and out == "" and err.count("\n") == 1 and (tmp_path / "report.html").read_bytes() == before


def test_a_model_of_other_images_is_refused_before_all_work(evaluate, run_folder, tmp_path):
    torch.save(torch.load(run_folder / "best.pt", weights_only=True) | {"resize": "pad"}, tmp_path / "pad.pt")
    arguments = ("--checkpoint", run_folder / "best.pt", "--output_folder", tmp_path / "out")
    status, err = evaluate(*arguments, "--compare", tmp_path / "pad.pt")
    assert status == 2 and err.count("\n") == 1 and "made by squash, the model was trained on 32, pad" in err
    assert not list((tmp_path / "out").glob("*"))


def test_a_model_compared_with_itself_keeps_its_rows(evaluate, shapes, run_folder, tmp_path):
    best = run_folder / "best.pt"
    status, err = evaluate("--checkpoint", best, "--output_folder", tmp_path, "--beam_sizes", 1, 3, "--compare", best)
    assert status == 0, err
    scores = json.loads((tmp_path / f"scores_best_{shapes.name}_train.json").read_text())
    assert [row["beam_size"] for row in scores["scores"]] == [1, 3]
    assert scores["comparison"]["tests"]["cider"]["difference"] == 0


def test_the_decoding_is_described():
    plain = asdict(DecodingSettings(beam_size=3)) | {"views": ("original",), "consensus_index": ""}
    plain |= {"consensus_weight": 10.0, "similar_photos": 50}
    assert summarize_decoding(plain) == "beam_size 3, length_penalty 0.5"
    sampled = plain | {"samples": 2, "temperature": 0.5, "views": ("original", "hflip"), "consensus_index": "a.pt"}
    expected = "samples 2, length_penalty 0.5, temperature 0.5, views original hflip, consensus_index a.pt"
    assert summarize_decoding(sampled) == f"{expected}, consensus_weight 10.0, similar_photos 50"
