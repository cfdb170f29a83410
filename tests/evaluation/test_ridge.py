"""Ridge regression against its normal equations, and its penalty against leaving out each example."""

import torch

from evaluation.ridge import PENALTIES, fit_ridge


def make_data(N, F, D, noise):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(N, F, generator=generator, dtype=torch.float64) * torch.arange(1, F + 1) + 5
    targets = features @ torch.randn(F, D, generator=generator, dtype=torch.float64)
    targets = targets + noise * torch.randn(N, D, generator=generator, dtype=torch.float64)
    return features, targets - targets.mean(dim=0)


def solve(features, targets, penalty):
    """The normal equations of standardized features: center, weights."""
    center, deviation = features.mean(dim=0), features.std(dim=0, correction=0)
    x = (features - center) / deviation
    gram = x.T @ x + len(x) * penalty * torch.eye(x.shape[1])
    return center, torch.linalg.solve(gram, x.T @ targets) / deviation.unsqueeze(1)


def left_out_error(features, targets, penalty):
    """The squared error of each example, predicted without it; the standardization and penalty are those of all."""
    center, deviation = features.mean(dim=0), features.std(dim=0, correction=0)
    x, error = (features - center) / deviation, 0.0
    for i in range(len(x)):
        others = torch.arange(len(x)) != i
        mean_x, mean_y = x[others].mean(dim=0), targets[others].mean(dim=0)
        shifted = x[others] - mean_x
        gram = shifted.T @ shifted + len(x) * penalty * torch.eye(x.shape[1])
        weights = torch.linalg.solve(gram, shifted.T @ (targets[others] - mean_y))
        error += float((targets[i] - mean_y - (x[i] - mean_x) @ weights).square().sum())
    return error


def test_the_penalty_is_that_of_the_least_left_out_error():
    chosen = set()
    for noise in (0.1, 5.0, 15.0, 200.0):
        features, targets = make_data(20, 4, 3, noise)
        best = min(PENALTIES, key=lambda penalty: left_out_error(features, targets, penalty))
        chosen.add(best)
        center, weights = solve(features, targets, best)
        ridge = fit_ridge(features.float(), targets.float())
        torch.testing.assert_close(ridge.center, center.float())
        torch.testing.assert_close(ridge.weights, weights.float(), rtol=1e-3, atol=1e-5)
    assert len(chosen) >= 3  # more noise, a larger penalty


def test_more_features_than_examples_and_constant_features():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 10, generator=generator)
    features[:, 0] = 7.0
    ridge = fit_ridge(features, torch.tensor([[1.0], [-2.0], [1.0]]))
    assert ridge.weights.shape == (10, 1) and ridge.weights.isfinite().all() and not ridge.weights[0].any()
    ridge = fit_ridge(features[:1], torch.zeros(1, 1))
    assert not ((features - ridge.center) @ ridge.weights).isnan().any()
