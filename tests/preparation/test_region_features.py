"""Region features in each layout in which people have them: the same regions come out, and errors name the photo."""

from dataclasses import replace

import h5py
import numpy as np
import pytest

from preparation.records import ImageRecord
from preparation.region_features import RegionFeatures
from region_layouts import LAYOUTS, SIZE, random_regions, write_features, write_photos
from utils import InputError


@pytest.fixture
def photos(tmp_path):
    """Records of six photos, whose ids are 10 to 15."""
    return write_photos(tmp_path / "photos")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_same_regions(tmp_path, photos, layout):
    features, boxes = random_regions(6)
    order = [3, 0, 5, 1, 4, 2]  # not the records'
    path = write_features(tmp_path / "f", layout, [10 + i for i in order], features[order], boxes[order])
    found = RegionFeatures([str(path)], photos)
    found.require_all()
    assert found.found == photos and found.feature_dim == 5 and found.has_boxes
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
    assert found.missing == photos[5:] and found.found == photos[:5]
    for i in range(5):
        assert np.array_equal(found.read(photos[i], 32, "squash")[0], features[i].astype(np.float16))


def test_ids_that_may_be_names_of_other_photos_are_refused(tmp_path, photos):
    records = [replace(record, name=f"{i}.png", image_id=5 - i) for i, record in enumerate(photos)]
    features, boxes = random_regions(6)
    path = write_features(tmp_path / "f", "keyed", range(6), features, boxes)
    with pytest.raises(
        InputError, match=r"its photos, such as \d, could be file names or ids, which are different photos"
    ):
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
    features, boxes = map(list, random_regions(6))
    features[2], boxes[2] = change(features[2], boxes[2])
    path = write_features(tmp_path / "f", layout, range(10, 16), features, boxes)
    found = RegionFeatures([str(path)], photos)
    with pytest.raises(InputError, match=message):
        for record in photos:
            found.read(record, 32, "squash")


def test_whatever_a_damaged_file_raises_is_one_line(tmp_path, photos):
    features, boxes = random_regions(6)
    path = write_features(tmp_path / "f", "folder", range(10, 16), features, boxes)
    content = bytearray((path / "12.npz").read_bytes())
    content[len(content) // 2] ^= 255
    (path / "12.npz").write_bytes(content)
    (path / "13.npz").write_bytes(b"PK\x03\x04")
    np.savez(path / "14.npz", other=features[0])
    (tmp_path / "f" / "cocobu_box" / "15.npy").unlink()
    with open(path / "11.npy", "wb") as file:  # an absurd size
        header = {"descr": "<f4", "fortran_order": False, "shape": (92_222_222, 2048)}
        np.lib.format.write_array_header_1_0(file, header)
    (path / "11.npz").unlink()
    found = RegionFeatures([str(path)], photos)
    for i, message in ((1, ""), (2, ""), (3, ""), (4, ".*feat"), (5, ".*15.npy")):
        with pytest.raises(InputError, match=f"photo {10 + i} has a damaged entry: {message}") as error:
            found.read(photos[i], 32, "squash")
        assert "\n" not in str(error.value)


def test_linked_folders_keep_their_boxes_and_the_current_folder_may_be_given(tmp_path, photos, monkeypatch):
    path = write_features(tmp_path / "f", "folder", range(10, 16), *random_regions(6))
    for name in ("att", "box"):
        path.with_name(f"cocobu_{name}").rename(tmp_path / f"store_{name}s")
        (tmp_path / "f" / f"cocobu_{name}").symlink_to(tmp_path / f"store_{name}s")
    assert RegionFeatures([str(path)], photos).has_boxes
    monkeypatch.chdir(tmp_path / "f")
    assert RegionFeatures(["."], photos).has_boxes


def test_two_keys_of_the_same_photo_are_no_contradiction(tmp_path, photos):
    records = [replace(photos[0], name="COCO_val2014_000000000010.jpg"), photos[1]]
    features, boxes = random_regions(2)
    path = write_features(tmp_path / "f", "keyed", ["COCO_val2014_000000000010", "10"], features, boxes)
    assert [record.name for record in RegionFeatures([str(path)], records).missing] == ["photo1.png"]


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
    with pytest.raises(InputError, match="is refused: 12_features is a link or lies in other files"):
        found = RegionFeatures([str(path)], photos)
        for record in photos:
            found.read(record, 32, "squash")


def test_what_is_no_layout_is_named(tmp_path, photos):
    (tmp_path / "lines.tsv").write_bytes(b"a\tb\n")
    (tmp_path / "damaged.h5").write_bytes(b"\x89HDF\r\n\x1a\nrest")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["images"] = np.zeros(3)
    with h5py.File(tmp_path / "adaptive.h5", "w") as file:
        file["image_features"], file["pos_boxes"] = np.zeros((9, 5)), np.zeros((3, 2))
    for folder in ("empty", "two/a_att", "two/b_att"):
        (tmp_path / folder).mkdir(parents=True)
    for name, message in {
        "lines.tsv": "line 1: not 6 fields between tabs",
        "damaged.h5": "damaged: ",
        "other.h5": r"has no features of a photo \(ID.npz",
        "adaptive.h5": r"image_features has 2 axes, .* \(pos_boxes\) are not supported",
        "empty": r"has no features of a photo \(ID.npz",
        "two": "has a_att and b_att, give one",
        "emtpy": "no such file or folder, did you mean .*empty",
    }.items():
        with pytest.raises(InputError, match=message):
            RegionFeatures([str(tmp_path / name)], photos)
