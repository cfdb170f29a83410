"""Captions of a whole split are those of its images, decoded as asked, and the attention is that of the steps."""

import h5py
import torch

from datasets import CaptionDataset
from evaluation.generation import DecodingSettings, attend, caption_dataset, caption_images, evaluate
from models import load_captioner
from modules.beam_search import beam_search
from text.vocabulary import END, START
from utils import choose_runtime


def test_captions_of_a_dataset_are_those_of_each_image(shapes, run_folder):
    captioner, vocabulary = load_captioner(run_folder / "best.pt", "cpu")
    runtime = choose_runtime("cpu", "fp32")
    dataset = CaptionDataset(shapes, "train", vocabulary)
    decoding = DecodingSettings(beam_size=2, max_length=5, batch_size=7)
    captions, alphas = caption_dataset(captioner, vocabulary, dataset, decoding, runtime)
    with h5py.File(shapes / "train_images.hdf5") as file:
        images = torch.from_numpy(file["images"][:])
    assert len(captions) == len(alphas) == len(images)
    for image, words, alpha in zip(images, captions, alphas, strict=True):
        (expected,) = caption_images(captioner, vocabulary, image[None], decoding, runtime)
        assert words == expected.words and 0 < len(words) <= 5
        length = len(expected.alpha)  # a batch is as long as its longest caption
        torch.testing.assert_close(alpha[:length], expected.alpha)
        assert not alpha[length:].any()


def test_evaluate_returns_a_row_and_its_captions(shapes, run_folder):
    captioner, vocabulary = load_captioner(run_folder / "best.pt", "cpu")
    dataset = CaptionDataset(shapes, "val", vocabulary)
    decoding = DecodingSettings(beam_size=2, max_length=3)
    row, captions = evaluate(captioner, vocabulary, dataset, decoding, choose_runtime("cpu", "fp32"))
    assert row["beam_size"] == 2 and row["meteor"] is None and 0 <= row["pointing"] <= 1
    assert len(captions) == len(dataset) and all(len(words) <= 3 for words in captions)


def test_gates_and_attention_are_those_of_the_steps(tiny_decoder):
    torch.manual_seed(0)
    regions, captions = torch.randn(2, 9, 6), torch.tensor([[4, 5, 6], [6, 4, END]])
    alpha, gates = attend(tiny_decoder, regions, captions)
    keys, state = tiny_decoder.keys(regions), tiny_decoder.init_state(regions)
    previous = torch.full((2, 1), START)
    for t in range(3):
        expected = tiny_decoder.attention.gate(state[0]).sigmoid()[:, 0, 0]
        torch.testing.assert_close(gates[:, t], expected)
        _, expected, state = tiny_decoder.step(previous, regions, keys, state)
        torch.testing.assert_close(alpha[:, t], expected[:, 0])
        previous = captions[:, t : t + 1]
    assert not tiny_decoder.attention.gate._forward_hooks


def test_n_best_is_what_beam_search_finds(shapes, run_folder):
    captioner, vocabulary = load_captioner(run_folder / "best.pt", "cpu")
    runtime = choose_runtime("cpu", "fp32")
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    decoding = DecodingSettings(beam_size=4, max_length=6)
    found = caption_images(captioner, vocabulary, images, decoding, runtime, with_attention=False)
    captions, log_probs = beam_search(captioner.decoder, captioner.encode_images(images), 4, 6)
    for b, image in enumerate(found):
        assert [words for words, _ in image.n_best] == [vocabulary.decode(caption) for caption in captions[b]]
        assert [log_prob for _, log_prob in image.n_best] == log_probs[b].tolist()
        assert image.words == image.n_best[0][0] and image.alpha.shape == (0, 16) and image.gates is None
    (alone,) = caption_images(captioner, vocabulary, images[:1], decoding, runtime)
    assert alone.words == found[0].words and len(alone.alpha) == len(alone.gates) >= len(alone.words)
