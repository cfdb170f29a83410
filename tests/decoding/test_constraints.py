"""The mask of the constraints against loops over captions and words."""

import math

import pytest
import torch

from decoding.constraints import Constraints
from text.vocabulary import END, PAD

V = 7
WORDS = (4, 5, 6)


def is_banned(constraints, caption, word, is_last):
    """Whether a word may not follow a caption, a list of word ids."""
    n, longer = constraints.no_repeat_ngram, [*caption, word]
    earlier = [longer[i : i + n] for i in range(len(caption) - n + 1)]
    repeats = bool(n) and len(longer) >= n and word in WORDS and longer[-n:] in earlier
    too_short = word == END and len(caption) < constraints.min_length
    ends_badly = word == END and bool(caption) and caption[-1] in constraints.banned_endings
    return repeats or too_short or ends_badly or (is_last and word in constraints.banned_endings)


@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("t", range(7))
@pytest.mark.parametrize(
    "constraints",
    [
        Constraints(1),
        Constraints(2),
        Constraints(3),
        Constraints(0, 3),
        Constraints(0, 0, (5, 4)),
        Constraints(2, 4, (6,)),
    ],
    ids=str,
)
def test_the_mask_bans_what_the_constraints_say(constraints, t, is_last):
    torch.manual_seed(0)
    captions = torch.randint(4, V, (5, 3, t))
    log_probs = torch.randn(5, 3, V)
    masked = constraints.mask(log_probs.clone(), captions, is_last)
    for b in range(5):
        for c in range(3):
            for word in (END, *WORDS):
                banned = is_banned(constraints, captions[b, c].tolist(), word, is_last)
                expected = -math.inf if banned else log_probs[b, c, word].item()
                assert masked[b, c, word].item() == expected, (captions[b, c], word)


def test_without_constraints_nothing_is_computed():
    log_probs, captions = torch.randn(2, 3, V), torch.full((2, 3, 4), 5)
    with torch.profiler.profile() as profile:
        masked = Constraints().mask(log_probs, captions, is_last=True)
    assert masked is log_probs and not [event for event in profile.events() if event.name.startswith("aten::")]


def test_only_words_are_banned():
    log_probs = Constraints(2).mask(torch.zeros(1, 1, V), torch.tensor([[[4, 5, 4]]]), is_last=False)
    assert (log_probs[0, 0] == -math.inf).nonzero().flatten().tolist() == [PAD, 5]
