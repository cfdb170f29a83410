"""Ensembles of captioners and of views, against what each captioner does alone."""

import functools
from collections import Counter
from dataclasses import replace

import pytest
import torch

from conftest import CPU, SMALL, beams, build
from decoding.beam_search import beam_search
from decoding.captions import caption_batch, encode_words
from decoding.ensemble import EnsembleDecoder
from decoding.sampling import force_decode
from evaluation.ensemble import VIEWS, Ensemble, EnsembleSettings, load_models
from modules.regions import grid_boxes
from preparation.images import flip_boxes
from text.vocabulary import Vocabulary
from utils import InputError

WORDS = ["a", "dog", "left", "right", "runs", "the"]
VOCABULARY = Vocabulary.from_counts(Counter(WORDS), 1)
FROZEN = replace(SMALL, fine_tune_encoder=False)
DECODING = beams(3, 6)


@functools.cache
def encoder_weights():
    """Return the weights of a random encoder."""
    torch.manual_seed(0)
    return build(FROZEN, VOCABULARY.idx2word).encoder.state_dict()


def captioner_of(seed, vocabulary=VOCABULARY, **changes):
    """Return a random captioner in eval mode; all have the same encoder."""
    weights = encoder_weights()
    torch.manual_seed(seed)
    captioner = build(replace(FROZEN, **changes), vocabulary.idx2word).eval()
    captioner.encoder.load_state_dict(weights)
    for parameter in captioner.decoder.parameters():
        parameter.data *= 3  # far from uniform, so that rankings are clear
    return captioner


def ensemble_of(captioners, views=("original",)):
    return Ensemble({str(i): captioner for i, captioner in enumerate(captioners)}, views)


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_members_with_one_encoder_share_its_features(images):
    captioners = [captioner_of(1), captioner_of(2, cell="gru"), captioner_of(3, decoder="up_down")]
    ensemble, calls = ensemble_of(captioners), []
    for captioner in captioners:
        captioner.encoder.register_forward_hook(lambda *call: calls.append(call))
    encoded = ensemble.encode(images)
    assert ensemble.sources == captioners[:1] and len(calls) == 1
    for captioner, regions in zip(captioners, encoded.regions, strict=True):
        torch.testing.assert_close(regions, captioner.encode(images).regions)
    from_features = ensemble.encode(encoded.features)
    torch.testing.assert_close(from_features.regions, encoded.regions)


def test_members_with_other_encoders_have_inputs_of_their_own(images):
    captioners = [captioner_of(1), captioner_of(2)]
    captioners[1].encoder.network.conv1.weight.data *= 1.5
    ensemble = ensemble_of(captioners)
    assert ensemble.sources == captioners
    features = [captioner.features(images) for captioner in captioners]
    for inputs in ((images, features[1]), features):
        for captioner, regions in zip(captioners, ensemble.encode(inputs).regions, strict=True):
            torch.testing.assert_close(regions, captioner.encode(images).regions)


def test_an_ensemble_of_one_model_captions_as_the_model(images):
    captioner = captioner_of(1)
    expected = caption_batch(captioner, images, DECODING, CPU)
    found = caption_batch(ensemble_of([captioner] * 2), images, DECODING, CPU)
    for one, other in zip(found, expected, strict=True):
        assert [each.words for each in one.n_best] == [each.words for each in other.n_best]
        torch.testing.assert_close(one.alpha, other.alpha)
        assert one.gates == pytest.approx(other.gates)


def test_log_probabilities_are_those_of_the_mean(images):
    other = Vocabulary([VOCABULARY.idx2word[i] for i in (*range(4), 9, 7, 5, 4, 6, 8)])  # in another order
    captioners = [captioner_of(1), captioner_of(2, other, decoder="transformer")]
    ensemble = ensemble_of(captioners)
    for image in caption_batch(ensemble, images[:1], DECODING, CPU):
        for words, log_prob, _ in image.n_best:
            previous, total, states = ["<start>", *words], torch.zeros(()), [None, None]
            for t in range(min(len(words) + 1, DECODING.max_length)):
                probabilities = []
                for m, captioner in enumerate(captioners):
                    regions = captioner.encode(images[:1]).regions
                    state = captioner.decoder.init_state(regions) if states[m] is None else states[m]
                    word = torch.tensor([[captioner.vocabulary.word2idx[previous[t]]]])
                    with torch.no_grad():
                        logits, states[m], *_ = captioner.decoder.step(
                            word, regions, captioner.decoder.keys(regions), state
                        )
                    target = [*words, "<end>"][t]
                    probabilities.append(logits[0, 0].softmax(0)[captioner.vocabulary.word2idx[target]])
                total += (sum(probabilities) / 2).log()
            assert log_prob == pytest.approx(total.item(), rel=1e-4)


def test_the_flipped_view_exchanges_left_and_right(images):
    captioner = captioner_of(1)
    ensemble = ensemble_of([captioner], views=["original", "hflip"])
    flipped = EnsembleDecoder(ensemble.decoder.members[1:], ensemble.decoder.word_maps[1:])
    captions, _ = beam_search(flipped, ensemble.encode(images).regions[1:], beams(3, 6))
    of_flipped, seen = caption_batch(captioner, images.flip(-1), DECODING, CPU), set()
    exchange = {"left": "right", "right": "left"}
    for found, other in zip(captions[:, 0], of_flipped, strict=True):
        assert VOCABULARY.decode(found) == [exchange.get(word, word) for word in other.words]
        seen |= set(other.words)
    assert seen & {"left", "right"}


def test_views_are_encoded_one_by_one(images):
    captioners = [captioner_of(1), captioner_of(2)]
    ensemble = ensemble_of(captioners, views=["crop", "original", "hflip"])
    regions = ensemble.encode(images).regions
    views = [VIEWS[view](images) for view in ("original", "crop", "hflip")]
    expected = [captioner.encode(view).regions for view in views for captioner in captioners]
    torch.testing.assert_close(list(regions), expected)
    assert not torch.equal(regions[0], regions[2]) and not torch.equal(regions[0], regions[4])
    (image,) = caption_batch(ensemble, images[:1], DECODING, CPU)
    words = encode_words([image.words], VOCABULARY).unsqueeze(1)
    _, alpha, gates = force_decode(captioners[0].decoder, captioners[0].encode(images[:1]).regions, words)
    torch.testing.assert_close(image.alpha, alpha[0, 0])  # the first captioner's, of the first view
    assert image.gates == pytest.approx(gates[0, 0].tolist())


def test_a_view_moves_the_boxes_with_the_pixels(images):
    captioners = [captioner_of(1), captioner_of(2, regions="objects", box_features=True)]
    boxes = torch.tensor([[[0.25, 0.0, 0.5, 0.75], [0.0, 0.0, 0.05, 1.0]]] * 3)  # the second is outside of the crop
    assert not ensemble_of(captioners[:1]).uses_objects and ensemble_of(captioners).uses_objects
    ensemble = ensemble_of(captioners, views=["original", "hflip", "crop"])
    encoded = ensemble.encode(images, boxes=boxes)
    assert encoded.mask[0::2] == (None, None, None)  # of the grid
    flipped = captioners[1].encode(images.flip(-1), boxes=flip_boxes(boxes))
    torch.testing.assert_close(encoded.regions[3], flipped.regions)
    assert encoded.mask[3].all() and encoded.mask[5].tolist() == [[True, True, False]] * 3
    cropped = captioners[1].encode(VIEWS["crop"](images), boxes=torch.tensor([[[3 / 14, 0, 1 / 2, 11 / 14]]] * 3))
    torch.testing.assert_close(encoded.regions[5][:, :2], cropped.regions)
    found = caption_batch(ensemble, images, DECODING, CPU, boxes=boxes)
    assert all(image.alpha.shape[1] == 16 and torch.equal(image.boxes, grid_boxes(4)) for image in found)
    found = caption_batch(captioners[1], images, DECODING, CPU, boxes=boxes * torch.tensor([[[1], [0]]]))
    for image in found:  # without the padding
        assert image.alpha.shape[1] == 2 and image.boxes.tolist() == [[0, 0, 1, 1], [0.25, 0, 0.5, 0.75]]
        torch.testing.assert_close(image.alpha[: len(image.words)].sum(1), torch.ones(len(image.words)))


def test_a_crop_is_the_middle():
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    image[..., 2:30, 2:30] = 200  # a sixteenth of the side on each side is cut off
    assert (VIEWS["crop"](image) == 200).all() and VIEWS["crop"](image).shape == image.shape


def test_what_does_not_go_together_is_named(run_folder):
    small = captioner_of(1)
    large = build(FROZEN, VOCABULARY.idx2word, image_size=64)
    with pytest.raises(InputError, match="0 takes 32 pixels made by squash, 1 takes 64 by squash"):
        ensemble_of([small, large])
    other = Vocabulary.from_counts(Counter([*WORDS[:-1], "cat"]), 1)
    with pytest.raises(InputError, match="0 and 1: an ensemble needs models with the same words: 2 are"):
        ensemble_of([small, captioner_of(2, other)])
    for views in (("original", "upside_down"), ("",)):
        with pytest.raises(InputError, match=r"--views .*: choose from original hflip crop"):
            EnsembleSettings(views=views)
    with pytest.raises(InputError, match="--views hflip: add original"):
        EnsembleSettings(views=("hflip",))
    with pytest.raises(InputError, match=r"--checkpoint .*best.pt is given twice"):
        load_models([run_folder / "best.pt", run_folder / ".." / run_folder.name / "best.pt"], "cpu")
    with pytest.raises(AssertionError, match="other views need images"):
        ensemble_of([small], views=["original", "crop"]).encode([torch.zeros(1, 16, 64)])
