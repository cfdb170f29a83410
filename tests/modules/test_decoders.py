"""Decoders against plain computations of one caption, one word at a time; dropout against its definition."""

import itertools

import pytest
import torch
from decoding.force_decode import force_decode
from torch.nn import functional

from conftest import beams, check_teacher_forcing, make_tiny_decoder, random_batch, samples
from decoding.beam_search import beam_search
from decoding.sampling import sample
from modules.adaptive import AdaptiveDecoder
from modules.layers import Dropout
from modules.sgrvinod import SgrvinodDecoder
from modules.show_attend_tell import ShowAttendTell
from modules.transformer import TransformerDecoder
from modules.up_down import UpDownDecoder
from text.vocabulary import END, START

DECODERS = {
    "soft-lstm": (ShowAttendTell, {}),
    "up_down": (UpDownDecoder, {}),
    "adaptive": (AdaptiveDecoder, {}),
    "adaptive-image_first-layers2": (
        AdaptiveDecoder,
        {"image_first": True, "layers": 2},
    ),
    "image_first": (ShowAttendTell, {"image_first": True}),
    "layers2-gru": (ShowAttendTell, {"cell": "gru", "layers": 2}),
}


@pytest.fixture(params=DECODERS)
def tiny_decoder(request):
    """A random decoder of each kind."""
    decoder_class, settings = DECODERS[request.param]
    return make_tiny_decoder(decoder_class, **settings)


CAPTIONS = [
    [[START, 4, 5, 6, 4, END], [START, 6, END]],
    [[START, 5, END], [START, 4, 4, END], [START, 5, 5, 5, END]],
    [[START, END]],
]


def test_teacher_forcing_equals_stepping_word_by_word(tiny_decoder):
    targets = check_teacher_forcing(tiny_decoder, random_batch(CAPTIONS))
    assert len(targets) == sum(len(caption) - 1 for captions in CAPTIONS for caption in captions)


def test_padding_never_leaks_into_the_outputs(tiny_decoder):
    batch = random_batch(CAPTIONS)
    outputs = tiny_decoder(batch.inputs, batch.words, batch.lengths)
    mask = torch.arange(batch.words.shape[2]) <= batch.lengths.unsqueeze(2)
    garbage = torch.where(mask, batch.words, torch.full_like(batch.words, 6))
    with_garbage = tiny_decoder(batch.inputs, garbage, batch.lengths)
    for before, after in zip(outputs[:3], with_garbage[:3], strict=True):
        assert torch.equal(before, after)


MASKED = DECODERS | {
    "none": (ShowAttendTell, {"attention": "none"}),
    "dot": (ShowAttendTell, {"attention": "dot"}),
    "hard": (ShowAttendTell, {"attention": "hard"}),
    "sgrvinod": (SgrvinodDecoder, {}),
    "transformer": (TransformerDecoder, {"heads": 2, "ffn_dim": 12, "decoder_layers": 2}),
}


@pytest.mark.parametrize("kind", MASKED)
@pytest.mark.parametrize("training", [False, True])
def test_a_masked_region_does_not_exist(kind, training):
    """With two regions more, masked and full of garbage, everything is as without them, gradients included."""
    decoder_class, settings = MASKED[kind]
    decoder = make_tiny_decoder(decoder_class, **settings).train(training)
    for module in decoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    decoder.take_expectation()  # of hard attention, whose samples are random
    batch = random_batch(CAPTIONS)
    mask = torch.tensor([[True] * 4 + [False] * 2]).expand(3, -1)
    longer = torch.cat([batch.inputs, torch.full((3, 2, 6), 1e3)], dim=1).requires_grad_()
    results = []
    for regions, m in ((batch.inputs.clone().requires_grad_(), None), (longer, mask)):
        logits, targets, alpha, *_ = decoder(regions, batch.words, batch.lengths, mask=m)
        (functional.cross_entropy(logits, targets) + alpha.square().sum()).backward()
        decoder.zero_grad()
        results.append((logits, alpha, regions.grad))
    (logits, alpha, gradient), (masked_logits, masked_alpha, masked_gradient) = results
    torch.testing.assert_close(masked_logits, logits)
    torch.testing.assert_close(masked_alpha[..., :4], alpha)
    assert (masked_alpha[..., 4:] == 0).all() and (masked_gradient[:, 4:] == 0).all()
    torch.testing.assert_close(masked_gradient[:, :4], gradient)
    if not training:
        search, sampling = beams(3, 8), samples(3, 8)
        searched, found = (beam_search(decoder, r, search, m) for r, m in ((batch.inputs, None), (longer, mask)))
        assert torch.equal(found[0], searched[0])
        torch.testing.assert_close(found[1], searched[1])
        drawn = [
            sample(decoder, r, sampling, torch.Generator().manual_seed(1), m)
            for r, m in ((batch.inputs, None), (longer, mask))
        ]
        assert torch.equal(*drawn)
        forced = force_decode(decoder, longer, found[0], mask)
        torch.testing.assert_close(forced[0], found[1])
        assert (forced[1][..., 4:] == 0).all()


def test_an_image_has_the_same_predictions_alone_and_in_a_batch(tiny_decoder):
    batch = random_batch(CAPTIONS)
    together = tiny_decoder(batch.inputs, batch.words, batch.lengths)[0].log_softmax(1)
    alone = [
        tiny_decoder(*(part[b : b + 1] for part in (batch.inputs, batch.words, batch.lengths)))[0].log_softmax(1)
        for b in range(3)
    ]
    torch.testing.assert_close(together.sum(0), torch.cat(alone).sum(0))


def test_every_parameter_gets_a_gradient(tiny_decoder):
    batch = random_batch(CAPTIONS)
    logits, targets, alpha, *_ = tiny_decoder.train()(batch.inputs, batch.words, batch.lengths)
    (functional.cross_entropy(logits, targets) + alpha.square().mean()).backward()
    for name, parameter in tiny_decoder.named_parameters():
        if parameter.numel():  # a context of width 0 has empty weights
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_scheduled_sampling_in_bfloat16_loses_no_gradient(tiny_decoder):
    # Words are sampled without gradient: the weights that autocast casts then must not be those of the loss.
    batch = random_batch(CAPTIONS)
    with torch.autocast("cpu", torch.bfloat16):
        logits, targets, *_ = tiny_decoder(batch.inputs, batch.words, batch.lengths, sampling_prob=0.5)
    functional.cross_entropy(logits.float(), targets).backward()
    for name, param in tiny_decoder.named_parameters():
        if param.numel():
            assert param.grad is not None and param.grad.any(), name


def test_the_gradient_equals_that_of_stepping_word_by_word(tiny_decoder):
    batch = random_batch(CAPTIONS)
    logits, targets, *_ = tiny_decoder(batch.inputs, batch.words, batch.lengths)
    functional.cross_entropy(logits, targets, reduction="sum").backward()
    gradients = {name: parameter.grad.clone() for name, parameter in tiny_decoder.named_parameters()}
    tiny_decoder.zero_grad()
    for b, c in itertools.product(range(3), range(3)):
        regions, length = batch.inputs[b : b + 1], int(batch.lengths[b, c])
        keys, state = tiny_decoder.keys(regions), tiny_decoder.init_state(regions)
        losses = []
        for previous, target in itertools.pairwise(batch.words[b, c, : length + 1]):
            logits, _, state = tiny_decoder.step(previous.view(1, 1), regions, keys, state)
            losses.append(functional.cross_entropy(logits[0], target.view(1)))
        if losses:
            sum(losses).backward()
    for name, parameter in tiny_decoder.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-4, rtol=1e-4, msg=name)


@pytest.fixture
def ragged_batch():
    """Two captions of the first image and a third, short one of the second."""
    captions = [[START, 4, 5, 6, 4, 5, END], [START, 6, 4, 5, END], [START, 5, END]]
    return random_batch([captions[:2], captions[2:]])


def test_scheduled_sampling_feeds_back_the_sampled_words(tiny_decoder, ragged_batch):
    inputs, words, lengths = ragged_batch.inputs, ragged_batch.words, ragged_batch.lengths
    samples = []

    def always_word_6(*arguments, original=tiny_decoder._sample_words):
        samples.append(original(*arguments).fill_(6))
        return samples[-1]

    tiny_decoder._sample_words = always_word_6
    logits, targets, *_ = tiny_decoder(inputs, words, lengths, sampling_prob=1.0)
    assert len(samples) == 5 and torch.equal(targets, tiny_decoder(inputs, words, lengths)[1])
    fed_back = words.clone()
    fed_back[:, :, 1:] = 6
    torch.testing.assert_close(logits, tiny_decoder(inputs, fed_back, lengths)[0])


def test_scheduled_sampling_changes_the_logits(tiny_decoder, ragged_batch):
    inputs, words, lengths = ragged_batch.inputs, ragged_batch.words, ragged_batch.lengths
    tiny_decoder._sample_words = lambda *_, original=tiny_decoder._sample_words: original(*_).fill_(6)
    teacher_forced = tiny_decoder(inputs, words, lengths)[0]
    sampled = tiny_decoder(inputs, words, lengths, sampling_prob=0.5)[0]
    assert (sampled - teacher_forced).abs().max() > 0.1


def test_input_words_are_sampled_from_the_softmax(tiny_decoder):
    torch.manual_seed(0)
    arguments = torch.randn(1, 5), torch.randn(1, 8), torch.randn(1, 6)
    logits = tiny_decoder._logits(*arguments)
    logits[:, [0, START]] = -torch.inf  # which never follow a word
    expected = logits.softmax(-1)[0]
    sampled = tiny_decoder._sample_words(*(each.expand(20_000, -1) for each in arguments))
    torch.testing.assert_close(torch.bincount(sampled, minlength=7) / 20_000, expected, atol=0.015, rtol=0)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_dropout_zeroes_a_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    dropout, x = Dropout(p), torch.ones(200, 500, requires_grad=True)
    dropped = dropout(x)
    assert (dropped == 0).float().mean().item() == pytest.approx(p, abs=0.01)
    torch.testing.assert_close(dropped, (dropped > 0) / (1 - p))
    dropped.sum().backward()
    assert torch.equal(x.grad, dropped)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_dropout_is_the_identity_in_eval_mode(p):
    x = torch.ones(200, 500)
    assert torch.equal(Dropout(p).eval()(x), x)
