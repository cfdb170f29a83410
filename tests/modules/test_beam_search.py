"""Beam search against exhaustive search, greedy decoding and teacher forcing; sampling against the softmax."""

import itertools

import pytest
import torch

from conftest import step_by_step
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
    captions, log_probs = beam_search(tiny_decoder, regions, 4**4, 4, length_penalty)
    assert tuple(captions[0, 0].tolist())[: len(caption)] == caption
    assert log_probs[0, 0].item() == pytest.approx(log_prob, abs=1e-4)


@pytest.mark.parametrize("beam_size", [1, 3, 5, 50])
def test_batched_search_equals_one_image_at_a_time(tiny_decoder, beam_size):
    regions = torch.randn(6, 4, 6, generator=torch.Generator().manual_seed(1)) * 2
    captions, log_probs = beam_search(tiny_decoder, regions, beam_size, 8)
    assert len({tuple(caption) for caption in captions[:, 0].tolist()}) > 1
    for b in range(6):
        alone, alone_log_probs = beam_search(tiny_decoder, regions[b : b + 1], beam_size, 8)
        assert captions[b, 0, : alone.shape[2]].tolist() == alone[0, 0].tolist()
        assert log_probs[b, 0].item() == pytest.approx(alone_log_probs[0, 0].item(), abs=1e-4)


def test_a_beam_of_one_is_greedy(tiny_decoder):
    regions = torch.rand(1, 4, 6)
    keys, state = tiny_decoder.keys(regions), tiny_decoder.init_state(regions)
    greedy, word = [], START
    while len(greedy) < 8 and word != END:
        logits, _, state = tiny_decoder.step(torch.tensor([[word]]), regions, keys, state)
        word = max(ALLOWED_IDS if greedy else ALLOWED_IDS[1:], key=lambda word_id: logits[0, 0, word_id].item())
        greedy.append(word)
    assert beam_search(tiny_decoder, regions, 1, 8)[0][0, 0].tolist() == greedy


@pytest.mark.parametrize("max_length", [1, 5])
def test_banned_words_never_appear_and_a_caption_need_not_end(tiny_decoder, max_length):
    tiny_decoder.output.bias.data[:4] = torch.tensor([50.0, 50.0, -50.0, 50.0])  # <pad>, <start>, <end>, <unk>
    captions, log_probs = beam_search(tiny_decoder, torch.rand(2, 4, 6), 5, max_length)
    assert captions.shape[2] == max_length
    assert set(captions[:, 0].flatten().tolist()) <= {4, 5, 6}
    assert log_probs[:, 0].isfinite().all()


@pytest.mark.parametrize("max_length", [2, 8])
def test_beam_search_and_forced_decoding_agree_with_teacher_forcing(tiny_decoder, max_length):
    regions = torch.randn(6, 4, 6, generator=torch.Generator().manual_seed(1)) * 2
    captions, log_probs = beam_search(tiny_decoder, regions, 3, max_length)
    forced_log_probs, forced_alpha = force_decode(tiny_decoder, regions, captions[:, 0])
    torch.testing.assert_close(forced_log_probs, log_probs[:, 0])
    for b, caption in enumerate(captions[:, 0].tolist()):
        length = caption.index(END) + 1 if END in caption else len(caption)
        words = torch.tensor([[[START, *caption[:length]]]])
        logits, targets, alpha, *_ = tiny_decoder(regions[b : b + 1], words, torch.tensor([[length]]))
        log_prob = logits.log_softmax(1).gather(1, targets.unsqueeze(1)).sum()
        torch.testing.assert_close(log_prob, log_probs[b, 0])
        torch.testing.assert_close(forced_alpha[b, :length], alpha[:, 0, 0])
        assert forced_alpha[b, length:].abs().sum() == 0


def test_length_normalization_favors_longer_captions(tiny_decoder):
    regions = torch.rand(8, 4, 6)

    def mean_length(penalty):
        captions = beam_search(tiny_decoder, regions, 5, 8, penalty)[0][:, 0]
        return ((captions != END).sum(1) + 1).clamp(max=8).float().mean()

    assert mean_length(1.0) > mean_length(0.0)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampled_words_follow_the_softmax(tiny_decoder, temperature):
    torch.manual_seed(0)
    tiny_decoder.output.weight.data /= 4  # flatter distributions
    regions = torch.rand(2, 4, 6)
    sampled = sample(tiny_decoder, regions, 4000, 3, temperature)
    assert sampled.shape == (2, 4000, 3) and set(sampled.flatten().tolist()) == set(ALLOWED_IDS)
    for b in range(2):
        keys, state = tiny_decoder.keys(regions[b : b + 1]), tiny_decoder.init_state(regions[b : b + 1])
        first, _, state = tiny_decoder.step(torch.tensor([[START]]), regions[b : b + 1], keys, state)
        second, _, _ = tiny_decoder.step(torch.tensor([[5]]), regions[b : b + 1], keys, state)
        for logits, words in ((first, sampled[b, :, 0]), (second, sampled[b, sampled[b, :, 0] == 5, 1])):
            expected = (logits[0, 0, list(ALLOWED_IDS)] / temperature).softmax(0)
            frequencies = torch.stack([(words == word_id).float().mean() for word_id in ALLOWED_IDS])
            assert len(words) > 200
            torch.testing.assert_close(frequencies, expected, atol=0.05, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampled_captions_repeat_end_after_their_end(tiny_decoder, temperature):
    torch.manual_seed(0)
    tiny_decoder.output.weight.data /= 4  # flatter distributions
    for sampled in sample(tiny_decoder, torch.rand(2, 4, 6), 4000, 3, temperature):
        ended = sampled[sampled[:, 0] == END]
        assert len(ended) and (ended == END).all()


@pytest.mark.parametrize("length_penalty", [1e30, float("inf")])
def test_a_length_penalty_beyond_all_measure_still_finds_a_caption(tiny_decoder, length_penalty):
    captions, log_probs = beam_search(tiny_decoder, torch.randn(2, 3, 6), 5, 8, length_penalty)
    assert not (captions[:, 0, :1] == END).any() and not torch.isin(captions[:, 0], torch.tensor(BANNED_IDS)).any()
    assert log_probs[:, 0].isfinite().all()
