"""Beam search against exhaustive search, greedy decoding and teacher forcing; sampling against the softmax."""

import itertools
import math

import pytest
import torch

from conftest import step_by_step
from modules import beam_search as beam_search_module
from modules.beam_search import beam_search, force_decode, sample
from text.vocabulary import BANNED_IDS, END, START

ALLOWED_IDS = (END, 4, 5, 6)


def exhaustive_best(decoder, regions, max_length, length_penalty):
    """The best caption of 1 to max_length words, unfinished ones of max_length included, the empty one excluded."""
    candidates = []
    for length in range(1, max_length + 1):
        for caption in itertools.product(ALLOWED_IDS, repeat=length):
            if caption != (END,) and END not in caption[:-1] and (caption[-1] == END or length == max_length):
                log_prob, _ = step_by_step(decoder, regions, caption)
                candidates.append((log_prob / length**length_penalty, log_prob, caption))
    return max(candidates)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_wide_beam_equals_exhaustive_search(tiny_decoder, length_penalty, seed):
    regions = torch.rand(1, 4, 6, generator=torch.Generator().manual_seed(seed))
    _, log_prob, caption = exhaustive_best(tiny_decoder, regions, 4, length_penalty)
    captions, log_probs = beam_search(tiny_decoder, regions, SearchSettings(4**4, 4, length_penalty))
    assert tuple(captions[0, 0].tolist())[: len(caption)] == caption
    assert log_probs[0, 0].item() == pytest.approx(log_prob, abs=1e-4)


@pytest.mark.parametrize("beam_size", [1, 3, 5, 50])
def test_batched_search_equals_one_image_at_a_time(tiny_decoder, beam_size):
    regions = torch.randn(6, 4, 6, generator=torch.Generator().manual_seed(1)) * 2
    captions, log_probs = beam_search(tiny_decoder, regions, SearchSettings(beam_size, 8))
    assert len({tuple(caption) for caption in captions[:, 0].tolist()}) > 1
    for b in range(6):
        alone, alone_log_probs = beam_search(tiny_decoder, regions[b : b + 1], SearchSettings(beam_size, 8))
        assert captions[b, 0, : alone.shape[2]].tolist() == alone[0, 0].tolist()
        assert log_probs[b, 0].item() == pytest.approx(alone_log_probs[0, 0].item(), abs=1e-4)


def reference_search(decoder, regions, beam_size, max_length, length_penalty=0.5):
    """Beam search over one image with lists: (log-probability, caption) of the captions kept, best first."""
    keys = decoder.keys(regions)
    beams = [(0.0, (), decoder.init_state(regions))]
    for t in range(max_length):
        candidates = []
        for log_prob, caption, state in beams:
            if caption[-1:] == (END,):
                candidates.append((log_prob, caption, state))
                continue
            words = torch.tensor([[caption[-1] if caption else START]])
            logits, _, new_state = decoder.step(words, regions, keys, state)
            log_probs = logits[0, 0].log_softmax(0).tolist()
            allowed = ALLOWED_IDS if t else ALLOWED_IDS[1:]
            candidates += [(log_prob + log_probs[word], (*caption, word), new_state) for word in allowed]
        candidates.sort(key=lambda beam: beam[0] / len(beam[1]) ** length_penalty, reverse=True)
        beams = candidates[:beam_size]
    return [(log_prob, caption) for log_prob, caption, _ in beams]


@pytest.fixture(params=["every word", "every 4 words"])
def checks(request, monkeypatch):
    """How often a loop asks which images have ended: as on a CPU, and as on a GPU."""
    if request.param == "every 4 words":
        monkeypatch.setattr(beam_search_module, "_checks_after", lambda t, device: t % 4 == 0)


def ending_at_different_words(decoder):
    """Regions of 12 images whose captions end after 3 to 15 words or not at all; the decoder ends them earlier."""
    decoder.output.bias.data[END] += 1
    return torch.randn(12, 4, 6, generator=torch.Generator().manual_seed(1)) * 3


@pytest.mark.usefixtures("checks")
@pytest.mark.parametrize(
    ("beam_size", "max_length"), [(1, 1), (1, 30), (2, 4), (2, 30), (3, 9), (3, 30), (20, 1), (20, 4)]
)
def test_all_captions_kept_are_those_of_a_simple_search(tiny_decoder, beam_size, max_length):
    regions = ending_at_different_words(tiny_decoder)
    captions, log_probs = beam_search(tiny_decoder, regions, SearchSettings(beam_size, max_length))
    assert captions.shape == (12, beam_size, captions.shape[2]) and captions.shape[2] <= max_length
    lengths = set()
    for b in range(12):
        expected = reference_search(tiny_decoder, regions[b : b + 1], beam_size, max_length)
        for k, (log_prob, caption) in enumerate(expected):
            assert log_probs[b, k].item() == pytest.approx(log_prob, abs=1e-4)
            assert tuple(captions[b, k].tolist()) == (*caption, *[END] * (captions.shape[2] - len(caption)))
        assert (log_probs[b, len(expected) :] == -math.inf).all()
        lengths.add(max(len(caption) for _, caption in expected))
    assert max_length < 9 or len(lengths) > 2  # images were dropped along the way


def test_a_search_on_a_cpu_is_as_long_as_its_longest_caption(tiny_decoder):
    regions = ending_at_different_words(tiny_decoder)
    ends = (beam_search(tiny_decoder, regions, SearchSettings(2, 30))[0][..., -1] == END).all(dim=1)
    captions, _ = beam_search(tiny_decoder, regions[ends], SearchSettings(2, 30))
    assert 4 < captions.shape[2] < 30 and (captions[..., -2] != END).any() and (captions[..., -1] == END).all()
    assert sample(tiny_decoder, regions, 3, 3).shape == (12, 3, 3)


def test_a_beam_of_one_is_greedy(tiny_decoder):
    regions = torch.rand(1, 4, 6)
    keys, state = tiny_decoder.keys(regions), tiny_decoder.init_state(regions)
    greedy, word = [], START
    while len(greedy) < 8 and word != END:
        logits, _, state = tiny_decoder.step(torch.tensor([[word]]), regions, keys, state)
        word = max(ALLOWED_IDS if greedy else ALLOWED_IDS[1:], key=lambda word_id: logits[0, 0, word_id].item())
        greedy.append(word)
    assert beam_search(tiny_decoder, regions, SearchSettings(1, 8))[0][0, 0].tolist() == greedy


@pytest.mark.parametrize("max_length", [1, 5])
def test_banned_words_never_appear_and_a_caption_need_not_end(tiny_decoder, max_length):
    tiny_decoder.output.bias.data[:4] = torch.tensor([50.0, 50.0, -50.0, 50.0])  # <pad>, <start>, <end>, <unk>
    captions, log_probs = beam_search(tiny_decoder, torch.rand(2, 4, 6), SearchSettings(5, max_length))
    assert captions.shape[2] == max_length
    assert set(captions[:, 0].flatten().tolist()) <= {4, 5, 6}
    assert log_probs[:, 0].isfinite().all()


def test_length_normalization_favors_longer_captions(tiny_decoder):
    regions = torch.rand(8, 4, 6)

    def mean_length(penalty):
        captions = beam_search(tiny_decoder, regions, SearchSettings(5, 8, penalty))[0][:, 0]
        return ((captions != END).sum(1) + 1).clamp(max=8).float().mean()

    assert mean_length(1.0) > mean_length(0.0)


@pytest.mark.parametrize("length_penalty", [1e30, float("inf")])
def test_a_length_penalty_beyond_all_measure_still_finds_a_caption(tiny_decoder, length_penalty):
    captions, log_probs = beam_search(tiny_decoder, torch.randn(2, 3, 6), SearchSettings(5, 8, length_penalty))
    assert not (captions[:, 0, :1] == END).any() and not torch.isin(captions[:, 0], torch.tensor(BANNED_IDS)).any()
    assert log_probs[:, 0].isfinite().all()
