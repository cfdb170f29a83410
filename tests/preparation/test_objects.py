"""Objects of photos: COCO's results and annotations, given to records as fractions of their photos."""

import json
import subprocess
import sys
from dataclasses import replace

import h5py
import numpy as np
import pytest
from PIL import Image

import create_input_files
from evaluation.photo_regions import read_objects
from preparation.images import open_photo, pad_boxes, photo_size, place_objects
from preparation.objects import MAX_OBJECTS, add_objects
from preparation.records import ImageRecord, pack_sentences
from utils import InputError

DOG = {"image": "a.jpg", "bbox": [10, 20, 30, 10], "category": "dog", "score": 0.5}
COCO = {
    "images": [{"id": 3, "width": 200, "height": 100}, {"id": 5, "file_name": "val/b.jpg"}],
    "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}],
    "annotations": [
        {"image_id": 3, "category_id": 18, "bbox": [20, 10, 100, 50], "iscrowd": 0},
        {"image_id": 3, "category_id": 1, "bbox": [0, 0, 200, 100], "iscrowd": 1},
        {"image_id": 5, "category_id": 1, "bbox": [8, 4, 8, 4]},
    ],
}


@pytest.fixture
def records(tmp_path):
    """Photos a.jpg of 100x50 pixels, turned upright 50x100, and folder/b.jpg of 80x40; their ids are 3 and 7."""
    (tmp_path / "folder").mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (100, 50)).save(tmp_path / "a.jpg", exif=turned)
    Image.new("RGB", (80, 40)).save(tmp_path / "folder" / "b.jpg")
    names, captions = {"a.jpg": 3, "folder/b.jpg": 7}, pack_sentences(["a dog"])
    return [
        ImageRecord(tmp_path / name, name, image_id, "train", captions, has_own_id=True)
        for name, image_id in names.items()
    ]


@pytest.fixture
def write(tmp_path):
    """Write JSON to a file and return its path."""

    def write(content):
        path = tmp_path / "objects.json"
        path.write_text(json.dumps(content, default=repr))
        return path

    return write


def test_results_are_found_by_name_or_id(records, write, capsys):
    other = {"image_id": 7.0, "bbox": [0, 0, 80, 20], "category_id": 1, "category": None, "score": 0.25}
    ball = {"image_id": "b", "bbox": [8, 4, 8.0, 4], "category": "sports ball", "score": 1}
    unknown = DOG | {"image": "other.jpg"}
    found = add_objects(records, write([DOG, other, DOG | {"score": 0.75, "category_id": 1}, ball, unknown]))
    assert [record.objects for record in found] == [
        [
            {"words": ["dog"], "box": [0.2, 0.2, 0.8, 0.3], "score": score} for score in (0.75, 0.5)
        ],  # the photo is turned
        [
            {"words": ["sports", "ball"], "box": [0.1, 0.1, 0.2, 0.2], "score": 1},
            {"words": ["person"], "box": [0, 0, 1, 0.5], "score": 0.25},
        ],
    ]
    assert capsys.readouterr().out == (
        "4 objects in 2 photos, 0 photos have none\nobjects left out: 1 of other photos\n"
    )
    for name in ("a.jpg", "train2014/a.jpg", "a", "3"):
        first, second = add_objects(records, write([DOG | {"image": name}]))
        assert len(first.objects) == 1 and second.objects == []


def test_ids_come_before_names_that_look_like_them(records, write):
    swapped = [
        replace(record, name=f"{other.image_id}.jpg") for record, other in zip(records, records[::-1], strict=True)
    ]
    first, second = add_objects(swapped, write([DOG | {"image": None, "image_id": swapped[0].image_id}]))
    assert len(first.objects) == 1 and second.objects == []


def test_neither_counted_ids_nor_shared_names_find_a_photo(records, write):
    counted = [replace(record, has_own_id=False) for record in records]
    row = {"image_id": 3, "bbox": [0, 0, 9, 9], "category_id": 1, "score": 1}
    assert [record.objects for record in add_objects(counted, write([row]))] == [[], []]
    same = [replace(record, name=f"{i}/a.jpg") for i, record in enumerate(records)]
    found = add_objects(same, write([DOG, DOG | {"image": "1/a.jpg"}]))
    assert [len(record.objects) for record in found] == [0, 1]


def test_boxes_are_clipped_and_those_outside_left_out(records, write, capsys):
    boxes = [[-10, -10, 20, 30], [40, 90, 100, 100], [60, 0, 5, 5], [0, 0, 0, 5]]
    found = add_objects(records, write([DOG | {"bbox": box} for box in boxes]))
    assert [item["box"] for item in found[0].objects] == [[0, 0, 0.2, 0.2], [0.8, 0.9, 1, 1]]
    assert capsys.readouterr().out == (
        "2 objects in 1 photos, 1 photos have none\nobjects left out: 2 outside of their photo\n"
    )


def test_the_best_objects_of_a_photo_are_kept(records, write, capsys):
    found = add_objects(records, write([DOG | {"score": i / 200} for i in range(MAX_OBJECTS + 3)]))
    assert [item["score"] for item in found[0].objects] == [i / 200 for i in range(MAX_OBJECTS + 2, 2, -1)]
    assert "objects left out: 3 beyond the best 100 of a photo" in capsys.readouterr().out


@pytest.mark.parametrize("order", [("images", "annotations", "categories"), ("annotations", "categories", "images")])
def test_annotations_name_their_photos_sizes_and_categories(records, write, order):
    found = add_objects(records, write({name: COCO[name] for name in order}))
    assert [record.objects for record in found] == [
        [{"words": ["dog"], "box": [0.1, 0.1, 0.6, 0.6], "score": 1}],  # the size is that of the file
        [{"words": ["person"], "box": [0.1, 0.1, 0.2, 0.2], "score": 1}],
    ]


def test_a_photo_gets_the_objects_of_the_name_that_agrees_most(records, write, capsys):
    named = [DOG | {"image": name, "score": score} for name, score in (("x/b.jpg", 0.5), ("y/folder/b.jpg", 0.6))]
    _, second = add_objects(records, write(named))
    assert [item["score"] for item in second.objects] == [0.6]
    assert "objects left out: 1 of other photos" in capsys.readouterr().out
    _, second = add_objects(records, write([DOG | {"image": f"{folder}/b.jpg"} for folder in "xy"]))
    assert second.objects == []  # it may be either


def test_photos_of_one_name_are_told_by_their_folders(tmp_path, write):
    photos = [tmp_path / folder / "cat.jpg" for folder in "ab"]
    for photo in photos:
        photo.parent.mkdir()
        Image.new("RGB", (100, 50)).save(photo)
    path = write([DOG | {"image": "b/cat.jpg"}, DOG | {"image": "a/cat.jpg", "category": "cat"}])
    found = read_objects([*map(str, photos), f"{tmp_path}/./b/cat.jpg"], path, 32, "squash")
    assert [[item["words"] for item in objects] for objects in found] == [[["cat"]], [["dog"]], [["dog"]]]


@pytest.mark.parametrize("stem", ["COCO_val2014_000000000042", "000000000042", "42"])
def test_coco_ids_find_photos_with_coco_names(tmp_path, write, stem):
    Image.new("RGB", (100, 50)).save(tmp_path / f"{stem}.jpg")
    row = {"image_id": 42, "bbox": [0, 0, 50, 50], "category_id": 1, "score": 0.5}
    ((found,),) = read_objects([str(tmp_path / f"{stem}.jpg")], write([row]), 32, "squash")
    assert found["words"] == ["person"]


def test_karpathy_json_has_objects_as_records_have_them(records, write, capsys):
    objects = [
        {"words": ["red", "dog"], "box": [0.1, 0.2, 0.5, 1]},
        {"words": ["cat"], "box": [0, 0, 0.3, 0.3], "score": 0.5},
    ]
    path = write(
        {
            "dataset": "own",
            "images": [{"filename": "a.jpg"}, {"filename": "b.jpg", "filepath": "folder", "objects": objects}],
        }
    )
    first, second = add_objects(records, path)
    assert first.objects == [] and second.objects == [objects[0] | {"score": 1.0}, objects[1]]


def test_images_of_an_hdf5_file_have_objects(tmp_path, records, write):
    with h5py.File(tmp_path / "images.hdf5", "w") as file:
        file["images"] = np.zeros((2, 3, 20, 40), np.uint8)
    row = replace(records[0], path=tmp_path / "images.hdf5", row=1)
    box = DOG | {"bbox": [10, 5, 10, 10]}
    assert add_objects([row], write([box]))[0].objects[0]["box"] == [0.25, 0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([DOG, {"image": "a.jpg"}], "no key 'category_id' after 1 objects, are these COCO's?"),
        (
            [{"category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}],
            "no key 'image_id' after 0 objects, are these COCO's?",
        ),
        ([DOG | {"bbox": [1, 2, 3]}], "unexpected format after 0 objects, are these COCO's?"),
        ([DOG | {"bbox": [1, 2, 3, float("nan")]}], "unexpected format after 0 objects"),
        ([DOG | {"bbox": [1, 2, 3, 10**400]}], "unexpected format after 0 objects"),
        ([DOG | {"score": "high"}], "unexpected format after 0 objects"),
        ([DOG | {"category": None, "category_id": 12}], "unknown category_id 12: give the names of categories"),
        ([DOG | {"category": None, "category_id": 0}], "unknown category_id 0"),
        ({"annotations": []}, "no key 'images'"),
        (COCO | {"categories": 1}, "unexpected format after 0 objects"),
        (COCO | {"images": [{"id": 3, "width": 0, "height": 5}]}, "unexpected format after 0 objects"),
        (["dog"], "unexpected format after 0 objects"),
        ("dog", "unexpected format after 0 objects"),
        (
            {"images": [{"filename": "b.jpg", "objects": [{"words": ["dog"], "box": [0, 1]}]}]},
            "unexpected format after 0",
        ),
        (
            {"images": [{"filename": "b.jpg", "objects": [{"words": [], "box": [0, 0, 1, 1]}]}]},
            "unexpected format after 0",
        ),
        ({"images": [{"objects": [{"words": ["dog"], "box": [0, 0, 1, 1]}]}]}, "no key 'id'"),
        (b"", "objects.json"),
        ('["\u00e9"]'.encode("utf-16"), "objects.json"),
        (b'[{"image": 1', "objects.json"),
    ],
)
def test_other_files_are_refused_in_one_line(records, write, content, message):
    path = write(content)
    if isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        add_objects(records, path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_captions_with_objects_of_their_own_take_no_others(records, write):
    own = [replace(records[0], objects=[{"words": ["cat"], "box": [0, 0, 1, 1]}]), records[1]]
    with pytest.raises(InputError, match="has objects of its own, leave --objects out"):
        add_objects(own, write([DOG]))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 5, 8, 9])
def test_the_size_of_a_photo_is_that_of_its_upright_pixels(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 20)).save(tmp_path / f"photo.{suffix}", exif=exif)
    assert photo_size(tmp_path / f"photo.{suffix}") == open_photo(tmp_path / f"photo.{suffix}").size


def test_a_missing_file_of_objects_is_named(tmp_path, command):
    (tmp_path / "captions.csv").write_text("file,caption,split\na.jpg,a dog,train\n")
    (tmp_path / "objects.json").touch()
    files = ("--captions", tmp_path / "captions.csv", "--images", tmp_path, "--objects", tmp_path / "object.json")
    status, _, err = command(create_input_files, "--dataset", "mine", *files)
    assert status == 2 and f"object.json: no such file, did you mean {tmp_path / 'objects.json'}?" in err


def test_a_prepared_folder_holds_the_objects(tmp_path, records, write, command):
    (tmp_path / "captions.csv").write_text("image,caption,split\na.jpg,a dog,train\nfolder/b.jpg,a cat,val\n")
    arguments = ["--dataset", "mine", "--captions", tmp_path / "captions.csv", "--images", tmp_path, "--image_size", 32]
    arguments += ["--resize", "pad", "--output_folder", tmp_path / "data", "--objects", write([DOG])]
    script = [sys.executable, create_input_files.__file__, *map(str, arguments)]  # it has opened no photo yet
    result = subprocess.run(script, capture_output=True, text=True)
    assert result.returncode == 0 and "1 objects in 1 photos" in result.stdout, result.stderr
    entry = json.loads((tmp_path / "data" / "train_captions.json").read_text())[0]
    assert entry["objects"] == [{"words": ["dog"], "box": [0.35, 0.2, 0.65, 0.3], "score": 0.5}]
    assert json.loads((tmp_path / "data" / "val_captions.json").read_text())[0]["objects"] == []
    write([DOG | {"score": 0.6}])
    status, _, err = command(create_input_files, *arguments)
    assert status == 2 and "was made with other settings" in err


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_boxes_are_clipped_whatever_the_resize_mode(resize):
    boxes = [[-0.5, 0.2, 0.5, 1.5], [1.3, 0.2, 1.5, 0.4], [0.3, 0.3, 0.3, 0.5], [0, 0, 1, 1]]
    placed = place_objects([{"words": ["dog"], "box": box} for box in boxes], (80, 80), 32, resize)
    assert [item["box"] for item in placed] == [[0, 0.2, 0.5, 1], [0, 0, 1, 1]]


def test_integer_edges_are_boxes_like_others():
    boxes = pad_boxes([[{"box": [0, 0, 1, 1]}], [{"box": [0.1, 0.2, 0.5, 0.6]}], []])
    assert boxes.tolist()[0] == [[0, 0, 1, 1]] and boxes[1, 0].tolist() == pytest.approx([0.1, 0.2, 0.5, 0.6])


def test_a_file_without_any_of_the_photos_is_refused(tmp_path, write, command):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.jpg")
    (tmp_path / "captions.csv").write_text("file,caption,split\na.jpg,a dog,train\n")
    for content in ([], [DOG | {"image": "other.jpg"}]):
        arguments = ("--captions", tmp_path / "captions.csv", "--images", tmp_path, "--output_folder", tmp_path / "out")
        status, _, err = command(create_input_files, "--dataset", "own", *arguments, "--objects", write(content))
        assert (
            status == 2
            and "has no objects for any of the 1 photos, such as a.jpg" in err
            and not (tmp_path / "out").exists()
        )
