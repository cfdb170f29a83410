import pytest
import torch

from modules import layers
from modules.layers import additive_scores


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
