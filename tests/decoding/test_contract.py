"""Decoding with a state like a transformer's: nested, of more than three dimensions, longer at each word."""

import pytest
import torch
from decoding.force_decode import force_decode
from test_beam_search import assert_equals_reference

from conftest import beams, samples
from decoding import contract
from decoding.beam_search import beam_search
from decoding.constraints import Constraints
from decoding.sampling import sample
from text.vocabulary import END


class ToyTransformer:
    """Self-attention over the words so far with cached keys and values (B, C, heads, t, d), in two layers."""

    def __init__(self, heads=2, d=3):
        generator = torch.Generator().manual_seed(3)
        self.heads, self.d, width = heads, d, heads * d
        self.embedding = torch.randn(7, width, generator=generator)
        self.region_proj = torch.randn(6, width, generator=generator)
        self.qkv = torch.randn(2, width, 3 * width, generator=generator) / 2
        self.output = torch.randn(width, 7, generator=generator)

    def keys(self, regions, mask=None):
        projected = regions @ self.region_proj  # (B, R, width)
        return (projected, (projected.mean(1),))

    def init_state(self, regions, mask=None):
        empty = regions.new_zeros(len(regions), 1, self.heads, 0, self.d)
        words_so_far = torch.zeros(len(regions), 1)  # of the captions: a tensor of two dimensions
        return ((empty, empty), (empty, empty)), words_so_far

    def step(self, words, regions, keys, state):
        projected, (mean,) = keys
        caches, words_so_far = state
        x = self.embedding[words] + mean.unsqueeze(1) + words_so_far.unsqueeze(-1).sin()  # (B, C, width)
        new_caches = []
        for weight, (k, v) in zip(self.qkv, caches, strict=True):
            query, *kv = (x @ weight).unflatten(-1, (3, self.heads, 1, self.d)).unbind(2)  # (B, C, heads, 1, d)
            k, v = (torch.cat([old, new], dim=3) for old, new in zip((k, v), kv, strict=True))
            x = x + ((query @ k.transpose(-1, -2)).softmax(-1) @ v).flatten(2)
            new_caches.append((k, v))
        alpha = (x @ projected.transpose(1, 2)).softmax(-1)  # (B, C, R)
        x = x + alpha @ projected
        return x @ self.output, alpha, (tuple(new_caches), words_so_far + 1)


@pytest.fixture
def regions():
    return torch.randn(8, 4, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.usefixtures("checks")
@pytest.mark.parametrize(
    ("settings", "constraints"),
    [
        (beams(1, 9), None),
        (beams(3, 9), None),
        (beams(4, 9, num_beam_groups=2, diversity_penalty=1.0), Constraints(2)),
    ],
)
def test_batched_search_equals_a_simple_search_of_each_image(regions, settings, constraints):
    captions = assert_equals_reference(ToyTransformer(), regions, settings, constraints)
    assert len((captions != END).sum(-1).amax(1).unique()) > 1  # images were dropped along the way


def test_forced_decoding_and_sampling_carry_the_cache(regions):
    decoder = ToyTransformer()
    captions, log_probs = beam_search(decoder, regions, beams(3, 9))
    torch.testing.assert_close(force_decode(decoder, regions, captions)[0], log_probs)
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
