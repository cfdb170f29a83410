"""The search against exhaustive search, greedy decoding and teacher forcing."""

import itertools

import pytest
import torch

from conftest import step_by_step
from search import attend, beam_search, sample
from vocabulary import END, START

REAL_WORDS = (END, 4, 5, 6)


def exhaustive_best(decoder, regions, max_length, length_penalty):
    """The best of all captions of 1 to max_length words, those that never end included and the empty one not."""
    candidates = []
    for length in range(1, max_length + 1):
        for caption in itertools.product(REAL_WORDS, repeat=length):
            if caption != (END,) and END not in caption[:-1] and (caption[-1] == END or length == max_length):
                total, _ = step_by_step(decoder, regions, caption)
                candidates.append((total / length**length_penalty, total, caption))
    return max(candidates)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_wide_beam_equals_exhaustive_search(tiny_decoder, length_penalty, seed):
    regions = torch.rand(1, 4, 6, generator=torch.Generator().manual_seed(seed))
    _, total, caption = exhaustive_best(tiny_decoder, regions, 4, length_penalty)
    captions, log_probabilities = beam_search(tiny_decoder, regions, 4**4, 4, length_penalty)
    assert tuple(captions[0, 0].tolist())[: len(caption)] == caption
    assert log_probabilities[0, 0].item() == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("beam_size", [1, 3, 5, 50])
def test_batched_search_equals_one_by_one(tiny_decoder, beam_size):
    regions = torch.randn(6, 4, 6, generator=torch.Generator().manual_seed(1)) * 2
    captions, log_probabilities = beam_search(tiny_decoder, regions, beam_size, 8)
    assert len({tuple(caption) for caption in captions[:, 0].tolist()}) > 1
    for b in range(6):
        alone, alone_log = beam_search(tiny_decoder, regions[b : b + 1], beam_size, 8)
        assert captions[b, 0, : alone.shape[2]].tolist() == alone[0, 0].tolist()
        assert log_probabilities[b, 0].item() == pytest.approx(alone_log[0, 0].item(), abs=1e-4)


def test_a_beam_of_one_is_greedy(tiny_decoder):
    regions = torch.rand(1, 4, 6)
    keys, state = tiny_decoder.keys(regions), tiny_decoder.first_state(regions)
    greedy, word = [], START
    while len(greedy) < 8 and word != END:
        logits, _, state = tiny_decoder.step(torch.tensor([[word]]), regions, keys, state)
        word = max(REAL_WORDS if greedy else REAL_WORDS[1:], key=lambda number: logits[0, 0, number].item())
        greedy.append(word)
    assert beam_search(tiny_decoder, regions, 1, 8)[0][0, 0].tolist() == greedy


@pytest.mark.parametrize("max_length", [1, 5])
def test_special_words_never_appear_and_nothing_has_to_end(tiny_decoder, max_length):
    tiny_decoder.output.bias.data[:4] = torch.tensor([50.0, 50.0, -50.0, 50.0])  # <pad>, <start>, <end>, <unk>
    captions, log_probabilities = beam_search(tiny_decoder, torch.rand(2, 4, 6), 5, max_length)
    assert captions.shape[2] == max_length
    assert set(captions[:, 0].flatten().tolist()) <= {4, 5, 6}
    assert log_probabilities[:, 0].isfinite().all()


@pytest.mark.parametrize("max_length", [2, 8])
def test_the_beams_log_probability_is_that_of_teacher_forcing(tiny_decoder, max_length):
    regions = torch.randn(6, 4, 6, generator=torch.Generator().manual_seed(1)) * 2
    captions, log_probabilities = beam_search(tiny_decoder, regions, 3, max_length)
    totals, weights = attend(tiny_decoder, regions, captions[:, 0])
    torch.testing.assert_close(totals, log_probabilities[:, 0])
    for b, caption in enumerate(captions[:, 0].tolist()):
        length = caption.index(END) + 1 if END in caption else len(caption)
        words = torch.tensor([[[START, *caption[:length]]]])
        logits, targets, looks, *_ = tiny_decoder(regions[b : b + 1], words, torch.tensor([[length]]))
        forced = logits.log_softmax(1).gather(1, targets.unsqueeze(1)).sum()
        torch.testing.assert_close(forced, log_probabilities[b, 0])
        torch.testing.assert_close(weights[b, :length], looks[:, 0, 0])
        assert weights[b, length:].abs().sum() == 0


def test_longer_captions_win_with_length_normalisation(tiny_decoder):
    regions = torch.rand(8, 4, 6)

    def mean_length(penalty):
        captions = beam_search(tiny_decoder, regions, 5, 8, penalty)[0][:, 0]
        return ((captions != END).sum(1) + 1).clamp(max=8).float().mean()

    assert mean_length(1.0) > mean_length(0.0)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_captions_are_drawn_as_probable_as_they_are(tiny_decoder, temperature):
    torch.manual_seed(0)
    tiny_decoder.output.weight.data /= 4  # captions of all kinds
    regions = torch.rand(2, 4, 6)
    drawn = sample(tiny_decoder, regions, 4000, 3, temperature)
    assert drawn.shape == (2, 4000, 3) and set(drawn.flatten().tolist()) == set(REAL_WORDS)
    for b in range(2):
        keys, state = tiny_decoder.keys(regions[b : b + 1]), tiny_decoder.first_state(regions[b : b + 1])
        first, _, state = tiny_decoder.step(torch.tensor([[START]]), regions[b : b + 1], keys, state)
        second, _, _ = tiny_decoder.step(torch.tensor([[5]]), regions[b : b + 1], keys, state)
        for logits, words in ((first, drawn[b, :, 0]), (second, drawn[b, drawn[b, :, 0] == 5, 1])):
            expected = (logits[0, 0, list(REAL_WORDS)] / temperature).softmax(0)
            shares = torch.stack([(words == word).float().mean() for word in REAL_WORDS])
            assert len(words) > 200
            torch.testing.assert_close(shares, expected, atol=0.05, rtol=0)
        ended = drawn[b, drawn[b, :, 0] == END]
        assert len(ended) and (ended == END).all()
