"""Checkpoints laid out as those of sgrvinod's tutorial, converted, against a plain search with its equations."""

import json
import time

import pytest
import torch

import caption
import convert_sgrvinod
import eval as eval_script
import sgrvinod_reference as reference
from common.pickled import open_pickled
from convert_sgrvinod import Settings
from models import load_captioner, load_checkpoint
from modules.beam_search import beam_search, force_decode
from text.vocabulary import END
from utils import InputError

WORDS = reference.word_map("a the dog cat red blue ball runs sits with two of".split())
IDX2WORD = {word_id: word for word, word_id in WORDS.items()}
SIZES = (2, 512)  # a grid of this side, features of a ResNet-18


def make_model():
    """A random encoder and decoder in eval mode, as in the tutorial."""
    torch.manual_seed(3)
    encoder = reference.Encoder("resnet18", SIZES[0]).eval()
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # far from what a new one has, and features that grow nowhere
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(1, 2)
            module.weight.data.uniform_(0.5, 1.5)
    return encoder, reference.random_decoder(WORDS, SIZES[1])


def write(folder, content, *, legacy=False, words=WORDS):
    """Write a checkpoint and its word map; returns the settings to convert them."""
    (folder / "WORDMAP.json").write_text(json.dumps(words))
    reference.save(content, folder / "BEST.pth.tar", legacy=legacy)
    return Settings(*(str(folder / name) for name in ("BEST.pth.tar", "WORDMAP.json", "best.pt")))


@pytest.fixture(scope="module", params=[False, True], ids=["zip", "legacy"])
def converted(request, tmp_path_factory):
    """The tutorial's model, and the captioner and vocabulary of its converted checkpoint, with the folder of both."""
    folder = tmp_path_factory.mktemp("sgrvinod")
    encoder, decoder = make_model()
    settings = write(folder, reference.checkpoint(encoder, decoder, fine_tuned=True), legacy=request.param)
    # What the step of its optimizers changed is in the file, too.
    convert_sgrvinod.main(settings)
    return encoder, decoder, *load_captioner(settings.output, "cpu"), folder


def random_regions(count):
    """Regions (count, R, D), so small that words matter, too."""
    return 0.1 * torch.randn(count, SIZES[0] ** 2, SIZES[1], generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_the_regions_are_those_of_the_tutorials_encoder(converted):
    encoder, _, captioner, *_ = converted
    images = torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = encoder((images / 255 - mean) / std)
    assert expected.std() > 0.1
    torch.testing.assert_close(captioner.encode_images(images), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_logits_and_alpha_are_those_of_the_tutorials_equations(converted):
    _, decoder, captioner, vocabulary, _ = converted
    ids = [WORDS[word] for word in vocabulary.idx2word]
    for regions in random_regions(3):
        keys, state = captioner.decoder.keys(regions[None]), captioner.decoder.init_state(regions[None])
        expected_state = reference.init_state(decoder, regions)
        for word in "<start> a red dog runs with the <unk> ball".split():
            logits, alpha, state = captioner.decoder.step(
                torch.tensor([[vocabulary.word2idx[word]]]), regions[None], keys, state
            )
            expected, expected_alpha, expected_state = reference.step(decoder, WORDS[word], regions, expected_state)
            torch.testing.assert_close(logits[0, 0], expected[ids], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(alpha[0, 0], expected_alpha, rtol=1e-5, atol=1e-5)
            assert expected_alpha.max() > 1.3 / len(regions)  # not uniform


@pytest.mark.parametrize("finished_leave", [False, True], ids=["stay", "leave"])
@torch.no_grad()
def test_captions_are_those_of_a_plain_search(converted, finished_leave):
    _, decoder, captioner, vocabulary, _ = converted
    regions, captions = random_regions(20), []
    found = beam_search(captioner.decoder, regions, beam_size=3, max_length=12, length_penalty=0)[0][:, 0]
    for b in range(20):
        expected = reference.plain_beam_search(
            decoder, regions[b], WORDS, beam_size=3, max_length=12, finished_leave=finished_leave
        )
        captions.append([IDX2WORD[word_id] for word_id in expected if word_id != WORDS["<end>"]])
        assert vocabulary.decode(found[b]) == captions[-1]
    assert len(set(map(tuple, captions))) > 10 and len({len(each) for each in captions}) > 3
