"""Diversity by hand."""

import json

from scores.diversity import diversity, training_captions


def test_diversity_by_hand():
    captions = [["a", "dog", "runs"], ["a", "dog"], ["a"], []]
    assert diversity(captions, {"a dog", "a cat"}) == {
        "distinct_1": 3 / 6,
        "distinct_2": 2 / 3,
        "vocabulary": 3,
        "mean_length": 6 / 4,
        "in_training": 1 / 4,
    }


def test_without_a_training_split_there_are_no_copies():
    assert diversity([["a"]], None) == {"distinct_1": 1, "distinct_2": 0, "vocabulary": 1, "mean_length": 1}
    assert training_captions("nowhere", {"splits": {"train": {"images": 0}}}) is None


def test_training_captions_of_a_prepared_folder(shapes):
    metadata = json.loads((shapes / "dataset.json").read_text())
    entries = json.loads((shapes / "train_captions.json").read_text())
    expected = {" ".join(caption["words"]) for entry in entries for caption in entry["captions"]}
    assert training_captions(shapes, metadata) == expected
