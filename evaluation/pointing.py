"""Whether the attention falls on the object that a word names."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from text.nouns import nouns_of

MIN_SCORE = 0.3  # of a detected object; those less certain are often wrong


def attention_metrics(
    entries: Sequence[dict[str, Any]], captions: Sequence[list[str]], alphas: Sequence[Tensor]
) -> dict[str, float]:
    """Where the attention is at nouns that name objects, as means over these nouns.

    - "pointing", pointing accuracy: whether the region of maximum attention is inside the object (Zhang et al., 2016);
    - "correctness", attention correctness: the attention weight inside the object (Liu et al., 2017);
    - "entropy" of the attention in nats: log R where it is uniform over R regions, 0 where it is on one.

    A region is inside an object where its center is. Where several objects share the noun, the word before it selects
    among them; otherwise each of them counts. A noun that names no object of its image is a miss; but a detector
    misses objects, so where the objects have scores such a noun does not count. Without nouns all are 0.

    Args:
        entries: for each image a dictionary with its "objects", each of "words", a "box" in [0, 1] and, where it was
            detected, its "score", which must be 0.3 or more.
        captions: for each image a caption, a list of T words.
        alphas: for each image the attention weights (T, R) of its caption over a square grid.
    """
    measured = []
    for alpha, boxes in _named_objects(entries, captions, alphas):
        inside = _regions_inside(boxes, round(len(alpha) ** 0.5))
        entropy = torch.special.entr(alpha.float()).sum()
        measured.append((inside[alpha.argmax()].float(), alpha[inside].float().sum(), entropy))
    means = torch.tensor(measured).mean(dim=0).tolist() if measured else [0.0, 0.0, 0.0]
    return dict(zip(("pointing", "correctness", "entropy"), means, strict=True))


def _named_objects(
    entries: Sequence[dict[str, Any]], captions: Sequence[list[str]], alphas: Sequence[Tensor]
) -> Iterator[tuple[Tensor, list[list[float]]]]:
    """Yield the attention weights (R,) at each noun of an object, with the boxes of the objects that it names."""
    certain = [[item for item in entry["objects"] if item.get("score", 1.0) >= MIN_SCORE] for entry in entries]
    nouns = {" ".join(item["words"]): nouns_of(item["words"]) for objects in certain for item in objects}
    known = set().union(*nouns.values())
    are_detected = any("score" in item for objects in certain for item in objects)
    for objects, words, alpha in zip(certain, captions, alphas, strict=True):
        for t, word in enumerate(words):
            candidates = [item for item in objects if word in nouns[" ".join(item["words"])]]
            if candidates or (word in known and not are_detected):
                exact = [item for item in candidates if t and item["words"][-2:-1] == [words[t - 1]]]
                yield alpha[t], [item["box"] for item in exact or candidates]


def _regions_inside(boxes: list[list[float]], side: int) -> Tensor:
    """Which regions of a grid of side x side have their center in one of the boxes, (R,)."""
    centers = (torch.arange(side) + 0.5) / side
    inside = torch.zeros(side, side, dtype=torch.bool)
    for left, top, right, bottom in boxes:
        rows, columns = (top <= centers) & (centers <= bottom), (left <= centers) & (centers <= right)
        inside |= rows.unsqueeze(1) & columns
    return inside.flatten()
