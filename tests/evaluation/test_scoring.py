"""Captions of a whole split are those of its images, decoded as asked."""

import h5py
import torch

from conftest import beams
from datasets import CaptionDataset
from decoding.captions import caption_batch
from evaluation.scoring import caption_dataset
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
