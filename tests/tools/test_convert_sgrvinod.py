"""Converted checkpoints of sgrvinod's tutorial against a plain search with its equations."""

import json
from collections import OrderedDict
from functools import reduce
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import caption
import convert_sgrvinod
import create_input_files
import eval as eval_script
import sgrvinod_reference as reference
import train
from conftest import beams
from convert_sgrvinod import Settings
from decoding.beam_search import beam_search
from models import load_captioner
from text.vocabulary import SPECIAL_TOKENS
from utils import InputError

WORDS = reference.word_map(["a", "the", "dog", "cat", "red", "blue", "ball", "runs", "sits", "with", "two", "of"])
IDX2WORD = {word_id: word for word, word_id in WORDS.items()}
SIZES = (2, 512)  # a grid of this side, features of a ResNet-18


def make_model():
    """A random encoder and decoder in eval mode, as in the tutorial."""
    torch.manual_seed(3)
    encoder = reference.Encoder("resnet18", SIZES[0]).eval()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):  # far from the initial values; features do not explode
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(1, 2)
            module.weight.data.uniform_(0.5, 1.5)
    return encoder, reference.random_decoder(WORDS, SIZES[1])


def settings_of(checkpoint, word_map, output):
    """The settings that convert these files."""
    return Settings(checkpoint=str(checkpoint), word_map=str(word_map), output=str(output))


def write(folder, content, *, legacy=False, words=WORDS):
    """Write a checkpoint and its word map; returns the settings to convert them."""
    (folder / "WORDMAP.json").write_text(json.dumps(words))
    reference.save(content, folder / "BEST.pth.tar", legacy=legacy)
    return settings_of(folder / "BEST.pth.tar", folder / "WORDMAP.json", folder / "best.pt")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The tutorial's model, the captioner of its converted checkpoint of the old format, and the folder of both."""
    folder = tmp_path_factory.mktemp("sgrvinod")
    encoder, decoder = make_model()
    settings = write(folder, reference.checkpoint(encoder, decoder, fine_tuned=True), legacy=True)
    convert_sgrvinod.main(settings)
    return encoder, decoder, load_captioner(settings.output, "cpu"), folder


def random_regions(count):
    """Regions (count, R, D), so small that words matter as well."""
    return 0.1 * torch.randn(count, SIZES[0] ** 2, SIZES[1], generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_the_regions_are_those_of_the_tutorials_encoder(converted):
    encoder, _, captioner, *_ = converted
    images = torch.randint(0, 256, (2, 3, 256, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = encoder((images / 255 - mean) / std)
    assert expected.std() > 0.1
    torch.testing.assert_close(captioner.encode(images).regions, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_logits_and_alpha_are_those_of_the_tutorials_equations(converted):
    _, decoder, captioner, _ = converted
    ids = [WORDS[word] for word in captioner.vocabulary.idx2word]
    for regions in random_regions(3):
        keys, state = captioner.decoder.keys(regions[None]), captioner.decoder.init_state(regions[None])
        expected_state = reference.init_state(decoder, regions)
        for word in ("<start>", "a", "red", "dog", "runs", "with", "the", "<unk>", "ball"):
            logits, state, alpha, _ = captioner.decoder.step(
                torch.tensor([[captioner.vocabulary.word2idx[word]]]), regions[None], keys, state
            )
            expected, expected_alpha, expected_state = reference.step(decoder, WORDS[word], regions, expected_state)
            torch.testing.assert_close(logits[0, 0], expected[ids], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(alpha[0, 0], expected_alpha, rtol=1e-5, atol=1e-5)
            assert expected_alpha.max() > 1.3 / len(regions)  # not uniform


@torch.no_grad()
def test_captions_are_those_of_a_plain_search(converted):
    _, decoder, captioner, _ = converted
    regions, captions = random_regions(20), []
    found = beam_search(captioner.decoder, regions, beams(3, 12, length_penalty=0.0))[0][:, 0]
    for b in range(20):
        expected = reference.plain_beam_search(decoder, regions[b], WORDS, beam_size=3, max_length=12)
        captions.append([IDX2WORD[word_id] for word_id in expected if word_id != WORDS["<end>"]])
        assert captioner.vocabulary.decode(found[b]) == captions[-1]
    assert len(set(map(tuple, captions))) > 10 and len({len(each) for each in captions}) > 3


@pytest.mark.slow
def test_the_converted_file_is_scored_captions_photos_and_is_trained_further(converted, command, no_meteor, tmp_path):
    *_, folder = converted
    shapes, checkpoint = tmp_path / "shapes", folder / "best.pt"
    create_input_files.main(
        create_input_files.Settings(output_folder=str(shapes), num_scenes=8, image_size=256, min_word_freq=1)
    )
    photos = sorted((shapes / "photos").iterdir())[:2]
    status, out, err = command(caption, *photos, "--checkpoint", checkpoint, "--no-pictures")
    assert status == 0 and out.count("log-probability") == 2, err
    data = ["--data_folder", shapes, "--features_folder", tmp_path / "features"]
    status, _, err = command(eval_script, "--checkpoint", checkpoint, *data, "--beam_sizes", 1)
    assert status == 0, err
    arguments = ["--init_from", checkpoint, "--run_folder", tmp_path / "run", "--epochs", 1, "--max_length", 4]
    arguments += ["--device", "cpu", "--no-fine_tune_encoder", "--unfreeze_from", ""]
    status, _, err = command(train, *arguments, *data)
    assert status == 0, err
    assert load_captioner(tmp_path / "run" / "best.pt", "cpu").vocabulary.idx2word[:4] == SPECIAL_TOKENS


def test_an_encoder_that_was_not_trained_stays_frozen(converted, tmp_path):
    encoder, decoder, *_ = converted
    settings = write(tmp_path, reference.checkpoint(encoder, decoder))
    convert_sgrvinod.main(settings)
    found, expected = load_captioner(settings.output, "cpu"), converted[2]
    assert expected.fine_tune_encoder and not found.fine_tune_encoder
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)  # of the new format, too


@pytest.mark.parametrize("name", convert_sgrvinod.RESNETS)
def test_every_resnet_is_recognized(name):
    with torch.device("meta"):
        encoder = reference.Encoder(name, 14)
    found = convert_sgrvinod.encoder_settings(encoder, encoder.state_dict(), "x.pt")
    assert found == {"encoder": name, "grid_size": 14}


# Paths of what is replaced in a checkpoint, values and messages.
REFUSED = {
    "no encoder": ("model", None, "is not a checkpoint of the tutorial: it lacks encoder"),
    "state dicts": ("decoder", OrderedDict(), "decoder is of type OrderedDict, not a module"),
    "another model": ("decoder", nn.Linear(1, 1), "decoder has no attention.decoder_att.bias, which is part of the"),
    "another activation": (
        "decoder.attention.relu",
        nn.Tanh(),
        r"is refused: it names torch.nn.*Tanh, which is not allowed",
    ),
    "a layer more": ("decoder.deep", nn.Linear(16, 16), "decoder has 'deep.bias', which is not part of the tutorial's"),
    "a wider layer": ("decoder.init_c", nn.Linear(512, 17), r"decoder.init_c.weight is \(17, 512\), not \(16, 512\)"),
    "fewer layers": ("encoder.resnet.7", nn.Sequential(), "encoder has 14 layers, which no ResNet of torchvision has"),
    "a wider network": (
        "encoder.resnet.0",
        nn.Conv2d(3, 65, 7, bias=False),
        r"encoder.network.conv1.weight is torch.float32 \(65, 3, 7, 7\), not torch.float32 \(64, 3, 7, 7\)",
    ),
    "doubles": ("decoder.fc.bias.data", torch.zeros(len(WORDS)).double(), "decoder.output.bias is torch.float64"),
    "not finite": ("decoder.fc.bias.data", torch.zeros(len(WORDS)).log(), "decoder.output.bias has values that are"),
    "a terabyte": ("decoder.fc.bias.data", torch.zeros(1).expand(10**12), "of fc.bias are not one after another"),
    "dropout of text": ("decoder.dropout.p", "0.5", "dropout has no p of type float"),
    "no modules": ("encoder._modules", [], "is refused: it is damaged, or holds more than tensors and plain"),
    "a module inside itself": ("decoder.deep", "decoder", "decoder has more than 1000 modules"),
    "no grid": ("encoder.enc_image_size", None, "encoder has no enc_image_size of type int"),
    "a fine grid": ("encoder.enc_image_size", 10**6, "--grid_size 1000000: exceeds the image size"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_the_tutorials_is_one_line(name, tmp_path):
    path, value, message = REFUSED[name]
    encoder, decoder = make_model()
    content = SimpleNamespace(encoder=encoder, decoder=decoder, encoder_optimizer=None)
    if path == "model":
        del content.encoder
    else:
        *owners, attribute = path.split(".")
        setattr(reduce(getattr, owners, content), attribute, decoder if value == "decoder" else value)
    settings = write(tmp_path, vars(content))
    with pytest.raises(InputError, match=message) as caught:
        convert_sgrvinod.main(settings)
    assert "\n" not in str(caught.value) and str(tmp_path / "BEST.pth.tar") in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["BEST.pth.tar", "WORDMAP.json"]


def test_other_word_maps_and_files_are_one_line(converted, tmp_path):
    *_, folder = converted
    new, names = tmp_path / "new.pt", ("BEST.pth.tar", "WORDMAP.json", "best.pt")
    original, word_map, output = (folder / name for name in names)
    cases = [
        ((original, word_map, output), r"best\.pt exists: give another path, or delete it"),
        ((tmp_path / "none", word_map, new), r"no such file: .*none"),
        ((output, word_map, new), "is not a checkpoint of the tutorial"),  # it was converted already
    ]
    word_maps = [
        (reference.word_map(["a", "b"]), "has 16 words, the word map 6"),
        (["a"], "is not a word map"),
        ({word: str(i) for word, i in WORDS.items()}, "is not a word map"),
        (WORDS | {"dog": 1}, "the ids of its 16 words are not 0 to 15"),
        ({word.strip("<"): i for word, i in WORDS.items()}, "has no <pad>"),
    ]
    for i, (words, message) in enumerate(word_maps):
        (tmp_path / f"{i}.json").write_text(json.dumps(words))
        cases.append(((original, tmp_path / f"{i}.json", new), message))
    for paths, message in cases:
        with pytest.raises(InputError, match=message):
            convert_sgrvinod.main(settings_of(*paths))
