"""Sampling against the softmax, with its truncations written out; forced decoding against teacher forcing."""

import pytest
import torch

from conftest import beams, ending_at_different_words, samples, step_by_step
from decoding.beam_search import beam_search
from decoding.sampling import force_decode, sample
from decoding.settings import DecodingSettings
from text.vocabulary import END, START
from utils import InputError

ALLOWED_IDS = (END, 4, 5, 6)


@pytest.mark.usefixtures("checks")
def test_cold_samples_of_a_batch_are_the_greedy_captions(tiny_decoder):
    regions = ending_at_different_words(tiny_decoder)
    tiny_decoder.output.bias.data[END] -= 1
    greedy, _ = beam_search(tiny_decoder, regions, beams(1, 9))
    for settings in (samples(2, 9, temperature=1e-4), samples(2, 9, top_k=1)):
        not_empty = sample(tiny_decoder, regions, settings)
        rows = not_empty[:, 0, 0] != END  # a sampled caption may be empty
        assert rows.sum() > 5 and len((greedy != END).sum(-1).unique()) > 1
        for row, expected in zip(not_empty[rows], greedy[rows, 0], strict=True):
            for caption in row:
                assert [word for word in caption if word != END] == [word for word in expected if word != END]


def truncated(logits, settings):
    """The probabilities of `ALLOWED_IDS`, with top-k and top-p as loops over the words from the most probable on."""
    probabilities = (logits[list(ALLOWED_IDS)] / settings.temperature).softmax(0).tolist()
    by_rank = sorted(range(4), key=lambda i: -probabilities[i])
    kept = by_rank[: settings.top_k or None]
    total = sum(probabilities[i] for i in kept)
    nucleus, mass = [], 0.0
    for i in kept:
        nucleus.append(i)
        mass += probabilities[i] / total
        if mass >= settings.top_p:
            break
    total = sum(probabilities[i] for i in nucleus)
    return torch.tensor([probabilities[i] / total if i in nucleus else 0.0 for i in range(4)])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 2},
        {"top_k": 3, "temperature": 2.0},
        {"top_p": 0.6},
        {"top_p": 0.9},
        {"top_k": 3, "top_p": 0.8, "temperature": 1.5},
    ],
    ids=str,
)
def test_sampled_words_follow_the_softmax(tiny_decoder, options):
    torch.manual_seed(0)
    tiny_decoder.output.weight.data /= 4  # flatter distributions
    regions, settings = torch.rand(2, 4, 6), samples(4000, 3, **options)
    sampled = sample(tiny_decoder, regions, settings)
    assert sampled.shape == (2, 4000, 3)
    checked = 0
    for b in range(2):
        keys, state = tiny_decoder.keys(regions[b : b + 1]), tiny_decoder.init_state(regions[b : b + 1])
        first, state, *_ = tiny_decoder.step(torch.tensor([[START]]), regions[b : b + 1], keys, state)
        common = sampled[b, :, 0][sampled[b, :, 0] != END].mode().values
        second = tiny_decoder.step(common.view(1, 1), regions[b : b + 1], keys, state).logits
        for logits, words in ((first, sampled[b, :, 0]), (second, sampled[b, sampled[b, :, 0] == common, 1])):
            expected = truncated(logits[0, 0], settings)
            frequencies = torch.stack([(words == word_id).float().mean() for word_id in ALLOWED_IDS])
            assert len(words) > 200 and frequencies.sum() == pytest.approx(1)
            assert ((expected > 0) | (frequencies == 0)).all()
            torch.testing.assert_close(frequencies, expected, atol=0.05, rtol=0)
            checked += int((expected > 0).sum())
    ended = sampled[sampled[:, :, 0] == END]
    assert (ended == END).all()  # captions repeat it
    if options.keys() <= {"temperature"}:
        assert len(ended)
    else:
        assert checked < 16  # truncation has truncated


def test_a_seed_reproduces_samples(tiny_decoder):
    tiny_decoder.output.weight.data /= 4
    regions, settings = torch.rand(3, 4, 6), samples(20, 8, top_p=0.9)
    found = [sample(tiny_decoder, regions, settings, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    state = torch.get_rng_state()
    sample(tiny_decoder, regions, settings, torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)  # torch's own generator is left alone


def test_samples_are_as_long_as_asked_for_and_allowed(tiny_decoder):
    tiny_decoder.output.bias.data[:4] = torch.tensor([50.0, 50.0, -50.0, 50.0])  # <pad>, <start>, <end>, <unk>
    sampled = sample(tiny_decoder, torch.rand(2, 4, 6), samples(7, 5, top_k=100, top_p=0.99))
    assert sampled.shape == (2, 7, 5) and set(sampled.flatten().tolist()) <= {4, 5, 6}


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_settings_without_a_meaning_are_refused(options):
    name, value = next(iter(options.items()))
    with pytest.raises(InputError, match=f"^--{name} {value}: "):
        DecodingSettings(**options)


def test_captions_of_any_origin_are_scored_with_alpha_and_gates(tiny_decoder):
    regions = torch.randn(2, 4, 6)
    captions = torch.tensor([[[4, 5, 6], [END, END, END], [6, END, END]], [[6, 6, END], [3, 4, 5], [5, 4, END]]])
    log_probs, alpha, gates = force_decode(tiny_decoder, regions, captions)
    for b in range(2):
        for c, caption in enumerate(captions[b].tolist()):
            length = caption.index(END) + 1 if END in caption else 3
            expected, expected_alpha = step_by_step(tiny_decoder, regions[b : b + 1], caption[:length])
            assert log_probs[b, c].item() == pytest.approx(expected, abs=1e-4)
            torch.testing.assert_close(alpha[b, c, :length], expected_alpha)
            keys, state = tiny_decoder.keys(regions[b : b + 1]), tiny_decoder.init_state(regions[b : b + 1])
            for t, word in enumerate([START, *caption[: length - 1]]):
                expected_gate = tiny_decoder.attention.gate(state[0]).sigmoid().view(())
                torch.testing.assert_close(gates[b, c, t], expected_gate)
                state = tiny_decoder.step(torch.tensor([[word]]), regions[b : b + 1], keys, state).state
            assert (gates[b, c, length:] == 0).all()
