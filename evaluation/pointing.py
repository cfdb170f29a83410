"""Pointing accuracy: whether the attention falls on the object that a word names."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def pointing_accuracy(
    entries: Sequence[dict[str, Any]], captions: Sequence[list[str]], alphas: Sequence[Tensor]
) -> float:
    """Share of object nouns at which the region of maximum attention is inside the object (Zhang et al., 2016).

    Where several objects share the noun, the word before it selects among them. A noun that names no object of its
    image is a miss.

    Args:
        entries: for each image a dictionary with its "objects", each of "words" and a "box" in [0, 1].
        captions: for each image a caption, a list of T words.
        alphas: for each image the attention weights (T, R) of its caption over a square grid.
    """
    nouns = {item["words"][-1] for entry in entries for item in entry["objects"]}
    hits = total = 0
    for entry, words, alpha in zip(entries, captions, alphas, strict=True):
        side = round(alpha.shape[1] ** 0.5)
        for t, word in enumerate(words):
            if word in nouns:
                candidates = [item for item in entry["objects"] if item["words"][-1] == word]
                exact = [item for item in candidates if t and item["words"][-2:-1] == [words[t - 1]]]
                row, column = divmod(int(alpha[t].argmax()), side)
                x, y = (column + 0.5) / side, (row + 0.5) / side
                boxes = [item["box"] for item in exact or candidates]
                hits += any(left <= x <= right and top <= y <= bottom for left, top, right, bottom in boxes)
                total += 1
    return hits / total if total else 0.0
