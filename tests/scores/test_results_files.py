"""Captions in COCO's results format, and their errors."""

import json

import pytest

from scores.results_files import read_results
from utils import InputError

ENTRIES = [{"image": f"{i}.jpg", "image_id": 10 + i} for i in range(6)]
RESULTS = [{"image_id": 10 + i, "image": f"{i}.jpg", "caption": f"caption {i}"} for i in range(6)]


@pytest.mark.parametrize("keys", [("image_id", "image"), ("image_id",), ("image",)])
def test_captions_come_in_the_order_of_the_split(tmp_path, keys):
    path = tmp_path / "results.json"
    shown = [{key: item[key] for key in (*keys, "caption")} for item in reversed(RESULTS)]
    path.write_text(json.dumps(shown))
    assert read_results(path, ENTRIES, "the val split") == [f"caption {i}" for i in range(6)]


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"image_id": 10}, "is not in COCO's results format"),
        ([{"caption": "of no image"}], "is not in COCO's results format"),
        ([{"image_id": 10, "caption": None}], "is not in COCO's results format"),
        ([{"image_id": [10], "caption": "a"}], "is not in COCO's results format"),
        ([{"image": 3, "caption": "a"}], "is not in COCO's results format"),
        (RESULTS[:2], "lacks images of the val split: 2.jpg, 3.jpg, 4.jpg and 1 more. Each image needs a caption"),
        ([], "lacks images of the val split: 0.jpg, 1.jpg, 2.jpg and 3 more."),
        ([*RESULTS, RESULTS[3]], "has several captions of an image: 3.jpg. Keep one of each"),
        ([*RESULTS, {"image": "x.jpg", "caption": "a"}], "has images that the val split does not have: x.jpg."),
        ([*RESULTS, {"image_id": 3, "caption": "a"}], "has images that the val split does not have: 3."),
        ([{"image_id": 10, "image": "1.jpg", "caption": "a"}], "has images that the val split does not have: 1.jpg."),
    ],
)
def test_wrong_results_are_named(tmp_path, results, message):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    with pytest.raises(InputError) as error:
        read_results(path, ENTRIES, "the val split")
    assert str(error.value).startswith(str(path)) and message in str(error.value)
