"""The reward against pycocoevalcap's CIDEr, which is CIDEr-D."""

import random

import pytest
from pycocoevalcap.cider.cider import Cider

from training.rewards import CiderReward


def test_the_reward_is_pycocoevalcaps():
    generator = random.Random(0)
    references = [[generator.choices("abcdefg", k=generator.randint(1, 9)) for _ in range(3)] for _ in range(20)]
    candidates = [generator.choices("abcdefgh", k=generator.randint(1, 12)) for _ in references]
    truth = {i: [" ".join(words) for words in one_image] for i, one_image in enumerate(references)}
    found = {i: [" ".join(words)] for i, words in enumerate(candidates)}
    expected = Cider().compute_score(truth, found)[1]
    reward = CiderReward(references)
    own = [reward(one_image, [words])[0] for one_image, words in zip(references, candidates, strict=True)]
    assert own == pytest.approx(list(expected)) and max(own) > 0.1
    assert reward(references[0], candidates[:2])[0] == own[0]


def test_a_caption_without_words_earns_nothing():
    assert CiderReward([[[4, 5]], [[6]]])([[4, 5]], [[], [4, 5], [7]]) == pytest.approx([0, 5, 0])
