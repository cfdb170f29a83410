"""Pointing accuracy: whether the attention falls on the object that a word names."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from text.nouns import nouns_of

MIN_SCORE = 0.3  # of a detected object; those less certain are often wrong


def pointing_accuracy(
    entries: Sequence[dict[str, Any]], captions: Sequence[list[str]], alphas: Sequence[Tensor]
) -> float:
    """Share of object nouns at which the region of maximum attention is inside the object (Zhang et al., 2016).

    Where several objects share the noun, the word before it selects among them. A noun that names no object of its
    image is a miss; but a detector misses objects, so where the objects have scores such a noun does not count.

    Args:
        entries: for each image a dictionary with its "objects", each of "words", a "box" in [0, 1] and, where it was
            detected, its "score", which must be 0.3 or more.
        captions: for each image a caption, a list of T words.
        alphas: for each image the attention weights (T, R) of its caption over a square grid.
    """
    certain = [[item for item in entry["objects"] if item.get("score", 1.0) >= MIN_SCORE] for entry in entries]
    nouns = {" ".join(item["words"]): nouns_of(item["words"]) for objects in certain for item in objects}
    known = set().union(*nouns.values())
    are_detected = any("score" in item for objects in certain for item in objects)
    hits = total = 0
    for objects, words, alpha in zip(certain, captions, alphas, strict=True):
        side = round(alpha.shape[1] ** 0.5)
        for t, word in enumerate(words):
            candidates = [item for item in objects if word in known and word in nouns[" ".join(item["words"])]]
            if candidates or (word in known and not are_detected):
                exact = [item for item in candidates if t and item["words"][-2:-1] == [words[t - 1]]]
                row, column = divmod(int(alpha[t].argmax()), side)
                x, y = (column + 0.5) / side, (row + 0.5) / side
                boxes = [item["box"] for item in exact or candidates]
                hits += any(left <= x <= right and top <= y <= bottom for left, top, right, bottom in boxes)
                total += 1
    return hits / total if total else 0.0
