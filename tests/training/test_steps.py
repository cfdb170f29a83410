"""Training steps over several processes."""

from dataclasses import replace

import pytest
import torch

import training.steps
from conftest import CPU, SMALL, build
from datasets import Example, collate
from training.optim import make_optimizer
from training.steps import train_step


@pytest.mark.parametrize(("changes", "count"), [({}, 0), ({"decoder": "transformer"}, 0), ({"attention": "hard"}, 1)])
def test_processes_add_their_losses_only_for_the_baseline_of_hard_attention(changes, count, monkeypatch):
    calls = []
    monkeypatch.setattr(training.steps, "all_reduce_sum", lambda values: calls.append(values) or values)
    settings = replace(SMALL, encoder_weights="", fine_tune_encoder=False, **changes)
    captioner = build(settings, 12).train()
    batch = collate([Example(0, torch.rand(16, 64).half(), [[1, 4, 5, 2]])])
    cross_entropy, _ = train_step(captioner, make_optimizer(captioner, settings), batch, settings, CPU)
    assert calls == [[cross_entropy]] * count
    if count:
        assert captioner.decoder.attention.baseline.item() == pytest.approx(cross_entropy / 3)
