"""Decoding with the state of a transformer: nested, of five dimensions, longer at each word."""

import pytest
import torch
from test_beam_search import assert_equals_reference

from conftest import beams, make_tiny_decoder, samples
from decoding import contract
from decoding.beam_search import beam_search
from decoding.constraints import Constraints
from decoding.sampling import force_decode, sample
from modules.transformer import TransformerDecoder
from text.vocabulary import END


@pytest.fixture
def decoder():
    """A random transformer of two layers with dropout off."""
    return make_tiny_decoder(TransformerDecoder, scale=2, heads=2, ffn_dim=12, decoder_layers=2)


@pytest.fixture
def regions():
    return torch.randn(8, 4, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.usefixtures("checks")
@pytest.mark.parametrize(
    ("settings", "constraints"),
    [(beams(1, 9), None), (beams(3, 9), None), (beams(4, 9, num_beam_groups=2, diversity_penalty=1.0), Constraints(2))],
)
def test_batched_search_equals_a_simple_search_of_each_image(decoder, regions, settings, constraints):
    captions = assert_equals_reference(decoder, regions, settings, constraints)
    assert len((captions != END).sum(-1).amax(1).unique()) > 1  # images were dropped along the way


def test_forced_decoding_and_sampling_carry_the_cache(decoder, regions):
    captions, log_probs = beam_search(decoder, regions, beams(3, 9))
    found, _, gates = force_decode(decoder, regions, captions)
    torch.testing.assert_close(found, log_probs)
    assert gates is None
    sampled = sample(decoder, regions, samples(4, 9, top_k=1))
    for b in range(8):
        alone = sample(decoder, regions[b : b + 1], samples(4, 9, top_k=1))[0]
        assert sampled[b, :, : alone.shape[1]].tolist() == alone.tolist()
        assert (sampled[b, :, alone.shape[1] :] == END).all()


@pytest.mark.parametrize("shape", [(), (3,), (2, 0, 4), (2, 3, 4)])
def test_states_of_any_rank_are_reordered_expanded_and_selected(shape):
    x = torch.randn(3, 2, *shape)
    beam_indices = torch.tensor([[0, 0, 1], [1, 0, 1], [1, 1, 1]])
    reordered, (again,) = contract.reorder((x, (x,)), beam_indices)
    for b in range(3):
        for k in range(3):
            assert torch.equal(reordered[b, k], x[b, beam_indices[b, k]])
    assert torch.equal(again, reordered)
    (expanded,) = contract.expand((x[:, :1],), 4)
    assert expanded.shape == (3, 4, *shape) and expanded.is_contiguous()
    assert all(torch.equal(expanded[:, c], x[:, 0]) for c in range(4))
    ended = torch.tensor([[True, False], [True, True], [False, False]])
    kept, (also_kept,) = contract.drop_ended(ended, (x, (x,)))
    assert torch.equal(kept, x[[0, 2]]) and torch.equal(also_kept, kept)
    assert contract.drop_ended(ended[[0, 2]], x) is x


def test_a_search_in_bfloat16_finds_about_the_log_probabilities_of_float32(decoder, regions):
    with torch.autocast("cpu", torch.bfloat16):
        captions, log_probs = beam_search(decoder, regions, beams(3, 8))
    torch.testing.assert_close(log_probs, force_decode(decoder, regions, captions)[0], rtol=0.1, atol=0)
