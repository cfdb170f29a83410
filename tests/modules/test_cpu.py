"""The CPU versions against the plain formulas and torch's distributions."""

import pytest
import torch

from modules import cpu
from modules.attention import SoftAttention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("images_per_block", [1, 2, 7])
def test_additive_scores_in_blocks_match_the_formula(dtype, images_per_block, monkeypatch):
    torch.manual_seed(0)
    elements = 3 * 5 * 8  # of the sum of one image
    monkeypatch.setattr(cpu._BlockedAdditiveScores, "BLOCK", images_per_block * elements // torch.get_num_threads())
    keys, query = torch.randn(7, 5, 8, dtype=dtype), torch.randn(7, 3, 8, dtype=dtype)
    weight, grad = torch.randn(8), torch.randn(7, 3, 5)
    inputs = [x.requires_grad_() for x in (keys, query, weight)]
    scores = cpu.additive_scores(*inputs)
    gradients = torch.autograd.grad(scores, inputs, grad)

    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = torch.einsum("bcra,a->bcr", torch.tanh(exact[0].unsqueeze(1) + exact[1].unsqueeze(2)), exact[2])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-5)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=tolerance, atol=tolerance)


def test_soft_attention_has_the_same_scores_without_the_cpu_version(monkeypatch):
    attention = SoftAttention(region_dim=6, hidden_dim=8, attention_dim=5)
    keys, hidden = torch.randn(2, 4, 5), torch.randn(2, 3, 8)
    blocked = attention.scores(keys, hidden)
    monkeypatch.setattr(cpu, "applies_to", lambda x: False)
    torch.testing.assert_close(attention.scores(keys, hidden), blocked)


def test_categories_are_sampled_in_proportion_to_their_probabilities():
    torch.manual_seed(0)
    probabilities = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0])
    counts = torch.bincount(cpu.sample_categorical(probabilities.expand(100, 1000, 6)).flatten(), minlength=6)
    # The standard deviation of the largest share is 0.0016.
    torch.testing.assert_close(counts / 100_000, probabilities, rtol=0, atol=0.008)
    assert not counts[probabilities == 0].any()


def test_the_largest_random_number_and_nans_give_a_category(monkeypatch):
    assert cpu.sample_categorical(torch.full((50, 4), float("nan"))).max() < 4
    numbers = []

    def largest(x, generator=None):
        numbers.append(x.fill_(1 - 2**-24))  # the largest float32 that uniform_ returns
        return x

    monkeypatch.setattr(torch.Tensor, "uniform_", largest)
    for total in (1.0, 1 + 2**-23, 1.5, 2 - 2**-23, 0.3, 1e-30):
        assert cpu.sample_categorical(torch.tensor([0.0, total, 0.0])) == 1
    assert len(numbers) == 6  # each sample took one of these numbers


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_dropout_zeroes_a_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    dropout, x = cpu.Dropout(p), torch.ones(200, 500, requires_grad=True)
    dropped = dropout(x)
    assert (dropped == 0).float().mean().item() == pytest.approx(p, abs=0.01)
    torch.testing.assert_close(dropped, (dropped > 0) / (1 - p))
    dropped.sum().backward()
    assert torch.equal(x.grad, dropped)
    assert torch.equal(dropout.eval()(x), x)
