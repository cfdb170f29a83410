import pytest
import torch

from modules import layers
from modules.layers import additive_scores, sample_categorical


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("images_per_block", [1, 2, 7])
def test_additive_scores_in_blocks_match_the_formula(dtype, images_per_block, monkeypatch):
    torch.manual_seed(0)
    elements = 3 * 5 * 8  # of the sum of one image
    monkeypatch.setattr(layers._BlockedAdditiveScores, "BLOCK", images_per_block * elements // torch.get_num_threads())
    keys, query = torch.randn(7, 5, 8, dtype=dtype), torch.randn(7, 3, 8, dtype=dtype)
    weight, grad = torch.randn(8), torch.randn(7, 3, 5)
    inputs = [x.requires_grad_() for x in (keys, query, weight)]
    scores = additive_scores(*inputs)
    gradients = torch.autograd.grad(scores, inputs, grad)

    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = torch.einsum("bcra,a->bcr", torch.tanh(exact[0].unsqueeze(1) + exact[1].unsqueeze(2)), exact[2])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-5)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=tolerance, atol=tolerance)


def test_categories_are_sampled_in_proportion_to_their_probabilities():
    torch.manual_seed(0)
    probabilities = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0])
    counts = torch.bincount(sample_categorical(probabilities.expand(100, 1000, 6)).flatten(), minlength=6)
    # The standard deviation of the largest share is 0.0016.
    torch.testing.assert_close(counts / 100_000, probabilities, rtol=0, atol=0.008)
    assert not counts[probabilities == 0].any()


def test_probabilities_that_are_not_finite_give_a_category(monkeypatch):
    probabilities = torch.full((50, 4), float("nan"))
    assert sample_categorical(probabilities).max() < 4
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 1 - 2**-24))  # the largest that it returns
    for total in (1.0, 1 + 2**-23, 1.5, 2 - 2**-23, 0.3, 1e-30):
        assert sample_categorical(torch.tensor([0.0, total, 0.0])) == 1
