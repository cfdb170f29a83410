"""JSON read element by element, against json.loads."""

import json
import tracemalloc

import pytest

from preparation import json_stream
from preparation.caption_formats import read_records
from preparation.json_stream import iter_json_list
from utils import InputError

ELEMENTS = [12, -1.5e-3, 1e300, True, None, "", 'a "quoted" \\ word\n', "犬 😀 é", [], {}]
ELEMENTS += [[[1, 2], {"a": []}], {"images": [3]}]
OBJECTS = (
    {"images": ELEMENTS},
    {"info": {"images": [1]}, "images": ELEMENTS, "dataset": "own", "licenses": [1, [2]]},
    {"licenses": [], "number": 12, "images": []},
)


@pytest.mark.parametrize("window", [1, 2, 5, 2**20])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_elements_are_those_of_the_whole_wherever_the_window_ends(tmp_path, monkeypatch, window, indent, ensure_ascii):
    monkeypatch.setattr(json_stream, "WINDOW", window)
    for content in OBJECTS:
        text = json.dumps(content, indent=indent, ensure_ascii=ensure_ascii)
        (tmp_path / "a.json").write_text(f"\ufeff {text}\n\n", encoding="utf-8")
        assert list(iter_json_list(tmp_path / "a.json", "images")) == content["images"]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ('{"images": [1, 2\n, 3', InputError, "Expecting ',' delimiter: line 2 column 4"),
        ('{"images": [1, 2,]}', InputError, "is not valid JSON"),
        ('{"images": [1 2]}', InputError, "Expecting ',' delimiter"),
        ('{"images": [1], }', InputError, "is not valid JSON"),
        ('{"images": [1]} {}', InputError, "Extra data"),
        ('{"images": [1], "other": [nothing]}', InputError, "Expecting value"),
        ('{"images": [1], 2: 3}', InputError, "is not valid JSON"),
        ('{"images" [1]}', InputError, "Expecting ':' delimiter"),
        ('{"images": [1}', InputError, "Expecting ',' delimiter"),
        ('{"images": ["\\ud800"]}', InputError, "surrogates not allowed"),
        ('{"images": [' + "[" * 100_000, InputError, "is not valid JSON"),
        ('{"images": [' + "9" * 5000 + "]}", InputError, "is not valid JSON"),
        ("", InputError, "is not valid JSON"),
        ("[1]", TypeError, None),
        ('{"images": 1}', TypeError, None),
        ("{}", KeyError, "images"),
        ('{"other": {"images": []}}', KeyError, "images"),
    ],
)
def test_what_is_wrong_is_an_error(tmp_path, text, error, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(error, match=message):
        list(iter_json_list(tmp_path / "a.json", "images"))


def write_karpathy(path, sentences):
    images = [
        {"filename": f"{index}.jpg", "split": "train", "sentences": sentences, "imgid": index} for index in range(2000)
    ]
    path.write_text(json.dumps({"images": images, "dataset": "own"}))


def write_coco(path, sentences):
    images = [{"id": index, "file_name": f"{index}.jpg", "url": "x" * 200} for index in range(2000)]
    annotations = [{"image_id": index % 2000, "caption": sentences[0]["raw"]} for index in range(10_000)]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))


@pytest.mark.parametrize("write", [write_karpathy, write_coco])
def test_captions_take_little_more_memory_than_their_text(tmp_path, monkeypatch, write):
    monkeypatch.setattr(json_stream, "WINDOW", 2**14)
    words = ["a", "brown", "dog", "is", "running", "on", "the", "wet", "sand", "of", "a", "beach"]
    write(tmp_path / "captions.json", [{"tokens": words, "raw": " ".join(words), "sentid": n} for n in range(5)])
    tracemalloc.start()
    records, _ = read_records([str(tmp_path / "captions.json")], "photos", "auto")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(records) == 2000 and [len(record.captions) for record in records] == [5] * 2000
    assert peak < 2 * (tmp_path / "captions.json").stat().st_size
