"""Batches, their order and the workers that load them."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import create_input_files
import datasets
from datasets import CaptionDataset, collate, make_loader
from preparation.images import load_image
from preparation.storage import PackedCaptions, iter_captions, write_captions
from text.vocabulary import END, PAD, START, UNK, Vocabulary


def test_vocabulary_counts_at_least_and_breaks_ties_by_alphabet():
    vocabulary = Vocabulary.from_counts(Counter({"b": 2, "a": 2, "c": 3, "rare": 1}), 2)
    assert vocabulary.idx2word == ["<pad>", "<start>", "<end>", "<unk>", "c", "a", "b"]
    assert [vocabulary.word_id(word) for word in ("a", "rare", "<end>")] == [5, UNK, UNK]
    assert vocabulary.decode([START, 5, 4, END, 6]) == ["a", "c"]


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_the_image_of_training_is_the_image_of_captioning(tmp_path, resize):
    photo = Image.effect_noise((90, 50), 60).convert("RGB")
    exif = photo.getexif()
    exif[0x0112] = 6  # a quarter turn
    photo.save(tmp_path / "photo.jpg", exif=exif)
    (tmp_path / "captions.txt").write_text("file,caption,split\nphoto.jpg,some noise,val\n")
    create_input_files.main(
        create_input_files.Settings(
            dataset="own",
            captions=(str(tmp_path / "captions.txt"),),
            images=str(tmp_path),
            output_folder=str(tmp_path / "data"),
            image_size=32,
            resize=resize,
        )
    )
    _, image, _ = CaptionDataset(tmp_path / "data", "val", Vocabulary.load(tmp_path / "data"))[0, False]
    assert image.float().std() > 5
    assert np.array_equal(image.numpy(), load_image(tmp_path / "photo.jpg", 32, resize))


def test_packed_captions_are_the_captions(tmp_path):
    told = [[["a", "dog"], ["two", "dogs", "<end>"]], [], [["a"]]]
    packed = PackedCaptions.pack(told)
    assert packed.decode() == told and len(packed) == 3 and packed.num_captions() == 3
    assert packed.lengths().tolist() == [2, 3, 1]
    assert packed.counts() == Counter({"a": 2, "dog": 1, "two": 1, "dogs": 1, "<end>": 1})
    vocabulary = Vocabulary.from_counts(Counter(["a", "dog"]), 1)
    assert list(packed.encode(vocabulary)) == [
        [[START, 4, 5, END], [START, UNK, UNK, UNK, END]],
        [],
        [[START, 4, END]],
    ]
    entries = [{"image": "é", "captions": [{"words": words} for words in one]} for one in told]
    write_captions(tmp_path / "lines.json", entries)
    (tmp_path / "one_line.json").write_text(json.dumps(entries))  # as an earlier version wrote it
    assert json.loads((tmp_path / "lines.json").read_text(encoding="utf-8")) == entries
    for name in ("lines.json", "one_line.json"):
        found = []
        assert PackedCaptions.pack(iter_captions(tmp_path / name, found)).decode() == told
        assert found == [{"image": "é"}] * 3


def test_batches_are_sorted_both_ways_and_padded():
    captions = [[[START, 4, END]], [[START, 5, END], [START, 5, 5, 5, END]]]
    batch = collate([(i, torch.full((2, 2), i), one) for i, one in enumerate(captions)])
    assert batch.indices == [1, 0] and batch.inputs[:, 0, 0].tolist() == [1, 0]
    assert batch.lengths.tolist() == [[4, 2], [2, 0]]
    assert batch.words[0].tolist() == [[START, 5, 5, 5, END], [START, 5, END, PAD, PAD]]
    assert batch.words[1].tolist() == [[START, 4, END, PAD, PAD], [PAD] * 5]


@pytest.mark.parametrize(("start_method", "in_memory"), [("fork", False), ("forkserver", False), ("spawn", True)])
@pytest.mark.slow
def test_workers_give_the_same_batches(shapes, start_method, in_memory):
    dataset = CaptionDataset(shapes, "train", Vocabulary.load(shapes))
    dataset[0, False]  # a handle is open before the workers start
    batches = datasets.make_batches(datasets.shuffled_indices(len(dataset), seed=1, epoch=0), 8)
    alone = list(make_loader(dataset, batches))
    if in_memory:
        dataset.load_into_memory()
    shared = list(make_loader(dataset, batches, workers=2, start_method=start_method))
    assert sorted(index for batch in alone for index in batch.indices) == list(range(len(dataset)))
    for one, other in zip(alone, shared, strict=True):
        assert one.indices == other.indices
        for name in ("inputs", "words", "lengths"):
            assert torch.equal(getattr(one, name), getattr(other, name))


def test_the_order_depends_on_seed_and_epoch():
    orders = {tuple(datasets.shuffled_indices(20, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert datasets.shuffled_indices(20, 1, 2) == datasets.shuffled_indices(20, 1, 2)


def test_half_of_an_epoch_is_flipped():
    items = datasets.shuffled_indices(1000, 1, 2, hflip=True)
    assert sorted(index for index, _ in items) == list(range(1000))
    assert 450 < sum(flipped for _, flipped in items) < 550
    assert items == datasets.shuffled_indices(1000, 1, 2, hflip=True)
