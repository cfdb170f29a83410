"""Detectors of torchvision over photos: what is written, kept of a stopped run, and refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import create_input_files
from preparation.detection import KEPT_SCORE, MIN_KEPT, Detector, detect_objects
from preparation.objects import add_objects
from preparation.records import ImageRecord, pack_sentences
from preparation.storage import read_captions
from utils import InputError

NAME = "fasterrcnn_mobilenet_v3_large_320_fpn"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def detector(detector_weights):
    """A detector that calls whatever it sees a dog."""
    return Detector(NAME, detector_weights, CPU)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Records of three photos and one that is none."""
    folder = tmp_path_factory.mktemp("detected") / "photos"
    folder.mkdir()
    records = []
    for i in range(4):
        path = folder / f"{i}.png"
        pixels = np.random.default_rng(i).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        records.append(ImageRecord(path, path.name, i, "train", pack_sentences(["a dog"])))
    records[2].path.write_text("no photo")
    return records


@pytest.fixture(scope="module")
def results(photos, detector):
    """The file of the objects in these photos."""
    path = photos[0].path.parent.with_name("objects.json")
    detect_objects(photos, path, detector)
    return path


def stop_at_the_second_photo(detector, photos, path):
    """Interrupt a detection; returns a detector that goes on, and the list of its calls."""
    calls = []

    def stopped(photo):
        calls.append(photo)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return detector(photo)

    stopped.fingerprint, stopped.name = detector.fingerprint, NAME
    with pytest.raises(KeyboardInterrupt):
        detect_objects(photos, path, stopped)
    assert not path.exists()
    return stopped, calls


def test_objects_are_coco_results(photos, results):
    rows = json.loads(results.read_text())
    assert {row["image"] for row in rows} == {"0.png", "1.png", "3.png"}
    assert {row["category"] for row in rows} == {"dog"} and not results.with_name("objects.json.partial").exists()
    for name in ("0.png", "1.png"):
        scores = [row["score"] for row in rows if row["image"] == name]
        assert scores == sorted(scores, reverse=True) and all(score >= KEPT_SCORE for score in scores[MIN_KEPT:])
    left, top, width, height = np.array([row["bbox"] for row in rows]).T
    assert left.min() >= 0 and top.min() >= 0 and (left + width).max() <= 60.01 and (top + height).max() <= 40.01
    found = add_objects([photos[0]], results)[0].objects
    assert found and found[0]["words"] == ["dog"]


def test_a_stopped_run_continues(tmp_path, photos, results, detector):
    path = tmp_path / "objects.json"
    stopped, calls = stop_at_the_second_photo(detector, photos, path)
    partial = path.with_name("objects.json.partial")
    partial.write_bytes(partial.read_bytes() + b'{"image": "1.png", "obj')  # killed within a line
    with pytest.raises(InputError, match="is not from this detector with these weights: remove it"):
        detect_objects(photos, path, Detector(NAME, "", CPU))
    detect_objects(photos, path, stopped)
    assert path.read_text() == results.read_text() and len(calls) == 4  # photos 1 and 3 were left, one cannot be read


def test_a_photo_of_the_same_name_is_another(tmp_path, photos, detector):
    (tmp_path / "other").mkdir()
    Image.new("RGB", (30, 30)).save(tmp_path / "other" / "0.png")
    other = [replace(photos[0], path=tmp_path / "other" / "0.png")]
    stop_at_the_second_photo(detector, photos, tmp_path / "resumed.json")
    for name in ("resumed.json", "at once.json"):
        detect_objects(other, tmp_path / name, detector)
    assert (tmp_path / "resumed.json").read_text() == (tmp_path / "at once.json").read_text() != "[]\n"


def test_photos_that_are_missing_are_no_photos_without_objects(tmp_path, photos, detector):
    with pytest.raises(InputError, match=r"none\.png: no such file"):
        detect_objects([replace(photos[0], path=tmp_path / "none.png")], tmp_path / "objects.json", detector)
    assert not (tmp_path / "objects.json").exists()


def test_strips_have_no_objects(tmp_path, photos, detector):
    Image.new("RGB", (1, 5000)).save(tmp_path / "strip.png")
    strip = replace(photos[0], path=tmp_path / "strip.png")
    assert detect_objects([strip], tmp_path / "objects.json", detector) == 0
    assert (tmp_path / "objects.json").read_text() == "[]\n"


def test_weights_as_torchvision_stores_them_are_loaded(tmp_path, detector, detector_weights):
    state = torch.load(detector_weights, weights_only=True)
    own = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    old = {name.replace("rpn.head.conv.0.0.", "rpn.head.conv."): value for name, value in own.items()}
    for i, content in enumerate((own, old)):
        torch.save(content, tmp_path / f"{i}.pth")
        assert Detector(NAME, str(tmp_path / f"{i}.pth"), CPU).fingerprint() == detector.fingerprint()
    name = "roi_heads.box_head.fc6.bias"
    less = {key: value for key, value in own.items() if key != name}
    for content, message in ((own | {name: own[name][:5]}, f"mismatch for {name}"), (less, name), ({0: own[name]}, "")):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(InputError, match=f"not the weights of fasterrcnn_.*, see .*{message}"):
            Detector(NAME, str(tmp_path / "other.pth"), CPU)


def test_other_files_are_not_continued(tmp_path, photos, detector):
    (tmp_path / "objects.json.partial").write_text('["mine"]\nnotes\n')
    with pytest.raises(InputError, match="is not from this detector with these weights: remove it"):
        detect_objects(photos, tmp_path / "objects.json", detector)
    assert (tmp_path / "objects.json.partial").read_text() == '["mine"]\nnotes\n'


def test_unknown_detectors_and_weights_are_refused(tmp_path, detector_weights):
    with pytest.raises(InputError, match=r"--detect yolo: not one of fasterrcnn_mobilenet_v3_large_320_fpn .* ssdlite"):
        Detector("yolo", "", CPU)
    with pytest.raises(InputError, match="not the weights of ssdlite320_mobilenet_v3_large"):
        Detector("ssdlite320_mobilenet_v3_large", detector_weights, CPU)


def test_photos_are_prepared_with_what_was_found(tmp_path, photos, detector_weights, command):
    lines = "".join(f"{record.name},a dog\n" for record in photos if record.image_id != 2)
    (tmp_path / "captions.csv").write_text(f"image,caption\n{lines}")
    arguments = ["--dataset", "mine", "--captions", tmp_path / "captions.csv", "--images", photos[0].path.parent]
    arguments += ["--image_size", 32, "--output_folder", tmp_path / "data", "--detect", NAME]
    status, _, err = command(create_input_files, *arguments, "--detector_weights", detector_weights)
    assert status == 2 and f"--detect {NAME} requires --objects" in err
    arguments += ["--detector_weights", detector_weights, "--objects", tmp_path / "objects.json"]
    status, out, err = command(create_input_files, *arguments)
    assert status == 0 and "objects in 3 photos, 0 photos have none" in out, err
    assert read_captions(tmp_path / "data", "train").objects[0][0]["words"] == ["dog"]
    random = [*arguments[:-3], "", "--objects", tmp_path / "nothing.json"]
    status, _, err = command(create_input_files, *random)
    assert status == 2 and f"--detect {NAME}: found nothing in 3 photos" in err
    assert not (tmp_path / "nothing.json").exists()
    status, out, _ = command(create_input_files, *arguments)
    assert status == 0 and "objects.json exists and is used" in out and "data exists already" in out
