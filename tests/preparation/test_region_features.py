"""Region features in each layout in which people have them: the same regions come out, and errors name the photo."""

import base64
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
from preparation.records import ImageRecord, pack_sentences
from preparation.region_features import RegionFeatures
from preparation.storage import StoredRegions, read_metadata, region_info
from utils import InputError

ROOT = Path(__file__).parents[2]
SIZE = (80, 40)  # of the photos in pixels
LAYOUTS = ("folder", "npy folder", "tsv", "keyed", "stacked", "stacked pixels")


def random_regions(num_photos, num_regions=3, width=5, seed=0):
    """Regions of each photo: features (N, F) and boxes (N, 4) in pixels."""
    rng = np.random.default_rng(seed)
    top_left = rng.integers(0, 20, (num_photos, num_regions, 2))
    boxes = np.concatenate([top_left, top_left + rng.integers(1, 20, top_left.shape)], axis=2).astype(np.float32)
    return rng.random((num_photos, num_regions, width), np.float32), boxes


def write_features(folder, layout, ids, features, boxes):
    """Write features and boxes in a layout; returns the path to give."""
    folder.mkdir(exist_ok=True)
    if "folder" in layout:
        for name in ("cocobu_att", "cocobu_box"):
            (folder / name).mkdir()
        for photo, values, corners in zip(ids, features, boxes, strict=True):
            if layout == "folder":
                np.savez_compressed(folder / "cocobu_att" / f"{photo}.npz", feat=values)
            else:
                np.save(folder / "cocobu_att" / f"{photo}.npy", values)
            np.save(folder / "cocobu_box" / f"{photo}.npy", corners)
        return folder / "cocobu_att"
    if layout == "tsv":
        with open(folder / "features.tsv", "wb") as file:
            for photo, values, corners in zip(ids, features, boxes, strict=True):
                fields = [str(photo), str(SIZE[0]), str(SIZE[1]), str(len(values))]
                encoded = [base64.b64encode(np.ascontiguousarray(x, np.float32).tobytes()) for x in (corners, values)]
                file.write(b"\t".join([*(field.encode() for field in fields), *encoded]) + b"\n")
        return folder / "features.tsv"
    path = folder / "features.hdf5"
    with h5py.File(path, "w") as file:
        if layout == "keyed":
            for photo, values, corners in zip(ids, features, boxes, strict=True):
                file[f"{photo}_features"], file[f"{photo}_boxes"] = values, corners
                file[f"{photo}_cls_prob"] = np.zeros((len(values), 2))
        else:
            file["image_features"], file["image_bb"] = np.asarray(features), np.asarray(boxes)
            if layout == "stacked":
                spatial = np.asarray(boxes) / np.float32([*SIZE, *SIZE])
                file["spatial_features"] = np.concatenate([spatial, spatial[..., :2]], axis=2)
    (folder / "features_imgid2idx.json").write_text(json.dumps({str(photo): row for row, photo in enumerate(ids)}))
    return path


@pytest.fixture
def photos(tmp_path):
    """Records of six photos, whose ids are 10 to 15."""
    (tmp_path / "photos").mkdir()
    records = []
    for i in range(6):
        path = tmp_path / "photos" / f"photo{i}.png"
        Image.new("RGB", SIZE, (40 * i, 0, 0)).save(path)
        captions = pack_sentences([f"a {word} dog" for word in ("big", "small")])
        records.append(ImageRecord(path, path.name, 10 + i, "train", captions, has_own_id=True))
    return records


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_same_regions(tmp_path, photos, layout):
    features, boxes = random_regions(6)
    order = [3, 0, 5, 1, 4, 2]  # not the records'
    path = write_features(tmp_path / "f", layout, [10 + i for i in order], features[order], boxes[order])
    found = RegionFeatures([str(path)], photos)
    found.require_all()
    assert found.feature_dim == 5 and found.has_boxes
    for i, record in enumerate(photos):
        read_features, read_boxes = found.read(record, 32, "squash")
        assert np.array_equal(read_features, features[i].astype(np.float16)) and read_features.dtype == np.float16
        np.testing.assert_allclose(read_boxes, boxes[i] / np.float32([*SIZE, *SIZE]), atol=1e-6)
    padded = found.read(photos[2], 32, "pad")[1]  # the photo is the middle half of the square
    np.testing.assert_allclose(padded[:, 1], 0.25 + boxes[2][:, 1] / 80, atol=1e-6)


def test_photos_are_found_by_name_and_in_several_files(tmp_path, photos):
    features, boxes = random_regions(6)
    first = write_features(tmp_path / "a", "tsv", ["photo0", "photo1.png", "x"], features[:3], boxes[:3])
    second = write_features(tmp_path / "b", "keyed", [f"photo{i}" for i in (2, 3, 4)], features[2:5], boxes[2:5])
    found = RegionFeatures([str(first), str(second)], photos)
    assert [record.name for record in found.missing] == ["photo5.png"] and not found.has(photos[5])
    for i in range(5):
        assert np.array_equal(found.read(photos[i], 32, "squash")[0], features[i].astype(np.float16))


def test_ids_that_may_be_names_of_other_photos_are_refused(tmp_path, photos):
    records = [replace(record, name=f"{i}.png", image_id=5 - i) for i, record in enumerate(photos)]
    features, boxes = random_regions(6)
    path = write_features(tmp_path / "f", "keyed", range(6), features, boxes)
    with pytest.raises(InputError, match=r"its photos, such as \d, may be file names or ids, of other photos"):
        RegionFeatures([str(path)], records)
    found = RegionFeatures([str(path)], [*records[:5], replace(records[5], name="other.png")])  # ids find more
    assert np.array_equal(found.read(records[0], 32, "squash")[0], features[5].astype(np.float16))


def test_entries_that_may_mean_the_same_photo_are_none_of_it(tmp_path, photos):
    names = [f"{folder}/photo{i}.png" for folder in ("a", "b") for i in range(2)] + ["photo2", "c/photo3.png"]
    features, boxes = random_regions(6)
    path = write_features(tmp_path / "f", "tsv", names, features, boxes)
    found = RegionFeatures([str(path)], photos[:4])
    assert [record.name for record in found.missing] == ["photo0.png", "photo1.png"]


def test_grids_and_vectors_are_regions_too(tmp_path, photos):
    for name, shape in (("grid_att", (2, 3, 5)), ("vector", (5,))):
        (tmp_path / name).mkdir()
        for record in photos:
            np.save(
                tmp_path / name / f"{record.image_id}.npy", np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
            )
    features, boxes = RegionFeatures([str(tmp_path / "grid_att")], photos).read(photos[0], 32, "squash")
    assert features.tolist() == np.arange(30).reshape(6, 5).tolist()
    np.testing.assert_allclose(boxes[[0, 5]], [[0, 0, 1 / 3, 0.5], [2 / 3, 0.5, 1, 1]], atol=1e-6)
    vectors = RegionFeatures([str(tmp_path / "vector")], photos)
    assert not vectors.has_boxes and vectors.read(photos[0], 32, "squash")[1].tolist() == [[0, 0, 1, 1]]


def test_the_first_ten_missing_photos_are_listed(tmp_path, photos):
    records = [*photos, *(ImageRecord(tmp_path / f"{i}.jpg", f"{i}.jpg", i, "train", b"[]") for i in range(100, 112))]
    features, boxes = random_regions(4)
    path = write_features(tmp_path / "f", "tsv", [10, 11, 12, 13], features, boxes)
    with pytest.raises(InputError, match=r"14 of 18 photos are missing: photo4.png, .*, 107.jpg and 4 more$"):
        RegionFeatures([str(path)], records).require_all()
    with pytest.raises(InputError, match=r"has none of the photos, such as 100\.jpg"):
        RegionFeatures([str(path)], records[6:])


def damage(layout, tmp_path, photos, change):
    """The error of reading all photos where `change` was made to the features and boxes of photo 12."""
    features, boxes = map(list, random_regions(6))
    features[2], boxes[2] = change(features[2], boxes[2])
    path = write_features(tmp_path / "f", layout, range(10, 16), features, boxes)
    found = RegionFeatures([str(path)], photos)
    with pytest.raises(InputError) as error:
        for record in photos:
            found.read(record, 32, "squash")
    return str(error.value)


@pytest.mark.parametrize("layout", ["folder", "tsv", "keyed"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, b: (f * np.nan, b), "photo 12 has features that are not finite"),
        (lambda f, b: (f + 1e5, b), "photo 12 has features that are not finite, or too large for float16"),
        (lambda f, b: (f, b + 50), "photo 12 has boxes beyond its 80 x 40 pixels: give the photos"),
        (lambda f, b: (f, b * np.nan), "photo 12 has boxes beyond its 80 x 40"),
        (lambda f, b: (f[:, :4], b), "photo 12 has 4 features and boxes, unlike the others"),
        (lambda f, b: (f, b[:, [2, 3, 0, 1]]), "photo 12 has no box with an area in the image"),
        (lambda f, b: (f, b[:2]), "photo 12 has"),
        (lambda f, b: (f[:, :0], b), "photo 12 has"),
    ],
)
def test_damaged_features_are_named(tmp_path, photos, layout, change, message):
    assert message in damage(layout, tmp_path, photos, change)


def test_whatever_a_damaged_file_raises_is_one_line(tmp_path, photos):
    features, boxes = random_regions(6)
    path = write_features(tmp_path / "f", "folder", range(10, 16), features, boxes)
    content = bytearray((path / "12.npz").read_bytes())
    content[len(content) // 2] ^= 255
    (path / "12.npz").write_bytes(content)
    (path / "13.npz").write_bytes(b"PK\x03\x04")
    np.savez(path / "14.npz", other=features[0])
    (tmp_path / "f" / "cocobu_box" / "15.npy").unlink()
    found = RegionFeatures([str(path)], photos)
    for i, message in ((2, "a damaged entry: "), (3, "a damaged entry: "), (4, "feat"), (5, "15.npy")):
        with pytest.raises(InputError, match=f"photo {10 + i} has a damaged entry: .*") as error:
            found.read(photos[i], 32, "squash")
        assert message in str(error.value) and "\n" not in str(error.value)


def test_layouts_that_are_not_read_are_named(tmp_path, photos):
    with h5py.File(tmp_path / "adaptive.hdf5", "w") as file:
        file["image_features"], file["pos_boxes"] = np.zeros((9, 5)), np.zeros((3, 2))
    with pytest.raises(InputError, match=r"image_features has 2 axes, .* \(pos_boxes\) are not read"):
        RegionFeatures([str(tmp_path / "adaptive.hdf5")], photos)
    for name in ("a_att", "b_att"):
        (tmp_path / "two" / name).mkdir(parents=True)
    with pytest.raises(InputError, match="has a_att and b_att, give one"):
        RegionFeatures([str(tmp_path / "two")], photos)


def test_linked_folders_keep_their_boxes(tmp_path, photos):
    path = write_features(tmp_path / "f", "folder", range(10, 16), *random_regions(6))
    for name in ("att", "box"):
        path.with_name(f"cocobu_{name}").rename(tmp_path / f"store_{name}s")
        (tmp_path / "f" / f"cocobu_{name}").symlink_to(tmp_path / f"store_{name}s")
    assert RegionFeatures([str(path)], photos).has_boxes


def test_two_keys_of_the_same_photo_are_no_contradiction(tmp_path, photos):
    records = [replace(photos[0], name="COCO_val2014_000000000010.jpg"), photos[1]]
    features, boxes = random_regions(2)
    path = write_features(tmp_path / "f", "keyed", ["COCO_val2014_000000000010", "10"], features, boxes)
    assert [record.name for record in RegionFeatures([str(path)], records).missing] == ["photo1.png"]


def test_an_absurd_header_is_damage(tmp_path, photos):
    path = write_features(tmp_path / "f", "npy folder", range(10, 16), *random_regions(6))
    header = {"descr": "<f4", "fortran_order": False, "shape": (92_222_222, 2048)}
    with open(path / "12.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(InputError, match="photo 12 has a damaged entry"):
        RegionFeatures([str(path)], photos).read(photos[2], 32, "squash")


def test_the_current_folder_may_be_given(tmp_path, photos, monkeypatch):
    features, boxes = random_regions(6)
    monkeypatch.chdir(write_features(tmp_path / "f", "folder", range(10, 16), features, boxes))
    assert RegionFeatures(["."], photos).has_boxes


def test_regions_without_area_are_left_out(tmp_path, photos):
    features, boxes = random_regions(6)
    boxes[4, 1, 2] = boxes[4, 1, 0]
    found = RegionFeatures([str(write_features(tmp_path / "f", "keyed", range(10, 16), features, boxes))], photos)
    assert [len(found.read(record, 32, "squash")[0]) for record in photos] == [3, 3, 3, 3, 2, 3]
    assert found.describe() == "region features: 5 of each region, with boxes, 1 regions without area are left out"


def test_no_pickle_is_read(tmp_path, photos):
    (tmp_path / "att").mkdir()
    np.save(tmp_path / "att" / "10.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="photo 10 has a damaged entry"):
        RegionFeatures([str(tmp_path / "att")], photos)
    features, boxes = random_regions(6)
    path = write_features(tmp_path / "f", "stacked", range(10, 16), features, boxes)
    (tmp_path / "f" / "features_imgid2idx.json").rename(tmp_path / "f" / "features_imgid2idx.pkl")
    with pytest.raises(InputError, match=r"its rows have no ids, give them as features_imgid2idx.json .* pickle"):
        RegionFeatures([str(path)], photos)


def test_content_in_other_files_is_refused(tmp_path, photos):
    features, boxes = random_regions(6)
    path = write_features(tmp_path / "f", "keyed", range(10, 16), features, boxes)
    with h5py.File(path, "a") as file:
        del file["12_features"]
        file["12_features"] = h5py.ExternalLink("/etc/passwd", "x")
    with pytest.raises(InputError, match="is refused: its 12_features are a link or lie in other files"):
        found = RegionFeatures([str(path)], photos)
        for record in photos:
            found.read(record, 32, "squash")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a\tb\n", "line 1: not 6 fields between tabs"), (b"\x89HDF\r\n\x1a\nrest", "a damaged HDF5 file")],
)
def test_other_files_are_refused(tmp_path, photos, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(InputError, match=message):
        RegionFeatures([str(tmp_path / "file")], photos)


def test_an_empty_folder_and_a_missing_file_are_errors(tmp_path, photos):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no .npz or .npy files in this folder"):
        RegionFeatures([str(tmp_path / "empty")], photos)
    with pytest.raises(InputError, match=r"no such file or folder, did you mean .*empty"):
        RegionFeatures([str(tmp_path / "emtpy")], photos)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["images"] = np.zeros(3)
    with pytest.raises(InputError, match="has neither image_features nor ID_features"):
        RegionFeatures([str(tmp_path / "other.h5")], photos)


# ------------------------------------------------------------------------------------------------ through the scripts


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
def test_workers_and_resumed_runs_see_the_same_features(tmp_path, prepared, command):
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
    for bad, message in (
        (("--hflip",), "--hflip: region features are those of the photos as they are"),
        (("--fine_tune_encoder",), "--fine_tune_encoder: --regions features has no encoder"),
        (("--encoder", "resnet18"), "--encoder: --regions features has no encoder, leave it out"),
    ):
        extra = [each for each in flags(data, tmp_path / "other", settings) if each != f"--no-{bad[0][2:]}"]
        status, _, err = command(train, *extra, *bad)
        assert status == 2 and message in err, err
    status, _, err = command(caption_script, *arguments, "--region_features", path, "--views", "original", "hflip")
    assert status == 2 and "a model of region features knows the original only" in err


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
