"""The diversity of a set of captions: their n-grams, words and lengths, and how many copy a training caption."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preparation.storage import PackedObjects, iter_captions


def training_captions(data_folder: str | Path, metadata: dict[str, Any]) -> set[str] | None:
    """Read the captions of a prepared folder's training split, words joined by spaces; None if that split is empty."""
    if not metadata["splits"]["train"]["images"]:
        return None
    images = iter_captions(Path(data_folder) / "train_captions.json", [], PackedObjects())
    return {" ".join(words) for captions in images for words in captions}


def diversity(captions: Sequence[list[str]], training: set[str] | None) -> dict[str, float]:
    """Measure the diversity of captions, each a list of words.

    - "distinct_1" and "distinct_2": distinct n-grams over all n-grams (Li et al., 2016), 0 if there are none;
    - "vocabulary": number of distinct words;
    - "mean_length", in words;
    - "in_training": share of captions that occur word for word in `training`; left out if that is None.
    """
    words = [word for caption in captions for word in caption]
    pairs = [pair for caption in captions for pair in itertools.pairwise(caption)]
    found: dict[str, float] = {
        "distinct_1": len(set(words)) / max(len(words), 1),
        "distinct_2": len(set(pairs)) / max(len(pairs), 1),
        "vocabulary": len(set(words)),
        "mean_length": len(words) / len(captions),
    }
    if training is not None:
        found["in_training"] = sum(" ".join(caption) in training for caption in captions) / len(captions)
    return found
