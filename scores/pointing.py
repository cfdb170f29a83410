"""Pointing: does the attention fall on the object that a word names?"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from modules.regions import are_inside
from preparation.storage import MIN_SCORE
from text.nouns import nouns_of


def attention_metrics(
    objects: Iterable[list[dict[str, Any]]],
    captions: Sequence[list[str]],
    alphas: Sequence[Tensor],
    regions: Sequence[Tensor],
) -> dict[str, float]:
    """Measure where the attention is at nouns that name objects, as means over these nouns.

    - "pointing", pointing accuracy: the region of maximum attention is inside the object (Zhang et al., 2016);
    - "correctness", attention correctness: the attention weight inside the object (Liu et al., 2017);
    - "entropy" of the attention in nats: log R if it is uniform over R regions, 0 if it is on one.

    A region is inside an object if its center is; the whole image is inside nothing. If several objects share the noun,
    the word before it selects among them; otherwise each of them counts. A noun that names no object of its image is a
    miss. But a detector overlooks objects: if the objects have scores, such a noun does not count. Without nouns all
    three are 0.

    Args:
        objects: for each image its objects, each with "words", a "box" in [0, 1] and, if it was detected, a "score";
            those below 0.3 are left out.
        captions: for each image a caption, a list of T words.
        alphas: for each image the attention weights (T, R) of its caption.
        regions: for each image the boxes (R, 4) of its regions, with edges in [0, 1].
    """
    measured = []
    for i, alpha, boxes in _named_objects(objects, captions, alphas):
        inside = are_inside(regions[i].unsqueeze(0), torch.tensor(boxes).view(1, -1, 4))[0].any(dim=1)
        entropy = torch.special.entr(alpha.float()).sum()
        measured.append((inside[alpha.argmax()].float(), alpha[inside].float().sum(), entropy))
    means = torch.tensor(measured).mean(dim=0).tolist() if measured else [0.0, 0.0, 0.0]
    return dict(zip(("pointing", "correctness", "entropy"), means, strict=True))


def _named_objects(
    objects: Iterable[list[dict[str, Any]]], captions: Sequence[list[str]], alphas: Sequence[Tensor]
) -> Iterator[tuple[int, Tensor, list[list[float]]]]:
    """Yield for each noun of an object the image's index, the attention weights (R,), and the boxes of the objects."""
    certain = [[item for item in each if item.get("score", 1.0) >= MIN_SCORE] for each in objects]
    nouns = {" ".join(item["words"]): nouns_of(item["words"]) for each in certain for item in each}
    known = set().union(*nouns.values())
    are_detected = any("score" in item for each in certain for item in each)
    for i, (of_image, words, alpha) in enumerate(zip(certain, captions, alphas, strict=True)):
        for t, word in enumerate(words):
            candidates = [item for item in of_image if word in nouns[" ".join(item["words"])]]
            if candidates or (word in known and not are_detected):
                exact = [item for item in candidates if t and item["words"][-2:-1] == [words[t - 1]]]
                yield i, alpha[t], [item["box"] for item in exact or candidates]
