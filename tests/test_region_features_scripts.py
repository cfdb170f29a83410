"""Region features through the scripts: prepared, trained on, scored and captioned from, within a bounded memory."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import caption as caption_script
import create_input_files
import eval as eval_script
import train
from conftest import SMALL, flags, logged_epochs, weights
from preparation.storage import StoredRegions, read_metadata, region_info
from region_layouts import SIZE, random_regions, write_features, write_photos
from utils import InputError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def photos(tmp_path):
    """Records of six photos, whose ids are 10 to 15."""
    return write_photos(tmp_path / "photos")


@pytest.fixture
def prepared(tmp_path, photos, command):
    """A folder prepared from photos with region features of 2 to 4 regions; returns a function and the features."""
    captions = {
        "images": [
            {
                "filename": record.name,
                "cocoid": record.image_id,
                "split": "val" if i == 5 else "train",
                "sentences": [{"raw": f"a {word} dog", "tokens": ["a", word, "dog"]} for word in ("big", "small")],
            }
            for i, record in enumerate(photos)
        ]
    }
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    features, boxes = random_regions(6, num_regions=4)
    ragged = [features[i, : 2 + i % 3] for i in range(6)], [boxes[i, : 2 + i % 3] for i in range(6)]
    path = write_features(tmp_path / "f", "tsv", [f"photo{i}" for i in range(6)], *ragged)

    def prepare(*more):
        arguments = ["--dataset", "mine", "--captions", tmp_path / "captions.json", "--images", tmp_path / "photos"]
        output = ["--output_folder", tmp_path / "data", "--image_size", 32, "--region_features", path]
        return command(create_input_files, *arguments, *output, *more)

    return prepare, ragged, path


def test_prepared_folders_hold_the_features(tmp_path, prepared):
    prepare, (features, boxes), path = prepared
    status, out, _ = prepare()
    assert status == 0 and "region features: 5 of each region, with boxes\n" in out
    metadata = read_metadata(tmp_path / "data")
    stored = StoredRegions(tmp_path / "data", "train", metadata)
    for i in range(5):
        assert np.array_equal(stored[i][0], features[i].astype(np.float16))
        np.testing.assert_allclose(stored[i][1], boxes[i] / np.float32([*SIZE, *SIZE]), atol=1e-6)
    assert region_info(metadata) == (5, True)
    assert "exists already" in prepare()[1]
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2] + lines[3:]))
    status, _, err = prepare("--overwrite")
    assert status == 2 and err.endswith("1 of 6 photos are missing: photo2.png\n")
    damaged = b"photo0\t80\t40\t2\tAAAA\tAAAA\n"
    path.write_bytes(b"".join([damaged, *lines[1:2], *lines[3:]]))
    status, out, err = prepare("--overwrite", "--skip_broken")
    assert status == 0 and "photo2.png: has no region features" in err and "train: 3 images" in out, err
    assert "photo photo0 has a damaged entry" in err
    metadata = read_metadata(tmp_path / "data")
    stored = StoredRegions(tmp_path / "data", "train", metadata)
    assert np.array_equal(stored[0][0], features[1].astype(np.float16)) and len(stored.offsets) == 4


def test_a_file_of_another_split_or_folder_is_refused(tmp_path, prepared):
    assert prepared[0]()[0] == 0
    data, metadata = tmp_path / "data", read_metadata(tmp_path / "data")
    shutil.copy(data / "val_regions.hdf5", data / "train_regions.hdf5")
    with pytest.raises(InputError, match=r"train_regions\.hdf5 is not the file that dataset.json describes: run"):
        StoredRegions(data, "train", metadata)
    with h5py.File(data / "train_regions.hdf5", "a") as file:  # as many images, other features
        file.attrs["digest"] = metadata["splits"]["train"]["regions_digest"]
        del file["offsets"]
        file["offsets"] = np.arange(6)
    StoredRegions(data, "train", metadata)
    with h5py.File(data / "train_regions.hdf5", "a") as file:
        file.attrs["digest"] = "of another folder"
    with pytest.raises(InputError, match=r"train_regions\.hdf5 is not the file that dataset.json describes: run"):
        StoredRegions(data, "train", metadata)
    for change in (lambda path: path.write_bytes(b"x"), lambda path: path.unlink()):
        change(data / "train_regions.hdf5")
        with pytest.raises(InputError, match=r"train_regions\.hdf5 is missing or damaged: run create_input_files.py"):
            StoredRegions(data, "train", metadata)


def test_a_model_that_needs_boxes_gets_no_features_without(tmp_path, prepared, photos, command):
    assert prepared[0]()[0] == 0
    settings = replace(SMALL, fine_tune_encoder=False, regions="features", box_features=True, epochs=1)
    assert command(train, *flags(tmp_path / "data", tmp_path / "run", settings))[0] == 0
    (tmp_path / "vectors").mkdir()
    for record in photos:
        np.save(tmp_path / "vectors" / f"{Path(record.name).stem}.npy", np.ones((2, 5), np.float32))
    photo, best = photos[0].path, tmp_path / "run" / "best.pt"
    status, _, err = command(
        caption_script, photo, "--checkpoint", best, "--region_features", tmp_path / "vectors", "--no-pictures"
    )
    assert status == 2 and "vectors: without boxes, which the model needs" in err
    assert prepared[0]("--overwrite", "--region_features", tmp_path / "vectors")[0] == 0
    status, _, err = command(eval_script, "--checkpoint", best, "--data_folder", tmp_path / "data", "--split", "val")
    assert status == 2 and "has region features without boxes, which the model needs" in err
    without = replace(settings, box_features=False, grounding_weight=1.0)
    status, _, err = command(train, *flags(tmp_path / "data", tmp_path / "other", without))
    assert status == 2 and "--grounding_weight: the region features of" in err and "have no boxes" in err


@pytest.mark.slow
def test_workers_and_resumed_runs_see_the_same_features(tmp_path, prepared, command, monkeypatch):
    monkeypatch.setattr(train, "plot_curves", lambda *_: None)  # half a second an epoch
    assert prepared[0]()[0] == 0
    settings = replace(SMALL, fine_tune_encoder=False, regions="features", epochs=2, batch_size=2)
    for name, changes in (("one", {}), ("workers", {"workers": 2}), ("resumed", {"epochs": 1})):
        status, _, err = command(train, *flags(tmp_path / "data", tmp_path / name, replace(settings, **changes)))
        assert status == 0, err
    expected = weights(tmp_path / "one" / "last.pt")
    for name, value in weights(tmp_path / "workers" / "last.pt").items():
        assert torch.equal(value, expected[name]), name
    status, _, err = command(train, "--resume", tmp_path / "resumed" / "last.pt", "--epochs", 2)
    assert status == 0 and logged_epochs(tmp_path / "resumed") == [1, 2], err


def test_a_model_of_region_features_goes_through_the_scripts(tmp_path, prepared, command, no_meteor):
    prepare, _, path = prepared
    assert prepare()[0] == 0
    data, run = tmp_path / "data", tmp_path / "run"
    settings = replace(SMALL, fine_tune_encoder=False, regions="features", box_features=True)
    status, out, err = command(train, *flags(data, run, settings))
    assert status == 0, err
    status, out, err = command(
        eval_script, "--checkpoint", run / "best.pt", "--data_folder", data, "--split", "val", "--beam_sizes", 2
    )
    assert status == 0, err
    photo = tmp_path / "photos" / "photo1.png"
    arguments = [photo, photo, "--checkpoint", run / "best.pt", "--output_folder", tmp_path / "pictures"]
    status, _, err = command(caption_script, *arguments)
    assert status == 2 and "has no encoder, it was trained on the region features of a detector: give those" in err
    status, out, err = command(caption_script, *arguments, "--region_features", path)
    assert status == 0 and out.count("photo1.png: ") == 2, err
    assert (tmp_path / "pictures" / "photo1_attention.png").is_file()
    for bad in (("--hflip",), ("--fine_tune_encoder",), ("--encoder", "resnet18")):
        extra = [each for each in flags(data, tmp_path / "other", settings) if each != f"--no-{bad[0][2:]}"]
        status, _, err = command(train, *extra, *bad)
        assert status == 2 and f"{' '.join(bad)} cannot be combined with --regions features" in err, err
    status, _, err = command(caption_script, *arguments, "--region_features", path, "--views", "original", "hflip")
    assert status == 2 and "models of region features support only the original view" in err


def test_features_are_needed_where_a_model_looks_at_them(tmp_path, prepared, shapes, command):
    settings = replace(SMALL, fine_tune_encoder=False, regions="features")
    status, _, err = command(train, *flags(shapes, tmp_path / "run", settings))
    assert status == 2 and "--regions features: the data folder has none, prepare it with --region_features" in err


PEAK = """
import resource, sys
import create_input_files
from utils import run_script
run_script(create_input_files.main, create_input_files.Settings)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


NUM_PHOTOS = 1000


def peak_memory(folder, output, *more):
    """The peak memory in MB of preparing the photos of a folder."""
    arguments = ["--dataset", "mine", "--captions", folder / "captions.csv", "--images", folder / "photos"]
    arguments += ["--image_size", 32, "--output_folder", output, *more]
    command = [sys.executable, "-c", PEAK, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def many_photos(tmp_path_factory):
    """A folder of 1,000 photos with captions, random regions for them (295 MB), and the memory without regions."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "photos").mkdir()
    for i in range(NUM_PHOTOS):
        Image.new("RGB", SIZE).save(folder / "photos" / f"{i}.png")
    (folder / "captions.csv").write_text("image,caption\n" + "".join(f"{i}.png,a dog\n" for i in range(NUM_PHOTOS)))
    return folder, random_regions(NUM_PHOTOS, 36, 2048), peak_memory(folder, folder / "without")


@pytest.mark.parametrize("layout", ["npy folder", "tsv", "keyed", "stacked"])
@pytest.mark.slow
def test_memory_does_not_grow_with_the_features(tmp_path, many_photos, layout):
    folder, regions, without = many_photos
    path = write_features(tmp_path / "f", layout, range(NUM_PHOTOS), *regions)
    peak = peak_memory(folder, tmp_path / "with", "--region_features", path)
    assert peak < without + 60, (peak, without)
    total = sum((tmp_path / "with" / f"{split}_regions.hdf5").stat().st_size for split in ("train", "val", "test"))
    assert total == pytest.approx(NUM_PHOTOS * 36 * (2048 * 2 + 16), rel=0.02)
    shutil.rmtree(tmp_path)
