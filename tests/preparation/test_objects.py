"""Objects of photos: COCO's results and annotations, given to records as fractions of their photos."""

import json

import pytest
from PIL import Image

import create_input_files
from preparation.objects import add_objects, read_objects
from preparation.records import ImageRecord, pack_sentences
from utils import InputError

DOG = {"image": "a.jpg", "bbox": [10, 20, 30, 10], "category": "dog", "score": 0.5}


@pytest.fixture
def records(tmp_path):
    """Photos a.jpg of 100x50 pixels, turned upright 50x100, and folder/b.jpg of 80x40 with id 7."""
    (tmp_path / "folder").mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (100, 50)).save(tmp_path / "a.jpg", exif=turned)
    Image.new("RGB", (80, 40)).save(tmp_path / "folder" / "b.jpg")
    names = {"a.jpg": 3, "folder/b.jpg": 7}
    captions = pack_sentences(["a dog"])
    return [ImageRecord(tmp_path / name, name, image_id, "train", captions) for name, image_id in names.items()]


@pytest.fixture
def write(tmp_path):
    """Write JSON to a file and return its path."""

    def write(content):
        path = tmp_path / "objects.json"
        path.write_text(json.dumps(content))
        return path

    return write


def test_results_are_found_by_name_or_id(records, write, capsys):
    other = {"image_id": 7, "bbox": [0, 0, 80, 20], "category_id": 1, "score": 0.25}
    ball = {"file_name": "b.jpg", "bbox": [8, 4, 8.0, 4], "category": "sports ball", "score": 1}
    found = add_objects(records, write([DOG, other, DOG | {"score": 0.75, "category_id": 1}]))
    assert [record.objects for record in found] == [
        [
            {"words": ["dog"], "box": [0.2, 0.2, 0.8, 0.3], "score": score} for score in (0.75, 0.5)
        ],  # the photo is turned
        [{"words": ["person"], "box": [0, 0, 1, 0.5], "score": 0.25}],
    ]
    assert capsys.readouterr().out == "3 objects in 2 photos, 0 photos have none\n"
    found = add_objects(records, write([ball]))
    assert found[0].objects == []
    assert found[1].objects == [{"words": ["sports", "ball"], "box": [0.1, 0.1, 0.2, 0.2], "score": 1}]


def test_boxes_are_clipped_and_those_outside_left_out(records, write, capsys):
    boxes = [[-10, -10, 20, 30], [40, 90, 100, 100], [60, 0, 5, 5], [0, 0, 0, 5]]
    found = add_objects(records, write([DOG | {"bbox": box} for box in boxes]))
    assert [item["box"] for item in found[0].objects] == [[0, 0, 0.2, 0.2], [0.8, 0.9, 1, 1]]
    assert capsys.readouterr().out == (
        "2 objects in 1 photos, 1 photos have none\n2 objects lie outside of their photo and are left out\n"
    )


def test_annotations_have_true_boxes_and_sizes_of_their_own(records, write):
    content = {
        "images": [{"id": 3, "width": 200, "height": 100, "file_name": "a.jpg"}],
        "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}],
        "annotations": [
            {"image_id": 3, "category_id": 18, "bbox": [20, 10, 100, 50], "iscrowd": 0},
            {"image_id": 3, "category_id": 1, "bbox": [0, 0, 200, 100], "iscrowd": 1},
        ],
    }
    found = add_objects(records, write(content))
    assert [record.objects for record in found] == [[{"words": ["dog"], "box": [0.1, 0.1, 0.6, 0.6]}], []]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "holds no objects"),
        ([DOG, {"image": "a.jpg"}], "no key 'category_id' after 1 objects, are these COCO's?"),
        ([DOG | {"image": "other.jpg"}], "has no object of the 2 photos, such as a.jpg"),
        ([DOG | {"bbox": [1, 2, 3]}], "another form after 0 objects"),
        ([DOG | {"bbox": [1, 2, 3, float("nan")]}], "another form after 0 objects"),
        ([DOG | {"score": "high"}], "another form after 0 objects"),
        ([{"image_id": 3, "bbox": [0, 0, 1, 1], "category_id": 99, "score": 1}], "no key 99"),
        ({"annotations": []}, "no key 'categories'"),
        ({"categories": 1}, "another form after 0 objects"),
        (["dog"], "another form after 0 objects"),
    ],
)
def test_other_files_are_refused_in_one_line(records, write, content, message):
    with pytest.raises(InputError, match=r"^--objects .*objects\.json") as error:
        add_objects(records, write(content))
    assert message in str(error.value)


def test_a_missing_file_and_shapes_with_objects_are_refused(tmp_path, command):
    with pytest.raises(InputError, match="no such file"):
        read_objects(tmp_path / "none.json")
    status, _, err = command(create_input_files, "--objects", "none.json")
    assert status == 2 and "--dataset shapes reads no files" in err


def test_a_prepared_folder_holds_the_objects(tmp_path, records, write, command):
    (tmp_path / "captions.csv").write_text("image,caption,split\na.jpg,a dog,train\nfolder/b.jpg,a cat,val\n")
    arguments = ["--dataset", "mine", "--captions", tmp_path / "captions.csv", "--images", tmp_path, "--image_size", 32]
    arguments += ["--resize", "pad", "--output_folder", tmp_path / "data"]
    status, out, err = command(create_input_files, *arguments, "--objects", write([DOG]))
    assert status == 0 and "1 objects in 1 photos" in out, err
    entry = json.loads((tmp_path / "data" / "train_captions.json").read_text())[0]
    assert entry["objects"] == [{"words": ["dog"], "box": [0.35, 0.2, 0.65, 0.3], "score": 0.5}]
    assert json.loads((tmp_path / "data" / "val_captions.json").read_text())[0]["objects"] == []
    status, _, err = command(create_input_files, *arguments, "--objects", write([DOG | {"score": 0.6}]))
    assert status == 2 and "was made with other settings" in err
