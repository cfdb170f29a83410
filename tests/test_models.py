"""The decoder against plain computations, the search against exhaustive search, encoders and checkpoints."""

import itertools

import pytest
import torch
import torchvision
from torch.nn import functional

from datasets import END, START, collate
from models import Encoder, LSTMCell, attend, beam_search, load_captioner
from utils import InputError

REAL_WORDS = (END, 4, 5, 6)


def random_batch(captions, seed=0):
    """A Batch of random regions (B, 4, 6) with the captions given for each image."""
    generator = torch.Generator().manual_seed(seed)
    return collate([(i, torch.rand(4, 6, generator=generator), one) for i, one in enumerate(captions)])


def step_by_step(decoder, regions, caption):
    """Log-probability of a caption (numbers after <start>) of one image, and its weights, with `step` alone."""
    keys, state = decoder.keys(regions), decoder.first_state(regions)
    total, weights, previous = 0.0, [], START
    for word in caption:
        logits, look, state = decoder.step(torch.tensor([[previous]]), regions, keys, state)
        total += logits[0, 0].log_softmax(0)[word].item()
        weights.append(look[0, 0])
        previous = word
    return total, torch.stack(weights)


CAPTIONS = [
    [[START, 4, 5, 6, 4, END], [START, 6, END]],
    [[START, 5, END], [START, 4, 4, END], [START, 5, 5, 5, END]],
    [[START, END]],
]


def test_teacher_forcing_equals_stepping_word_by_word(tiny_decoder):
    batch = random_batch(CAPTIONS)
    logits, targets, weights = tiny_decoder(batch.images, batch.words, batch.lengths)
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
    logits, targets, weights = tiny_decoder(batch.images, batch.words, batch.lengths)
    real = torch.arange(batch.words.shape[2]) <= batch.lengths.unsqueeze(2)
    garbage = torch.where(real, batch.words, torch.full_like(batch.words, 6))
    again = tiny_decoder(batch.images, garbage, batch.lengths)
    for before, after in zip((logits, targets, weights), again, strict=True):
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
    logits, targets, weights = tiny_decoder.train()(batch.images, batch.words, batch.lengths)
    (torch.nn.functional.cross_entropy(logits, targets) + weights.square().mean()).backward()
    for name, parameter in tiny_decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_the_gradient_equals_that_of_stepping_word_by_word(tiny_decoder):
    batch = random_batch(CAPTIONS)
    logits, targets, _ = tiny_decoder(batch.images, batch.words, batch.lengths)
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


def test_the_cell_is_torchs():
    cell, reference = LSTMCell(5, 6, 8), torch.nn.LSTMCell(11, 8)
    reference.load_state_dict(
        {
            "weight_ih": torch.cat([cell.words.weight, cell.context.weight], dim=1),
            "weight_hh": cell.hidden.weight,
            "bias_ih": cell.words.bias,
            "bias_hh": torch.zeros(32),
        }
    )
    words, context, state = torch.randn(3, 5), torch.randn(3, 6), (torch.randn(3, 8), torch.randn(3, 8))
    expected = reference(torch.cat([words, context], dim=1), state)
    torch.testing.assert_close(cell(cell.words(words), context, state), expected)


def test_scheduled_sampling_follows_the_models_own_words(tiny_decoder):
    captions = [[START, 4, 5, 6, 4, 5, END], [START, 6, 4, 5, END], [START, 5, END]]
    batch = random_batch([captions[:2], captions[2:]])
    drawn = []

    def draw(*arguments, original=tiny_decoder._draw):
        drawn.append(original(*arguments).fill_(6))  # always the same word
        return drawn[-1]

    tiny_decoder._draw = draw
    logits, targets, _ = tiny_decoder(batch.images, batch.words, batch.lengths, sampling=1.0)
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


def test_attention_weights_sum_to_one(tiny_decoder):
    regions = torch.rand(2, 4, 6)
    context, weights = tiny_decoder.attention(regions, tiny_decoder.keys(regions), torch.rand(2, 3, 8))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3))
    torch.testing.assert_close(context, torch.einsum("bcr,brd->bcd", weights, regions))


def exhaustive_best(decoder, regions, max_length, length_penalty):
    """The best of all captions of 1 to max_length words, those that never end included and the empty one not."""
    candidates = []
    for length in range(1, max_length + 1):
        for caption in itertools.product(REAL_WORDS, repeat=length):
            if caption != (END,) and END not in caption[:-1] and (caption[-1] == END or length == max_length):
                total, _ = step_by_step(decoder, regions, caption)
                candidates.append((total / length**length_penalty, total, caption))
    return max(candidates)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_wide_beam_equals_exhaustive_search(tiny_decoder, length_penalty, seed):
    regions = torch.rand(1, 4, 6, generator=torch.Generator().manual_seed(seed))
    _, total, caption = exhaustive_best(tiny_decoder, regions, 4, length_penalty)
    captions, log_probabilities = beam_search(tiny_decoder, regions, 4**4, 4, length_penalty)
    assert tuple(captions[0, 0].tolist())[: len(caption)] == caption
    assert log_probabilities[0, 0].item() == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize("beam_size", [1, 3, 5, 50])
def test_batched_search_equals_one_by_one(tiny_decoder, beam_size):
    regions = torch.randn(6, 4, 6, generator=torch.Generator().manual_seed(1)) * 2
    captions, log_probabilities = beam_search(tiny_decoder, regions, beam_size, 8)
    assert len({tuple(caption) for caption in captions[:, 0].tolist()}) > 1
    for b in range(6):
        alone, alone_log = beam_search(tiny_decoder, regions[b : b + 1], beam_size, 8)
        assert captions[b, 0, : alone.shape[2]].tolist() == alone[0, 0].tolist()
        assert log_probabilities[b, 0].item() == pytest.approx(alone_log[0, 0].item(), abs=1e-4)


def test_a_beam_of_one_is_greedy(tiny_decoder):
    regions = torch.rand(1, 4, 6)
    keys, state = tiny_decoder.keys(regions), tiny_decoder.first_state(regions)
    greedy, word = [], START
    while len(greedy) < 8 and word != END:
        logits, _, state = tiny_decoder.step(torch.tensor([[word]]), regions, keys, state)
        word = max(REAL_WORDS if greedy else REAL_WORDS[1:], key=lambda number: logits[0, 0, number].item())
        greedy.append(word)
    assert beam_search(tiny_decoder, regions, 1, 8)[0][0, 0].tolist() == greedy


@pytest.mark.parametrize("max_length", [1, 5])
def test_special_words_never_appear_and_nothing_has_to_end(tiny_decoder, max_length):
    tiny_decoder.output.bias.data[:4] = torch.tensor([50.0, 50.0, -50.0, 50.0])  # <pad>, <start>, <end>, <unk>
    captions, log_probabilities = beam_search(tiny_decoder, torch.rand(2, 4, 6), 5, max_length)
    assert captions.shape[2] == max_length
    assert set(captions[:, 0].flatten().tolist()) <= {4, 5, 6}
    assert log_probabilities[:, 0].isfinite().all()


@pytest.mark.parametrize("max_length", [2, 8])
def test_the_beams_log_probability_is_that_of_teacher_forcing(tiny_decoder, max_length):
    regions = torch.randn(6, 4, 6, generator=torch.Generator().manual_seed(1)) * 2
    captions, log_probabilities = beam_search(tiny_decoder, regions, 3, max_length)
    totals, weights = attend(tiny_decoder, regions, captions[:, 0])
    torch.testing.assert_close(totals, log_probabilities[:, 0])
    for b, caption in enumerate(captions[:, 0].tolist()):
        length = caption.index(END) + 1 if END in caption else len(caption)
        words = torch.tensor([[[START, *caption[:length]]]])
        logits, targets, looks = tiny_decoder(regions[b : b + 1], words, torch.tensor([[length]]))
        forced = logits.log_softmax(1).gather(1, targets.unsqueeze(1)).sum()
        torch.testing.assert_close(forced, log_probabilities[b, 0])
        torch.testing.assert_close(weights[b, :length], looks[:, 0, 0])
        assert weights[b, length:].abs().sum() == 0


def test_longer_captions_win_with_length_normalisation(tiny_decoder):
    regions = torch.rand(8, 4, 6)

    def mean_length(penalty):
        captions = beam_search(tiny_decoder, regions, 5, 8, penalty)[0][:, 0]
        return ((captions != END).sum(1) + 1).clamp(max=8).float().mean()

    assert mean_length(1.0) > mean_length(0.0)


def test_encoder_equals_torchvision(tmp_path):
    network = torchvision.models.resnet18(weights=None).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    encoder = Encoder("resnet18", weights=str(tmp_path / "weights.pth")).eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    for name, child in network.named_children():
        if name not in ("avgpool", "fc"):
            x = child(x)
    torch.testing.assert_close(encoder(images), x.flatten(2).transpose(1, 2), rtol=1e-3, atol=1e-4)


def test_grid_size_pools_the_grid():
    encoder = Encoder("resnet18", "layer1", grid_size=3)
    assert encoder(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 9, 64)


def batch_norm_moves(encoder):
    before = encoder.network.bn1.running_mean.clone()
    encoder.train()(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8))
    return not torch.equal(before, encoder.network.bn1.running_mean)


def test_batch_norm_of_pretrained_weights_never_moves(tmp_path):
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "weights.pth")
    assert not batch_norm_moves(Encoder("resnet18", "layer1", str(tmp_path / "weights.pth")))
    assert batch_norm_moves(Encoder("resnet18", "layer1"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet1000",), "--encoder resnet1000"),
        (("alexnet",), "--encoder_layer"),
        (("resnet18", "layer9"), "--encoder_layer layer9"),
        (("resnet18", "avgpool.nothing"), "--encoder_layer avgpool.nothing"),
        (("resnet18", "fc"), "not a grid"),
        (("swin_t", "features"), "not a grid"),
        (("vgg11", "", "", 0, 16), "vgg11 does not take images of 16 pixels"),
        (("resnet18", "", "missing.pth"), "missing.pth"),
    ],
)
def test_encoders_that_cannot_be_had_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        Encoder(*arguments)


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(InputError, match="not the weights of this network"):
        Encoder("resnet34", weights=str(tmp_path / "weights.pth"))


def test_weights_that_cannot_be_downloaded_say_how_to_pass_a_file(monkeypatch):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    with pytest.raises(InputError, match=r"resnet18 cannot be downloaded \(no network\).*--encoder_weights FILE"):
        Encoder("resnet18", weights="imagenet")


def test_a_checkpoint_of_another_vocabulary_names_both_sizes(run_folder, tmp_path):
    checkpoint = torch.load(run_folder / "best.pt", weights_only=True)
    rows = len(checkpoint["words"])
    checkpoint["words"] = checkpoint["words"][:-1]
    torch.save(checkpoint, tmp_path / "other.pt")
    with pytest.raises(InputError, match=f"names {rows - 1} words but its model has {rows}"):
        load_captioner(tmp_path / "other.pt", "cpu")


def test_a_checkpoint_gives_back_the_same_model(run_folder):
    captioner, vocabulary, _ = load_captioner(run_folder / "best.pt", "cpu")
    saved = torch.load(run_folder / "best.pt", weights_only=True)
    assert vocabulary.words == saved["words"] and not captioner.training
    for name, tensor in captioner.state_dict().items():
        assert torch.equal(tensor, saved["model"][name]), name
