"""Beam search, with constraints and diverse groups, against exhaustive search and a search written with lists."""

import itertools
import math

import pytest
import torch

from conftest import beams, ending_at_different_words, step_by_step
from decoding.beam_search import beam_search
from decoding.constraints import Constraints
from decoding.settings import DecodingSettings
from text.vocabulary import BANNED_IDS, END, START
from utils import InputError

ALLOWED_IDS = (END, 4, 5, 6)


def exhaustive_best(decoder, regions, max_length, length_penalty, constraints=None):
    """The best caption of 1 to max_length words, unfinished ones of max_length included, the empty one excluded."""
    constraints = constraints or Constraints()
    candidates = []
    for length in range(1, max_length + 1):
        for caption in itertools.product(ALLOWED_IDS, repeat=length):
            if caption != (END,) and END not in caption[:-1] and (caption[-1] == END or length == max_length):
                if not obeys(constraints, caption, max_length):
                    continue
                log_prob, _ = step_by_step(decoder, regions, caption)
                candidates.append((log_prob / length**length_penalty, log_prob, caption))
    return max(candidates)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize(
    "constraints",
    [None, Constraints(1), Constraints(2), Constraints(0, 2), Constraints(0, 0, (4, 5)), Constraints(2, 2, (6,))],
)
def test_a_wide_beam_equals_exhaustive_search(tiny_decoder, length_penalty, constraints):
    regions = torch.rand(1, 4, 6, generator=torch.Generator().manual_seed(0))
    _, log_prob, caption = exhaustive_best(tiny_decoder, regions, 4, length_penalty, constraints)
    settings = beams(4**4, 4, length_penalty=length_penalty)
    captions, log_probs = beam_search(tiny_decoder, regions, settings, constraints=constraints)
    assert tuple(captions[0, 0].tolist()) == (*caption, *[END] * 4)[: captions.shape[2]]
    assert log_probs[0, 0].item() == pytest.approx(log_prob, abs=1e-4)


def obeys(constraints, caption, max_length):
    """Whether a caption, a tuple of word ids that may have ended, has broken none of the constraints so far."""
    words = caption[:-1] if caption[-1] == END else caption
    n = constraints.no_repeat_ngram
    ngrams = [words[i : i + n] for i in range(len(words) - n + 1)] if n else []
    is_whole = caption[-1] == END or len(caption) == max_length
    too_short = caption[-1] == END and len(words) < constraints.min_length
    return (
        len(set(ngrams)) == len(ngrams) and not too_short and not (is_whole and words[-1] in constraints.banned_endings)
    )


def reference_search(decoder, regions, settings, constraints):
    """Beam search over one image with lists: (log-probability, caption) of the captions kept, best first."""
    keys = decoder.keys(regions)
    groups = [[(0.0, (), decoder.init_state(regions))] for _ in range(settings.num_beam_groups)]

    def score(log_prob, caption):
        return log_prob / len(caption) ** settings.length_penalty

    for t in range(settings.max_length):
        counts = dict.fromkeys(ALLOWED_IDS, 0)  # of the words that earlier groups chose at this step
        for g, group in enumerate(groups):
            candidates = []
            for log_prob, caption, state in group:
                if caption[-1:] == (END,):
                    candidates.append((score(log_prob, caption), log_prob, caption, state))
                    continue
                words = torch.tensor([[caption[-1] if caption else START]])
                logits, new_state, *_ = decoder.step(words, regions, keys, state)
                log_probs = logits[0, 0].log_softmax(0).tolist()
                for word in ALLOWED_IDS if t else ALLOWED_IDS[1:]:
                    longer = (*caption, word)
                    if obeys(constraints, longer, settings.max_length):
                        total = log_prob + log_probs[word]
                        objective = score(total - settings.diversity_penalty * counts[word], longer)
                        candidates.append((objective, total, longer, new_state))
            if not candidates:  # the captions stay unfinished
                candidates = [(score(p, (*c, END)), p, (*c, END), state) for p, c, state in group]
            candidates.sort(key=lambda candidate: candidate[0], reverse=True)
            groups[g] = [candidate[1:] for candidate in candidates[: settings.beam_size // settings.num_beam_groups]]
            for _, caption, _ in groups[g]:
                counts[caption[-1]] += len(caption) == t + 1
    kept = [(log_prob, caption) for group in groups for log_prob, caption, _ in group]
    return sorted(kept, key=lambda beam: score(*beam), reverse=True)


def assert_equals_reference(decoder, regions, settings, constraints=None):
    """Check all captions and log-probabilities of a search against `reference_search`; returns the captions."""
    captions, log_probs = beam_search(decoder, regions, settings, constraints=constraints)
    T = captions.shape[2]
    assert captions.shape[:2] == log_probs.shape == (len(regions), settings.beam_size) and settings.max_length >= T
    for b in range(len(regions)):
        expected = reference_search(decoder, regions[b : b + 1], settings, constraints or Constraints())
        for k, (log_prob, caption) in enumerate(expected):
            assert log_probs[b, k].item() == pytest.approx(log_prob, abs=1e-4)
            assert tuple(captions[b, k].tolist()) == (*caption, *[END] * T)[:T]
        assert (log_probs[b, len(expected) :] == -math.inf).all()
    return captions


@pytest.mark.usefixtures("checks")
@pytest.mark.parametrize(
    ("beam_size", "max_length"), [(1, 1), (1, 30), (2, 4), (2, 30), (3, 9), (3, 30), (20, 1), (20, 4)]
)
def test_all_captions_kept_are_those_of_a_simple_search(tiny_decoder, beam_size, max_length):
    regions = ending_at_different_words(tiny_decoder)
    captions = assert_equals_reference(tiny_decoder, regions, beams(beam_size, max_length))
    lengths = (captions != END).sum(-1).amax(1)
    assert max_length < 9 or len(lengths.unique()) > 2  # images were dropped along the way


@pytest.mark.parametrize(
    "constraints",
    [
        Constraints(no_repeat_ngram=1),
        Constraints(no_repeat_ngram=2),
        Constraints(no_repeat_ngram=3, min_length=4),
        Constraints(min_length=3),
        Constraints(banned_endings=(4, 6)),
        Constraints(no_repeat_ngram=2, min_length=2, banned_endings=(5,)),
        Constraints(no_repeat_ngram=1, min_length=5),  # no caption can end
    ],
)
@pytest.mark.parametrize(("beam_size", "max_length"), [(1, 6), (3, 12), (4, 3)])
def test_captions_obey_constraints(tiny_decoder, constraints, beam_size, max_length):
    regions = ending_at_different_words(tiny_decoder)[:4]
    settings = beams(beam_size, max_length)
    captions = assert_equals_reference(tiny_decoder, regions, settings, constraints)
    for caption in captions[:, 0].tolist():
        words = [word for word in caption if word != END]
        assert words and obeys(Constraints(constraints.no_repeat_ngram), (*words, END), max_length)


@pytest.mark.parametrize(("beam_size", "groups"), [(2, 2), (4, 2), (6, 3), (12, 2)])
@pytest.mark.parametrize("diversity", [0.0, 0.7, 20.0])
def test_diverse_groups_are_those_of_a_simple_search(tiny_decoder, beam_size, groups, diversity):
    regions = ending_at_different_words(tiny_decoder)[:4]
    settings = beams(beam_size, 9, num_beam_groups=groups, diversity_penalty=diversity)
    captions = assert_equals_reference(tiny_decoder, regions, settings)
    assert_equals_reference(tiny_decoder, regions, settings, Constraints(2, 3, (4,)))
    if diversity == 20 and beam_size == groups == 2:
        assert (captions[:, 0, 0] != captions[:, 1, 0]).all()


def test_groups_must_share_the_beams():
    for groups, message in (
        (0, "must be at least 1"),
        (2, "does not divide the beam size 5"),
        (6, "does not divide the beam size 5"),
    ):
        with pytest.raises(InputError, match=f"--num_beam_groups {groups}: {message}"):
            DecodingSettings(beam_size=5, num_beam_groups=groups)


def test_a_search_on_a_cpu_is_as_long_as_its_longest_caption(tiny_decoder):
    regions = ending_at_different_words(tiny_decoder)
    ends = (beam_search(tiny_decoder, regions, beams(2, 30))[0][..., -1] == END).all(dim=1)
    captions, _ = beam_search(tiny_decoder, regions[ends], beams(2, 30))
    assert 4 < captions.shape[2] < 30 and (captions[..., -2] != END).any() and (captions[..., -1] == END).all()


@pytest.mark.parametrize("max_length", [1, 5])
def test_banned_words_never_appear_and_a_caption_need_not_end(tiny_decoder, max_length):
    tiny_decoder.output.bias.data[:4] = torch.tensor([50.0, 50.0, -50.0, 50.0])  # <pad>, <start>, <end>, <unk>
    captions, log_probs = beam_search(tiny_decoder, torch.rand(2, 4, 6), beams(5, max_length))
    assert captions.shape[2] == max_length
    assert set(captions[:, 0].flatten().tolist()) <= {4, 5, 6}
    assert log_probs[:, 0].isfinite().all()


@pytest.mark.parametrize("length_penalty", [1e30, float("inf")])
def test_a_length_penalty_beyond_all_measure_still_finds_a_caption(tiny_decoder, length_penalty):
    captions, log_probs = beam_search(tiny_decoder, torch.randn(2, 3, 6), beams(5, 8, length_penalty=length_penalty))
    assert not (captions[:, 0, :1] == END).any() and not torch.isin(captions[:, 0], torch.tensor(BANNED_IDS)).any()
    assert log_probs[:, 0].isfinite().all()
