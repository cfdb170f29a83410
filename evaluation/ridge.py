"""Ridge regression, its penalty chosen by leaving out one example at a time.

Source: Hoerl and Kennard, 1970; the errors of all examples left out come from one fit (Allen, 1974, PRESS). Shapes: N
examples, F features, D targets, K components.
"""

from typing import NamedTuple

import torch
from torch import Tensor

PENALTIES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # times N, for features of variance 1
SMALLEST_DEVIATION = 1e-3  # of a feature that hardly varies, so that noise is not blown up


class Ridge(NamedTuple):
    """The linear map x -> (x - center) @ weights."""

    center: Tensor  # (F,)
    weights: Tensor  # (F, D)


def fit_ridge(features: Tensor, targets: Tensor) -> Ridge:
    """Predict targets (N, D), whose mean is 0, from features (N, F), which are standardized first."""
    x, y = features.double(), targets.double()
    center, deviation = x.mean(dim=0), x.std(dim=0, correction=0).clamp_min(SMALLEST_DEVIATION)
    x = (x - center) / deviation
    N = len(x)
    variances, V = torch.linalg.eigh(x.T @ x)  # (K,), (F, K), K = F
    components = x @ V  # (N, K)
    products = components.T @ y  # (K, D)

    def left_out_error(penalty: float) -> float:
        shrunk = components / (variances.clamp_min(0) + N * penalty)  # (N, K)
        leverages = (components * shrunk).sum(dim=1, keepdim=True) + 1 / N  # (N, 1); 1 / N of the mean
        return float(((y - shrunk @ products) / (1 - leverages).clamp_min(1e-6)).square().sum())

    penalty = min(PENALTIES, key=left_out_error)
    weights = V @ (products / (variances.clamp_min(0) + N * penalty).unsqueeze(1)) / deviation.unsqueeze(1)
    return Ridge(center.float(), weights.float())
