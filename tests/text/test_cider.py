"""CIDEr-D against pycocoevalcap's CIDEr, which is CIDEr-D."""

import random
import tracemalloc

import numpy as np
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


def test_one_long_caption_takes_no_memory_for_the_others():
    captions = [[["a"]]] * 2000 + [[["b"] * 2000]]  # a matrix of them would have 4,000,000 elements
    tracemalloc.start()
    cider = CiderD(captions)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6
    assert cider([["a"]], [["a"]])[0] == pytest.approx(10 / 4)  # its only n-grams are of one word


def test_images_without_captions_count_as_images():
    first, last = CiderD([[], [["a", "b"]], [["b", "c"]]]), CiderD([[["a", "b"]], [["b", "c"]], []])
    assert first.log_images == last.log_images == np.log(3)
    arguments = [["a", "b"]], [["b", "a"], ["b"], ["c"]]
    assert first(*arguments) == last(*arguments)


@pytest.mark.parametrize("captions", [[], [[]], [[[]], []]])
def test_a_corpus_without_words_is_an_error(captions):
    with pytest.raises(ValueError, match="no caption has a word"):
        CiderD(captions)
