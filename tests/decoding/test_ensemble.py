"""Ensembles against probabilities averaged by hand."""

import itertools
import math

import pytest
import torch

from conftest import beams
from decoding.beam_search import beam_search
from decoding.ensemble import EnsembleDecoder, map_words
from decoding.sampling import force_decode
from models import ModelSettings
from modules.show_attend_tell import ShowAttendTell
from text.vocabulary import END, SPECIAL_TOKENS, START, Vocabulary
from utils import InputError


@pytest.fixture
def other_decoder():
    """Like `tiny_decoder`, with other cells, attention and sizes."""
    torch.manual_seed(8)
    settings = ModelSettings(cell="gru", attention="dot", embed_dim=4, attention_dim=6, hidden_dim=5)
    decoder = ShowAttendTell(settings, vocab_size=7, region_dim=3).eval()
    for parameter in decoder.parameters():
        parameter.data *= 4
    return decoder


@pytest.fixture
def regions():
    """Of five images, for `tiny_decoder` and, more of them, for `other_decoder`."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 4, 6, generator=generator) * 2, torch.randn(5, 9, 3, generator=generator) * 2


def averaged_by_hand(decoders, regions, caption, word_ids):
    """Log-probability of an image's caption under the mean of the probabilities; word_ids: each decoder's of a word."""
    total = 0.0
    states = [decoder.init_state(r) for decoder, r in zip(decoders, regions, strict=True)]
    for previous, word in itertools.pairwise([START, *caption]):
        probabilities = []
        for m, (decoder, r) in enumerate(zip(decoders, regions, strict=True)):
            words = torch.tensor([[word_ids[m][previous]]])
            logits, states[m], *_ = decoder.step(words, r, decoder.keys(r), states[m])
            exponentials = logits[0, 0].double().exp()
            probabilities.append((exponentials[word_ids[m][word]] / exponentials.sum()).item())
        total += math.log(sum(probabilities) / len(probabilities))
    return total


def test_different_models_are_averaged(tiny_decoder, other_decoder, regions):
    ensemble = EnsembleDecoder([tiny_decoder, other_decoder], [None, None])
    captions = torch.tensor([[4, 5, 6], [6, END, END], [5, 5, END]]).expand(5, 3, 3)
    log_probs, *attention = force_decode(ensemble, regions, captions)
    for b, c in itertools.product(range(5), range(3)):
        caption = captions[b, c].tolist()
        caption = caption[: caption.index(END) + 1] if END in caption else caption
        image = [r[b : b + 1] for r in regions]
        expected = averaged_by_hand([tiny_decoder, other_decoder], image, caption, [range(7)] * 2)
        assert log_probs[b, c].item() == pytest.approx(expected, abs=1e-4)
    torch.testing.assert_close(attention, list(force_decode(tiny_decoder, regions[0], captions)[1:]))  # the first's
    assert ensemble.has_attention
    keys, state = ensemble.keys(regions), ensemble.init_state(regions)
    logits = ensemble.step(torch.full((5, 1), START), regions, keys, state).logits
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(5, 1))  # logarithms of probabilities


@pytest.mark.usefixtures("checks")
def test_a_batch_is_searched_as_its_images(tiny_decoder, other_decoder, regions):
    other_decoder.output.bias.data[END] += 5
    ensemble = EnsembleDecoder([tiny_decoder, other_decoder], [None, None])
    captions, log_probs = beam_search(ensemble, regions, beams(3, 8))
    assert len((captions != END).sum(-1).amax(1).unique()) > 1  # images were dropped along the way
    for b in range(5):
        alone, alone_log_probs = beam_search(ensemble, tuple(r[b : b + 1] for r in regions), beams(3, 8))
        T = min(alone.shape[2], captions.shape[2])
        assert torch.equal(captions[b, :, :T], alone[0, :, :T])
        torch.testing.assert_close(log_probs[b], alone_log_probs[0])


WORDS = [*SPECIAL_TOKENS, "left", "dog", "right"]


def with_words(decoder, old, new):
    """Give a decoder the words `new`, a permutation of its words `old`."""
    order = [old.index(word) for word in new]
    for layer in (decoder.embedding, decoder.output):
        layer.weight.data = layer.weight.data[order]
    decoder.output.bias.data = decoder.output.bias.data[order]


def test_another_order_of_the_words_does_not_matter(tiny_decoder, other_decoder, regions):
    decoders = [tiny_decoder, other_decoder]
    captions, log_probs = beam_search(EnsembleDecoder(decoders, [None, None]), regions, beams(3, 8))
    order = [*SPECIAL_TOKENS, "right", "left", "dog"]  # a cycle of three, which is not its own inverse
    with_words(other_decoder, WORDS, order)
    word_maps = [None, map_words(Vocabulary(WORDS), Vocabulary(order))]
    mapped, mapped_log_probs = beam_search(EnsembleDecoder(decoders, word_maps), regions, beams(3, 8))
    assert torch.equal(mapped, captions)
    torch.testing.assert_close(mapped_log_probs, log_probs)


def test_a_mirrored_member_exchanges_left_and_right(tiny_decoder, regions):
    vocabulary = Vocabulary(WORDS)
    word_map = map_words(vocabulary, vocabulary, flipped=True)
    assert word_map.tolist() == [0, 1, 2, 3, 6, 5, 4]
    captions = torch.tensor([[4, 5, 6], [6, 6, END]]).expand(5, 2, 3)
    swapped = torch.tensor([[6, 5, 4], [4, 4, END]]).expand(5, 2, 3)
    ensemble = EnsembleDecoder([tiny_decoder], [word_map])
    expected = force_decode(tiny_decoder, regions[0], swapped)
    torch.testing.assert_close(force_decode(ensemble, regions[:1], captions), expected)


def test_words_are_mapped_only_where_they_must_be():
    vocabulary = Vocabulary(WORDS)
    assert map_words(vocabulary, vocabulary) is None
    one_side = Vocabulary([*SPECIAL_TOKENS, "left", "dog"])
    as_in_training = [0, 1, 2, 3, 3, 5]
    assert map_words(one_side, one_side, flipped=True).tolist() == as_in_training
    other = Vocabulary([*SPECIAL_TOKENS, "right", "left", "dog"])
    assert map_words(vocabulary, other).tolist() == [0, 1, 2, 3, 5, 6, 4]
    assert map_words(vocabulary, other, flipped=True).tolist() == [0, 1, 2, 3, 4, 6, 5]


def test_models_of_different_words_are_refused():
    members = Vocabulary(WORDS), Vocabulary([*SPECIAL_TOKENS, "left", "cat", "right"])
    for pair in (members, members[::-1]):
        with pytest.raises(InputError, match="2 are known to only one of two models, such as 'cat'"):
            map_words(*pair)
