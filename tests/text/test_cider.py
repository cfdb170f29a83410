"""CIDEr-D against pycocoevalcap's CIDEr, which is CIDEr-D."""

import random

import pytest
from pycocoevalcap.cider.cider import Cider

from text.cider import CiderD


def test_cider_is_pycocoevalcaps():
    generator = random.Random(0)
    references = [[generator.choices("abcdefg", k=generator.randint(1, 9)) for _ in range(3)] for _ in range(20)]
    candidates = [generator.choices("abcdefgh", k=generator.randint(1, 12)) for _ in references]
    truth = {i: [" ".join(words) for words in one_image] for i, one_image in enumerate(references)}
    found = {i: [" ".join(words)] for i, words in enumerate(candidates)}
    expected = Cider().compute_score(truth, found)[1]
    cider = CiderD(references)
    own = [cider(one_image, [words])[0] for one_image, words in zip(references, candidates, strict=True)]
    assert own == pytest.approx(list(expected)) and max(own) > 0.1
    assert cider(references[0], candidates[:2])[0] == own[0]


def test_a_caption_without_words_scores_nothing():
    assert CiderD([[[4, 5]], [[6]]])([[4, 5]], [[], [4, 5], [7]]) == pytest.approx([0, 5, 0])


def test_pairs_average_to_the_score_of_all_references():
    cider = CiderD([[[4, 5, 6], [4, 6]], [[7, 8, 4]], [[9]]])
    pairs = cider.pairwise([[4, 5], [7, 8], []], [[4, 5, 6], [7, 8, 4]])
    assert pairs.shape == (3, 2) and pairs[0, 1] > 0  # 4 is in both
    assert cider([[4, 5, 6], [7, 8, 4]], [[4, 5], [7, 8], []]) == pytest.approx(pairs.mean(axis=1))
    assert [cider([reference], [[4, 5]])[0] for reference in ([4, 5, 6], [7, 8, 4])] == pytest.approx(pairs[0])
