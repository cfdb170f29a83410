"""Where a decoder looks: each attention against its formula, hard attention's gradient against the exact one."""

import itertools
import math

import pytest
import torch
from torch.nn import functional

from attention import ATTENTIONS, HardAttention
from datasets import collate
from decoders import Decoder
from optimization import follow, hard_attention_loss
from vocabulary import END, START


def scores_by_formula(name, attention, regions, hidden):
    keys, query = attention.keys(regions), attention.query(hidden)
    if name == "dot":
        return torch.einsum("bra,bca->bcr", keys, query) / math.sqrt(keys.shape[-1])
    return attention.score((keys.unsqueeze(1) + query.unsqueeze(2)).tanh()).squeeze(-1)


@pytest.mark.parametrize("name", ["soft", "dot", "hard"])
def test_attention_is_a_gated_mean_of_the_regions(name):
    torch.manual_seed(0)
    attention = ATTENTIONS[name](6, 8, 5).eval()
    regions, hidden = torch.randn(2, 4, 6), torch.randn(2, 3, 8)
    context, weights = attention(regions, attention.keys(regions), hidden)
    torch.testing.assert_close(weights, scores_by_formula(name, attention, regions, hidden).softmax(-1))
    gate = attention.gate(hidden).sigmoid()
    torch.testing.assert_close(context, gate * torch.einsum("bcr,brd->bcd", weights, regions))


def test_without_attention_the_context_is_empty_and_the_weights_are_even():
    attention = ATTENTIONS["none"](6, 8, 5)
    regions, hidden = torch.randn(2, 4, 6), torch.randn(2, 3, 8)
    context, weights = attention(regions, attention.keys(regions), hidden)
    assert context.shape == (2, 3, 0) and torch.equal(weights, torch.full((2, 3, 4), 0.25))
    assert not list(attention.parameters())


def test_hard_attention_looks_at_one_region_in_half_of_its_looks():
    torch.manual_seed(0)
    attention = HardAttention(6, 8, 5)
    attention.gate.weight.data.zero_()
    attention.gate.bias.data.fill_(100)  # an open gate
    regions, hidden, choices = torch.randn(1, 4, 6), torch.randn(1, 1, 8).expand(1, 8000, 8), []
    context, weights = attention(regions, attention.keys(regions), hidden, choices)
    at_one = torch.isclose(context.unsqueeze(2), regions.unsqueeze(1), atol=1e-4).all(-1)  # (1, 8000, 4)
    single = at_one.any(-1)
    assert single.float().mean().item() == pytest.approx(0.5, abs=0.03)
    torch.testing.assert_close(at_one[single].float().mean(0), weights[0, 0], atol=0.03, rtol=0)
    torch.testing.assert_close(context[~single], (weights @ regions)[~single], atol=1e-4, rtol=0)
    torch.testing.assert_close(choices[0], (weights * at_one).sum(-1).clamp_min(1e-9).log().where(single, 0))


def test_hard_attentions_gradient_is_that_of_the_expected_loss(monkeypatch):
    """Two looks at three regions: nine pairs of looks, added up by their probabilities, against 20,000 drawn ones."""
    monkeypatch.setattr(HardAttention, "EXPECTED", 0.0)
    torch.manual_seed(3)
    decoder = Decoder(6, 6, 5, 4, 8, dropout=0.0, cell="lstm", attention="hard").train()
    for parameter in decoder.parameters():
        parameter.data *= 4
    regions, caption, number = torch.randn(1, 3, 6), [START, 4, END], 20_000
    exact = 0.0
    for places in itertools.product(range(3), repeat=2):
        looks = iter(places)
        probabilities = []

        def choose(weights, choices, looks=looks, probabilities=probabilities):
            one = functional.one_hot(torch.tensor(next(looks)), 3).float().view(1, 1, 3)
            probabilities.append((weights * one).sum())
            return one

        monkeypatch.setattr(decoder.attention, "choose", choose)
        outputs = decoder(regions, torch.tensor([[caption]]), torch.tensor([[2]]))
        loss = functional.cross_entropy(outputs.logits, outputs.targets, reduction="sum")
        exact = exact + probabilities[0] * probabilities[1] * loss
    exact.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in decoder.named_parameters()}
    decoder.zero_grad()
    monkeypatch.undo()
    monkeypatch.setattr(HardAttention, "EXPECTED", 0.0)
    batch = collate([(0, regions[0], [caption] * number)])
    outputs = decoder(regions, batch.words, batch.lengths)
    losses = functional.cross_entropy(outputs.logits, outputs.targets, reduction="none")
    drawn = hard_attention_loss(outputs, batch.lengths, losses.detach(), reward_weight=1.0, entropy_weight=0.0)
    ((losses.sum() + drawn) / number).backward()
    for name, parameter in decoder.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=0.006, rtol=0, msg=name)
    looking = [name for name in gradients if name.startswith(("attention.keys", "attention.query", "attention.score"))]
    assert all(gradients[name].abs().max() > 0.05 for name in looking)


def test_the_baseline_follows_the_losses_and_the_entropy_is_that_of_the_looks():
    torch.manual_seed(0)
    decoder = Decoder(6, 6, 5, 4, 8, dropout=0.0, cell="lstm", attention="hard").train()
    batch = collate([(0, torch.randn(3, 6), [[START, 4, 5, END], [START, END]])])
    outputs = decoder(batch.images, batch.words, batch.lengths)
    losses = torch.tensor([1.0, 2.0, 3.0, 5.0])  # word by word, the captions' first words first
    loss = hard_attention_loss(outputs, batch.lengths, losses, reward_weight=0.0, entropy_weight=1.0)
    looks = torch.cat([outputs.weights[:, 0, 0], outputs.weights[:1, 0, 1]])
    torch.testing.assert_close(loss, (looks * looks.log()).sum())
    choices = outputs.choices[:, 0]
    first = hard_attention_loss(outputs, batch.lengths, losses, reward_weight=1.0, entropy_weight=0.0)
    mean = 11 / 4  # captions of 1, 3 and 5, and of 2
    after = (9 - 3 * mean) * choices[0, 0] + (8 - 2 * mean) * choices[1, 0] + (5 - mean) * choices[2, 0]
    torch.testing.assert_close(first, after + (2 - mean) * choices[0, 1])
    for loss, average in ((5.0, 5.0), (3.0, 4.8)):
        follow(outputs.baseline, loss)
        assert decoder.attention.baseline.item() == pytest.approx(average)
    second = hard_attention_loss(outputs, batch.lengths, losses, reward_weight=1.0, entropy_weight=0.0)
    after = (9 - 3 * 4.8) * choices[0, 0] + (8 - 2 * 4.8) * choices[1, 0] + (5 - 4.8) * choices[2, 0]
    torch.testing.assert_close(second, after + (2 - 4.8) * choices[0, 1])
