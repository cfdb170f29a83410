"""Each attention against its formula, and hard attention's gradient estimate against the exact gradient."""

import itertools
import math

import pytest
import torch
from torch.nn import functional

from datasets import Example, collate
from models import ModelSettings
from modules.attention import ATTENTIONS, HardAttention
from modules.show_attend_tell import ShowAttendTell
from text.vocabulary import END, START
from training.losses import hard_attention_loss

DIMS = {"region_dim": 6, "hidden_dim": 8, "attention_dim": 5}


def hard_decoder():
    """A decoder with hard attention in training mode, without dropout."""
    sizes = {"embed_dim": 5, "attention_dim": 4, "hidden_dim": 8, "dropout": 0.0}
    return ShowAttendTell(ModelSettings(attention="hard", **sizes), vocab_size=6, region_dim=6).train()


@pytest.mark.parametrize("name", ["soft", "dot", "hard"])
def test_attention_is_a_gated_mean_of_the_regions(name):
    torch.manual_seed(0)
    attention = ATTENTIONS[name](**DIMS).eval()
    regions, hidden = torch.randn(2, 4, 6), torch.randn(2, 3, 8)
    context, alpha, gate, log_probs = attention(regions, attention.keys(regions), hidden)
    keys, query = attention.keys(regions), attention.query(hidden)
    if name == "dot":
        scores = torch.einsum("bra,bca->bcr", keys, query) / math.sqrt(keys.shape[-1])
    else:
        scores = attention.score((keys.unsqueeze(1) + query.unsqueeze(2)).tanh()).squeeze(-1)
    torch.testing.assert_close(alpha, scores.softmax(-1))
    torch.testing.assert_close(gate, attention.gate(hidden).sigmoid().squeeze(-1))
    torch.testing.assert_close(context, gate.unsqueeze(-1) * torch.einsum("bcr,brd->bcd", alpha, regions))
    assert log_probs is None


def test_soft_attention_in_bfloat16_is_that_in_float32():
    torch.manual_seed(0)
    attention = ATTENTIONS["soft"](**DIMS).eval()
    attention.score.weight.data *= 4  # far from uniform
    regions, hidden = torch.randn(2, 4, 6), torch.randn(2, 3, 8)
    expected = attention(regions, attention.keys(regions), hidden).alpha
    with torch.autocast("cpu", torch.bfloat16):
        alpha = attention(regions, attention.keys(regions), hidden).alpha
    assert alpha.dtype == torch.float32
    torch.testing.assert_close(alpha, expected, atol=0.02, rtol=0)


def test_no_attention_has_an_empty_context_and_uniform_alpha():
    attention = ATTENTIONS["none"](**DIMS)
    regions, hidden = torch.randn(2, 4, 6), torch.randn(2, 3, 8)
    context, alpha, gate, _ = attention(regions, attention.keys(regions), hidden)
    assert context.shape == (2, 3, 0) and torch.equal(alpha, torch.full((2, 3, 4), 0.25)) and gate is None
    assert not list(attention.parameters())


def test_hard_attention_samples_one_region_in_half_of_the_steps():
    torch.manual_seed(0)
    attention = HardAttention(**DIMS)
    attention.gate.weight.data.zero_()
    attention.gate.bias.data.fill_(100)  # an open gate
    regions, hidden = torch.randn(1, 4, 6), torch.randn(1, 1, 8).expand(1, 8000, 8)
    context, alpha, _, sampled_log_probs = attention(regions, attention.keys(regions), hidden)
    is_region = torch.isclose(context.unsqueeze(2), regions.unsqueeze(1), atol=1e-4).all(-1)  # (1, 8000, 4)
    sampled = is_region.any(-1)
    assert sampled.float().mean().item() == pytest.approx(0.5, abs=0.03)
    torch.testing.assert_close(is_region[sampled].float().mean(0), alpha[0, 0], atol=0.03, rtol=0)
    torch.testing.assert_close(context[~sampled], (alpha @ regions)[~sampled], atol=1e-4, rtol=0)
    log_probs = (alpha * is_region).sum(-1).clamp_min(1e-9).log()
    torch.testing.assert_close(sampled_log_probs, log_probs.where(sampled, 0))


def exact_gradients(decoder, monkeypatch, regions, caption):
    """Gradients of the expected loss of a caption of two words: a sum over all 3 x 3 pairs of sampled regions."""
    expected_loss = 0.0
    for pair in itertools.product(range(3), repeat=2):
        samples = iter(pair)
        probabilities = []

        def mix(alpha, samples=samples, probabilities=probabilities):
            one_hot = functional.one_hot(torch.tensor(next(samples)), 3).float().view(1, 1, 3)
            probabilities.append((alpha * one_hot).sum())
            return one_hot, None

        with monkeypatch.context() as patch:
            patch.setattr(decoder.attention, "mix", mix)
            outputs = decoder(regions, torch.tensor([[caption]]), torch.tensor([[2]]))
        loss = functional.cross_entropy(outputs.logits, outputs.targets, reduction="sum")
        expected_loss = expected_loss + probabilities[0] * probabilities[1] * loss
    decoder.zero_grad()
    expected_loss.backward()
    return {name: parameter.grad.clone() for name, parameter in decoder.named_parameters()}


def test_the_gradient_of_hard_attention_is_that_of_the_expected_loss(monkeypatch):
    """20,000 samples of a caption of two words with three regions against the sum over all pairs of regions."""
    monkeypatch.setattr(HardAttention, "SOFT_PROB", 0.0)
    torch.manual_seed(3)
    decoder = hard_decoder()
    for parameter in decoder.parameters():
        parameter.data *= 4
    regions, caption, count = torch.randn(1, 3, 6), [START, 4, END], 20_000
    gradients = exact_gradients(decoder, monkeypatch, regions, caption)
    decoder.zero_grad()
    batch = collate([Example(0, regions[0], [caption] * count)])
    outputs = decoder(regions, batch.words, batch.lengths)
    losses = functional.cross_entropy(outputs.logits, outputs.targets, reduction="none")
    reinforce = hard_attention_loss(outputs, batch.lengths, losses.detach(), reward_weight=1.0, entropy_weight=0.0)
    ((losses.sum() + reinforce) / count).backward()
    for name, parameter in decoder.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=0.006, rtol=0, msg=name)
        if name.startswith(("attention.keys", "attention.query", "attention.score")):
            assert gradients[name].abs().max() > 0.05


@pytest.fixture
def two_captions():
    """A decoder with hard attention, its outputs for captions of 3 and 1 words, their lengths and the words' losses."""
    torch.manual_seed(0)
    decoder = hard_decoder()
    batch = collate([Example(0, torch.randn(3, 6), [[START, 4, 5, END], [START, END]])])
    losses = torch.tensor([1.0, 2.0, 3.0, 5.0])  # step by step: 1, 3 and 5 of the first caption, 2 of the second
    return decoder, decoder(batch.inputs, batch.words, batch.lengths), batch.lengths, losses


def test_the_entropy_term_is_the_entropy_of_alpha(two_captions):
    _, outputs, lengths, losses = two_captions
    loss = hard_attention_loss(outputs, lengths, losses, reward_weight=0.0, entropy_weight=1.0)
    alpha = torch.cat([outputs.alpha[:, 0, 0], outputs.alpha[:1, 0, 1]])
    torch.testing.assert_close(loss, (alpha * alpha.log()).sum())


@pytest.mark.parametrize("average", [None, 4.8])
def test_the_baseline_is_the_mean_loss_at_the_first_step_and_its_moving_average_later(two_captions, average):
    decoder, outputs, lengths, losses = two_captions
    if average:
        decoder.update_baseline(average)
    baseline = average or 11 / 4
    loss = hard_attention_loss(outputs, lengths, losses, reward_weight=1.0, entropy_weight=0.0)
    # Each sample's log-probability times the losses from its word on, minus the baseline for each of these words.
    first, second = outputs.sampled_log_probs[:, 0].unbind(dim=1)
    expected = (9 - 3 * baseline) * first[0] + (8 - 2 * baseline) * first[1] + (5 - baseline) * first[2]
    torch.testing.assert_close(loss, expected + (2 - baseline) * second[0])


def test_the_baseline_is_a_moving_average_that_starts_at_the_first_loss(two_captions):
    decoder, outputs, *_ = two_captions
    for loss, average in ((5.0, 5.0), (3.0, 4.8), (4.8, 4.8)):
        decoder.update_baseline(loss)
        assert decoder.attention.baseline.item() == pytest.approx(average)
    assert outputs.baseline is decoder.attention.baseline
