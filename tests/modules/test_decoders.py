"""Every decoder against plain computations of one caption, one word at a time."""

import itertools

import pytest
import torch
from torch.nn import functional

from conftest import beams, check_teacher_forcing, make_tiny_decoder, random_batch, samples
from decoding.beam_search import beam_search
from decoding.sampling import force_decode, sample
from modules.adaptive import AdaptiveDecoder
from modules.sgrvinod import SgrvinodDecoder
from modules.show_attend_tell import ShowAttendTell
from modules.transformer import TransformerDecoder
from modules.up_down import UpDownDecoder
from text.vocabulary import END, START

DECODERS = {
    "soft-lstm": (ShowAttendTell, {}),
    "up_down": (UpDownDecoder, {}),
    "adaptive": (AdaptiveDecoder, {}),
    "adaptive-image_first-layers2": (AdaptiveDecoder, {"image_first": True, "layers": 2}),
    "image_first": (ShowAttendTell, {"image_first": True}),
    "layers2-gru": (ShowAttendTell, {"cell": "gru", "layers": 2}),
    "sgrvinod": (SgrvinodDecoder, {}),
    "transformer": (TransformerDecoder, {"heads": 2, "ffn_dim": 12, "decoder_layers": 2, "scale": 2}),
}
MASKED = DECODERS | {name: (ShowAttendTell, {"attention": name}) for name in ("none", "dot", "hard")}
CAPTIONS = [
    [[START, 4, 5, 6, 4, END], [START, 6, END]],
    [[START, 5, END], [START, 4, 4, END], [START, 5, 5, 5, END]],
    [[START, END]],
]


@pytest.fixture(params=DECODERS)
def tiny_decoder(request):
    """A random decoder of each kind."""
    decoder_class, settings = DECODERS[request.param]
    return make_tiny_decoder(decoder_class, **settings)


@pytest.fixture
def batch():
    """Random regions (B, 4, 6) with CAPTIONS."""
    return random_batch(CAPTIONS)


def test_teacher_forcing_equals_stepping_word_by_word(tiny_decoder, batch):
    targets = check_teacher_forcing(tiny_decoder, batch)
    assert len(targets) == sum(len(caption) - 1 for captions in CAPTIONS for caption in captions)


def test_padding_never_leaks_into_the_outputs(tiny_decoder, batch):
    outputs = tiny_decoder(batch.inputs, batch.words, batch.lengths)
    mask = torch.arange(batch.words.shape[2]) <= batch.lengths.unsqueeze(2)
    garbage = torch.where(mask, batch.words, torch.full_like(batch.words, 6))
    with_garbage = tiny_decoder(batch.inputs, garbage, batch.lengths)
    for before, after in zip(outputs[:3], with_garbage[:3], strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("kind", MASKED)
@pytest.mark.parametrize("training", [False, True])
def test_a_masked_region_does_not_exist(kind, training, batch):
    """With two regions more, masked and full of garbage, everything is as without them, gradients included."""
    decoder_class, settings = MASKED[kind]
    decoder = make_tiny_decoder(decoder_class, dropout=0.0, **settings).train(training)
    decoder.take_expectation()  # of hard attention, whose samples are random
    mask = torch.tensor([[True] * 4 + [False] * 2]).expand(3, -1)
    longer = torch.cat([batch.inputs, torch.full((3, 2, 6), 1e3)], dim=1).requires_grad_()
    results = []
    for regions, m in ((batch.inputs.clone().requires_grad_(), None), (longer, mask)):
        logits, targets, alpha, *_ = decoder(regions, batch.words, batch.lengths, mask=m)
        (functional.cross_entropy(logits, targets) + alpha.square().sum()).backward()
        results.append((logits, alpha, regions.grad))
    (logits, alpha, gradient), (masked_logits, masked_alpha, masked_gradient) = results
    torch.testing.assert_close(masked_logits, logits)
    torch.testing.assert_close(masked_alpha[..., :4], alpha)
    assert (masked_alpha[..., 4:] == 0).all() and (masked_gradient[:, 4:] == 0).all()
    torch.testing.assert_close(masked_gradient[:, :4], gradient)
    if not training:
        inputs = (batch.inputs, None), (longer, mask)
        searched, found = (beam_search(decoder, r, beams(3, 8), m) for r, m in inputs)
        assert torch.equal(found[0], searched[0])
        torch.testing.assert_close(found[1], searched[1])
        drawn = [sample(decoder, r, samples(3, 8), torch.Generator().manual_seed(1), m) for r, m in inputs]
        assert torch.equal(*drawn)
        log_probs, alpha, _ = force_decode(decoder, longer, found[0], mask)
        torch.testing.assert_close(log_probs, found[1])
        assert (alpha[..., 4:] == 0).all()


def test_scheduled_sampling_in_bfloat16_loses_no_gradient(tiny_decoder, batch):
    # Words are sampled without gradient: the weights that autocast casts then must not be those of the loss.
    with torch.autocast("cpu", torch.bfloat16):
        logits, targets, *_ = tiny_decoder(batch.inputs, batch.words, batch.lengths, sampling_prob=0.5)
    functional.cross_entropy(logits.float(), targets).backward()
    for name, param in tiny_decoder.named_parameters():
        if param.numel():
            assert param.grad is not None and param.grad.any(), name


def test_the_gradient_equals_that_of_stepping_word_by_word(tiny_decoder, batch):
    logits, targets, *_ = tiny_decoder(batch.inputs, batch.words, batch.lengths)
    functional.cross_entropy(logits, targets, reduction="sum").backward()
    gradients = {name: parameter.grad.clone() for name, parameter in tiny_decoder.named_parameters()}
    tiny_decoder.zero_grad()
    for b, c in itertools.product(range(3), range(3)):
        regions, length = batch.inputs[b : b + 1], int(batch.lengths[b, c])
        keys, state = tiny_decoder.keys(regions), tiny_decoder.init_state(regions)
        losses = []
        for previous, target in itertools.pairwise(batch.words[b, c, : length + 1]):
            logits, state, *_ = tiny_decoder.step(previous.view(1, 1), regions, keys, state)
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
    sampled = []

    def always_word_6(*arguments, original=tiny_decoder._sample_words):
        sampled.append(original(*arguments).fill_(6))
        return sampled[-1]

    tiny_decoder._sample_words = always_word_6
    logits, targets, *_ = tiny_decoder(inputs, words, lengths, sampling_prob=1.0)
    teacher_forced = tiny_decoder(inputs, words, lengths)
    assert len(sampled) == (1 if isinstance(tiny_decoder, TransformerDecoder) else 5)
    assert torch.equal(targets, teacher_forced.targets)
    fed_back = words.clone()
    fed_back[:, :, 1:] = 6
    all_replaced = tiny_decoder(inputs, fed_back, lengths).logits
    torch.testing.assert_close(logits, all_replaced)
    half_replaced = tiny_decoder(inputs, words, lengths, sampling_prob=0.5).logits
    for other in (teacher_forced.logits, all_replaced):
        assert (half_replaced - other).abs().max() > 0.1


def test_input_words_are_sampled_from_the_predicted_softmax(tiny_decoder):
    torch.manual_seed(0)
    if isinstance(tiny_decoder, TransformerDecoder):
        arguments = (torch.randn(1, 8),)
        logits = tiny_decoder.output(*arguments)
    else:
        arguments = torch.randn(1, 5), torch.randn(1, 8), torch.randn(1, 6)
        logits = tiny_decoder._logits(*arguments)
    logits[:, [0, START]] = -torch.inf  # which never follow a word
    sampled = tiny_decoder._sample_words(*(each.expand(20_000, -1) for each in arguments))
    frequencies = torch.bincount(sampled, minlength=7) / 20_000
    torch.testing.assert_close(frequencies, logits.softmax(-1)[0], atol=0.015, rtol=0)
