"""Captions of a whole split are those of its images, decoded as asked."""

import h5py
import torch

from conftest import beams
from datasets import CaptionDataset
from decoding.captions import caption_batch
from evaluation.scoring import caption_dataset, evaluate
from models import load_captioner
from utils import choose_runtime


def test_captions_of_a_dataset_are_those_of_each_image(shapes, run_folder):
    captioner = load_captioner(run_folder / "best.pt", "cpu")
    runtime = choose_runtime("cpu", "fp32")
    dataset = CaptionDataset(shapes, "train", captioner.vocabulary)
    decoding = beams(2, 5, batch_size=7)
    found = caption_dataset(captioner, [dataset], decoding, runtime)
    with h5py.File(shapes / "train_images.hdf5") as file:
        images = torch.from_numpy(file["images"][:])
    assert len(found) == len(images)
    for image, caption in zip(images, found, strict=True):
        (expected,) = caption_batch(captioner, image[None], decoding, runtime)
        assert caption.words == caption.before_consensus == expected.words and 0 < len(caption.words) <= 5
        length = len(expected.alpha)  # a batch is as long as its longest caption
        torch.testing.assert_close(caption.alpha[:length], expected.alpha)
        assert not caption.alpha[length:].any()


def test_evaluate_returns_a_row_and_its_captions(shapes, run_folder):
    captioner = load_captioner(run_folder / "best.pt", "cpu")
    dataset = CaptionDataset(shapes, "val", captioner.vocabulary)
    decoding = beams(2, 3)
    row, captions = evaluate(captioner, dataset, decoding, choose_runtime("cpu", "fp32"))
    assert row["beam_size"] == 2 and 0 <= row["cider"] <= 10 and 0 <= row["pointing"] <= 1
    assert len(captions) == len(dataset) and all(len(image.words) <= 3 for image in captions)
