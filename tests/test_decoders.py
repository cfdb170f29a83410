"""The decoder and its layers against plain computations: one caption, one word at a time."""

import itertools

import pytest
import torch
from torch.nn import functional

from conftest import step_by_step
from datasets import collate
from layers import Dropout
from vocabulary import END, START


def random_batch(captions, seed=0):
    """A Batch of random regions (B, 4, 6) with the captions given for each image."""
    generator = torch.Generator().manual_seed(seed)
    return collate([(i, torch.rand(4, 6, generator=generator), one) for i, one in enumerate(captions)])


CAPTIONS = [
    [[START, 4, 5, 6, 4, END], [START, 6, END]],
    [[START, 5, END], [START, 4, 4, END], [START, 5, 5, 5, END]],
    [[START, END]],
]


def test_teacher_forcing_equals_stepping_word_by_word(tiny_decoder):
    batch = random_batch(CAPTIONS)
    logits, targets, weights, *_ = tiny_decoder(batch.images, batch.words, batch.lengths)
    found = logits.log_softmax(1).gather(1, targets.unsqueeze(1)).sum().item()
    expected = 0.0
    for b, c in itertools.product(range(3), range(3)):
        length = int(batch.lengths[b, c])
        if length:
            total, looks = step_by_step(
                tiny_decoder, batch.images[b : b + 1], batch.words[b, c, 1 : length + 1].tolist()
            )
            expected += total
            torch.testing.assert_close(weights[:length, b, c], looks)
        assert weights[length:, b, c].abs().sum() == 0
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(targets) == sum(len(caption) - 1 for one in CAPTIONS for caption in one)


def test_padding_never_leaks_into_the_loss(tiny_decoder):
    batch = random_batch(CAPTIONS)
    logits, targets, weights, *_ = tiny_decoder(batch.images, batch.words, batch.lengths)
    real = torch.arange(batch.words.shape[2]) <= batch.lengths.unsqueeze(2)
    garbage = torch.where(real, batch.words, torch.full_like(batch.words, 6))
    again = tiny_decoder(batch.images, garbage, batch.lengths)
    for before, after in zip((logits, targets, weights), again[:3], strict=True):
        assert torch.equal(before, after)


def test_an_image_counts_the_same_alone_and_in_a_batch(tiny_decoder):
    batch = random_batch(CAPTIONS)
    together = tiny_decoder(batch.images, batch.words, batch.lengths)[0].log_softmax(1)
    alone = [
        tiny_decoder(*(part[b : b + 1] for part in (batch.images, batch.words, batch.lengths)))[0].log_softmax(1)
        for b in range(3)
    ]
    torch.testing.assert_close(together.sum(0), torch.cat(alone).sum(0))


def test_every_parameter_gets_a_gradient(tiny_decoder):
    batch = random_batch(CAPTIONS)
    logits, targets, weights, *_ = tiny_decoder.train()(batch.images, batch.words, batch.lengths)
    (torch.nn.functional.cross_entropy(logits, targets) + weights.square().mean()).backward()
    for name, parameter in tiny_decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_the_gradient_equals_that_of_stepping_word_by_word(tiny_decoder):
    batch = random_batch(CAPTIONS)
    logits, targets, *_ = tiny_decoder(batch.images, batch.words, batch.lengths)
    functional.cross_entropy(logits, targets, reduction="sum").backward()
    gathered = {name: parameter.grad.clone() for name, parameter in tiny_decoder.named_parameters()}
    tiny_decoder.zero_grad()
    for b, c in itertools.product(range(3), range(3)):  # one caption at a time, a word at a time: autograd alone
        regions, length = batch.images[b : b + 1], int(batch.lengths[b, c])
        keys, state = tiny_decoder.keys(regions), tiny_decoder.first_state(regions)
        losses = []
        for previous, following in itertools.pairwise(batch.words[b, c, : length + 1]):
            logits, _, state = tiny_decoder.step(previous.view(1, 1), regions, keys, state)
            losses.append(functional.cross_entropy(logits[0], following.view(1)))
        if losses:
            sum(losses).backward()
    for name, parameter in tiny_decoder.named_parameters():
        torch.testing.assert_close(gathered[name], parameter.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_scheduled_sampling_follows_the_models_own_words(tiny_decoder):
    captions = [[START, 4, 5, 6, 4, 5, END], [START, 6, 4, 5, END], [START, 5, END]]
    batch = random_batch([captions[:2], captions[2:]])
    drawn = []

    def draw(*arguments, original=tiny_decoder._draw):
        drawn.append(original(*arguments).fill_(6))  # always the same word
        return drawn[-1]

    tiny_decoder._draw = draw
    logits, targets, *_ = tiny_decoder(batch.images, batch.words, batch.lengths, sampling=1.0)
    assert len(drawn) == 5 and torch.equal(targets, tiny_decoder(batch.images, batch.words, batch.lengths)[1])
    follow = batch.words.clone()
    follow[:, :, 1:] = 6
    expected = tiny_decoder(batch.images, follow, batch.lengths)[0]
    torch.testing.assert_close(logits, expected)
    true = tiny_decoder(batch.images, batch.words, batch.lengths)[0]
    assert (tiny_decoder(batch.images, batch.words, batch.lengths, sampling=0.5)[0] - true).abs().max() > 0.1


def test_words_are_drawn_as_probable_as_they_are(tiny_decoder):
    torch.manual_seed(0)
    arguments = torch.randn(1, 5), torch.randn(1, 8), torch.randn(1, 6)
    logits = tiny_decoder._logits(*arguments)
    logits[:, [0, START]] = -torch.inf  # which never follow
    expected = logits.softmax(-1)[0]
    drawn = tiny_decoder._draw(*(one.expand(20_000, -1) for one in arguments))
    torch.testing.assert_close(torch.bincount(drawn, minlength=7) / 20_000, expected, atol=0.015, rtol=0)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_dropout_drops_a_share_and_keeps_the_mean(share):
    torch.manual_seed(0)
    dropout, x = Dropout(share), torch.ones(200, 500, requires_grad=True)
    found = dropout(x)
    assert (found == 0).float().mean().item() == pytest.approx(share, abs=0.01)
    torch.testing.assert_close(found, (found > 0) / (1 - share))
    found.sum().backward()
    assert torch.equal(x.grad, found) and torch.equal(dropout.eval()(x), x)
