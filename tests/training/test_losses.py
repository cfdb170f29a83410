"""Losses against torch's and against single captions, the learning rate, the average of the weights."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

import train
from conftest import SMALL, build, samples
from datasets import Example, collate
from decoding.sampling import sample
from models import DECODERS
from modules.decoders import DecoderOutput
from modules.regions import grid_boxes
from text.vocabulary import END, START
from training.losses import TEMPERATURE, captioning_loss, grounding_loss, self_critical_loss
from training.optim import ModelEMA, learning_rate_factor


def test_the_loss_of_a_ragged_batch_is_that_of_its_captions_alone(tiny_decoder):
    captions = [[[1, 4, 5, 2], [1, 6, 2]], [[1, 5, 5, 5, 2]]]  # the second image has one caption only
    regions = torch.rand(2, 4, 6)
    batch = collate([Example(i, regions[i], captions[i]) for i in range(2)])
    outputs = tiny_decoder(batch.inputs, batch.words, batch.lengths)
    settings = replace(SMALL, doubly_stochastic=0.7, label_smoothing=0.0)
    loss, cross_entropy = captioning_loss(outputs, batch.lengths, settings, *batch.counts())
    log_probability, words, terms = 0.0, 0, []
    for image, caption in ((0, captions[0][0]), (0, captions[0][1]), (1, captions[1][0])):
        tensors = (regions[image : image + 1], torch.tensor([[caption]]), torch.tensor([[len(caption) - 1]]))
        logits, targets, weights, *_ = tiny_decoder(*tensors)
        log_probability += logits.log_softmax(1).gather(1, targets.unsqueeze(1)).sum()
        words += len(targets)
        terms.append((1 - weights[:, 0, 0].sum(0)).square().mean())
    torch.testing.assert_close(cross_entropy, -log_probability)
    torch.testing.assert_close(loss, cross_entropy / words + 0.7 * torch.stack(terms).mean())


def test_masked_regions_do_not_count_in_the_loss(tiny_decoder):
    batch = collate([Example(i, torch.rand(4, 6), [[1, 4, 5, 2], [1, 6, 2]][: i + 1]) for i in range(2)])
    settings = replace(SMALL, doubly_stochastic=0.7, label_smoothing=0.1)
    mask = torch.tensor([[True] * 4 + [False] * 3] * 2)
    longer = torch.cat([batch.inputs, torch.randn(2, 3, 6)], dim=1)
    losses = []
    for regions, m in ((batch.inputs, None), (longer, mask)):
        output = tiny_decoder(regions, batch.words, batch.lengths, mask=m)._replace(mask=m)
        losses.append(captioning_loss(output, batch.lengths, settings, *batch.counts())[0])
    torch.testing.assert_close(*losses)


def test_grounding_is_the_attention_outside_of_what_a_word_names():
    alpha = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]]).view(3, 1, 1, 4)
    boxes = torch.tensor([[[0.0, 0, 1, 0.5], [0, 0, 0.5, 1], [0.9, 0.9, 1, 1]]])  # upper row, left column, a dot
    named = torch.tensor([[False, True, False], [True, True, False], [False, False, True]]).view(1, 1, 3, 3)
    output = DecoderOutput(torch.zeros(3, 5), torch.zeros(3), alpha, boxes=grid_boxes(2).unsqueeze(0))
    expected = -(math.log(0.1 + 0.3) + math.log(0.75))  # of the dot no region is inside
    assert grounding_loss(output, boxes, named).item() == pytest.approx(expected)
    output = output._replace(alpha=torch.tensor([0.0, 1, 0, 1]).view(1, 1, 1, 4))
    assert grounding_loss(output, boxes, named).item() == pytest.approx(-math.log(1e-6))  # finite


def test_the_learning_rate_rises_and_falls():
    cosine = train.Settings(epochs=10, warmup_ratio=0.2)  # of 100 steps
    factors = [learning_rate_factor(cosine, step, 10) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 20, rel=1e-2) and factors.index(max(factors)) == 19
    assert factors[50] == pytest.approx(0.5) and 0 < factors[99] < 0.001
    falling = replace(cosine, warmup_ratio=0.0, lr_schedule="step", learning_rate_decay=0.5)
    assert [learning_rate_factor(falling, step, 10) for step in (0, 9, 10, 35)] == [1, 1, 0.5, 0.125]


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_default_warmup_is_that_of_the_decoder(decoder):
    settings = train.Settings(epochs=10, decoder=decoder)
    factors = [learning_rate_factor(settings, step, 100) for step in range(1000)]  # of 1,000 steps
    assert factors.index(max(factors)) + 1 == 1000 * DECODERS[decoder].WARMUP_RATIO


def test_label_smoothing_is_that_of_torch():
    logits, targets = torch.randn(6, 9), torch.randint(9, (6,))
    weights, lengths = torch.rand(4, 1, 2, 3), torch.tensor([[4, 2]])
    settings = replace(SMALL, doubly_stochastic=0.0, label_smoothing=0.3)
    loss, cross_entropy = captioning_loss(DecoderOutput(logits, targets, weights), lengths, settings, 6, 2)
    torch.testing.assert_close(loss, functional.cross_entropy(logits, targets, label_smoothing=0.3))
    torch.testing.assert_close(cross_entropy, functional.cross_entropy(logits, targets, reduction="sum"))


@pytest.mark.parametrize("fine_tune", [True, False])
def test_the_average_follows_the_weights_and_leaves_a_frozen_encoder_alone(fine_tune):
    captioner = build(SMALL, 7, 32)
    captioner.encoder.requires_grad_(fine_tune)
    average = ModelEMA(captioner, 0.5)
    assert (average.captioner.encoder is captioner.encoder) != fine_tune
    bias, start = captioner.decoder.attention.gate.bias, captioner.decoder.attention.gate.bias.item()
    for step, following in enumerate((start + 1, start + 2)):
        bias.data.fill_(following)
        average.update(step)  # keeps 1/10 of the old at the first step, 2/11 at the second
    expected = 2 / 11 * (0.1 * start + 0.9 * (start + 1)) + 9 / 11 * (start + 2)
    assert average.captioner.decoder.attention.gate.bias.item() == pytest.approx(expected)


def test_the_self_critical_gradient_is_that_of_the_expected_reward(tiny_decoder):
    torch.manual_seed(0)
    tiny_decoder.output.weight.data /= 4  # captions of all kinds
    regions, words = torch.rand(1, 4, 6), (END, 4, 5, 6)
    captions = [(END,), *((first, second) for first in words[1:] for second in words)]  # all of at most two words
    worth = {caption: float(5 * caption.count(5) - 9 * caption.count(4)) for caption in captions}

    def forced(captions):
        batch = collate([Example(0, regions[0], [[START, *caption] for caption in captions])])
        return batch, tiny_decoder(batch.inputs, batch.words, batch.lengths)

    loss = 0.0
    for caption in captions:
        _, (logits, targets, *_) = forced([caption])
        log_probabilities = (logits[:, list(words)] / TEMPERATURE).log_softmax(1)
        probability = sum(log_probabilities[t, words.index(word)] for t, word in enumerate(targets)).exp()
        loss = loss - probability * worth[caption]
    loss.backward()
    exact = tiny_decoder.output.bias.grad.clone()
    tiny_decoder.zero_grad()

    drawn = sample(tiny_decoder, regions, samples(20_000, 2, temperature=TEMPERATURE))[0].tolist()
    batch, outputs = forced([caption[:1] if caption[0] == END else caption for caption in drawn])
    rows = zip(batch.words[0].tolist(), batch.lengths[0].tolist(), strict=True)
    rewards = torch.tensor([[worth[tuple(row[1 : n + 1])] for row, n in rows]])
    self_critical_loss(outputs, batch.lengths, rewards, len(drawn)).backward()
    assert exact.abs().max() > 1
    torch.testing.assert_close(tiny_decoder.output.bias.grad, exact, atol=0.1, rtol=0)


def test_the_baseline_of_a_caption_is_the_mean_reward_of_the_others(tiny_decoder):
    captions = [[START, 4, END], [START, 5, END], [START, 6, END]]
    batch = collate([Example(0, torch.rand(4, 6), captions)])
    rewards = torch.tensor([[1.0, 2.0, 6.0]])
    output = tiny_decoder(batch.inputs, batch.words, batch.lengths)
    loss = self_critical_loss(output, batch.lengths, rewards, words=6)
    logits = output.logits / TEMPERATURE
    logits[:, [0, 1, 3]] = -torch.inf
    losses = torch.nn.functional.cross_entropy(logits, output.targets, reduction="none").view(2, 3).sum(0)
    advantages = torch.tensor([1 - 4.0, 2 - 3.5, 6 - 1.5])
    torch.testing.assert_close(loss, (advantages * losses).sum() / 6)
