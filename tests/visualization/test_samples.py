"""Sample captions are those of the first photos, drawn as caption.py draws them."""

from dataclasses import replace

import numpy as np
import pytest

from conftest import SMALL, build
from datasets import CaptionDataset
from decoding.settings import DecodingSettings
from evaluation.scoring import caption_dataset
from models import load_captioner
from utils import choose_runtime
from visualization.samples import NUM_PICTURES, draw_samples


@pytest.fixture
def dataset(shapes, run_folder):
    return CaptionDataset(shapes, "train", load_captioner(run_folder / "best.pt", "cpu").vocabulary)


def sample(captioner, dataset):
    decoding = DecodingSettings(max_length=5, batch_size=7)
    captions = caption_dataset(captioner, [dataset], decoding, choose_runtime("cpu", "fp32"), num_shown=NUM_PICTURES)
    return captions, draw_samples(captioner, dataset, captions)


def test_samples_are_the_first_captions_with_their_references(run_folder, dataset):
    dataset.has_boxes = False  # so that only the pictures need attention weights
    captions, (pictures, table) = sample(load_captioner(run_folder / "best.pt", "cpu"), dataset)
    assert len(pictures) == 2 and all(len(caption.alpha) == 0 for caption in captions[7:])
    for picture in pictures:
        assert picture.dtype == np.uint8 and picture.shape[2] == 3 and picture.std() > 1
    header, line, *rows = table.splitlines()
    assert len(rows) == 8 and header.count("|") == line.count("|") == 4
    references = dataset.references.decode()
    for i, row in enumerate(rows):
        photo, caption, of_photo = row.strip("| ").split(" | ")
        assert (photo, caption) == (dataset.entries[i]["image"], captions[i].caption)
        assert of_photo.split("<br>") == [" ".join(words) for words in references[i]]


@pytest.mark.parametrize("changes", [{"attention": "none"}, {"regions": "objects"}, {"regions": "both"}])
def test_any_model_has_samples(dataset, changes):
    captioner = build(replace(SMALL, **changes), dataset.captions.idx2word).eval()
    if captioner.uses_objects:
        dataset.use_objects()
    assert len(sample(captioner, dataset)[1].pictures) == 2


def test_words_are_no_markup(run_folder, dataset):
    dataset.references.idx2word[:] = [f"<{word}|" for word in dataset.references.idx2word]
    dataset.entries = dataset.entries[:1]
    _, (_, table) = sample(load_captioner(run_folder / "best.pt", "cpu"), dataset)
    assert "&lt;a&#124;" in table and table.count("|") == 12 and "<a" not in table
