"""Batches, their order and the workers that load them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import create_input_files
import datasets
from datasets import CaptionDataset, Example, collate, make_loader
from preparation.images import load_image
from text.vocabulary import END, PAD, START, Vocabulary
from utils import InputError


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
    image = CaptionDataset(tmp_path / "data", "val", Vocabulary.load(tmp_path / "data"))[0, False].input
    assert image.float().std() > 5
    assert np.array_equal(image.numpy(), load_image(tmp_path / "photo.jpg", 32, resize))


def test_batches_are_sorted_both_ways_and_padded():
    captions = [[[START, 4, END]], [[START, 5, END], [START, 5, 5, 5, END]]]
    batch = collate([Example(i, torch.full((2, 2), i), one) for i, one in enumerate(captions)])
    assert batch.indices == [1, 0] and batch.inputs[:, 0, 0].tolist() == [1, 0]
    assert batch.lengths.tolist() == [[4, 2], [2, 0]]
    assert batch.words[0].tolist() == [[START, 5, 5, 5, END], [START, 5, END, PAD, PAD]]
    assert batch.words[1].tolist() == [[START, 4, END, PAD, PAD], [PAD] * 5]


def test_boxes_come_with_their_images(shapes):
    dataset = CaptionDataset(shapes, "train", Vocabulary.load(shapes))
    assert collate([dataset[0, False]]).boxes is None
    dataset.use_objects()
    boxes = {i: [item["box"] for item in objects] for i, objects in enumerate(dataset.objects)}
    (batch,) = make_loader(dataset, [[(i, i % 2 == 0) for i in range(len(dataset))]])
    assert set(map(len, boxes.values())) == {1, 2} and batch.boxes.shape == (len(dataset), 2, 4)
    for part in [batch, *batch.micro_batches(3)]:
        for index, found in zip(part.indices, part.boxes, strict=True):
            expected = torch.tensor(boxes[index])
            if index % 2 == 0:
                expected[:, [0, 2]] = 1 - expected[:, [2, 0]]
            torch.testing.assert_close(found[: len(expected)], expected)
            assert (found[len(expected) :] == 0).all()


def test_words_name_the_objects_of_their_images(shapes):
    vocabulary = Vocabulary.load(shapes)
    dataset = CaptionDataset(shapes, "train", vocabulary)
    objects = dataset.objects[0]
    objects[0]["score"] = 0.1
    dataset.objects._images[0] = json.dumps(objects).encode()
    dataset.use_names(vocabulary)
    (batch,) = make_loader(dataset, [[(i, False) for i in range(len(dataset))]])
    for b, index in enumerate(batch.indices):
        objects = dataset.objects[index]
        for c, caption in enumerate(batch.words[b, :, 1:].tolist()):
            for t, word in enumerate(caption):
                expected = [vocabulary.idx2word[word] == item["words"][-1] and "score" not in item for item in objects]
                assert batch.named[b, c, t, : len(objects)].tolist() == expected
    assert batch.boxes is None and batch.object_boxes.shape == (len(dataset), 2, 4)
    assert batch.named.sum() > 100 and torch.equal(batch.micro_batches(2)[1].named, batch.named[1::2])


def test_a_split_without_objects_is_an_error(shapes, without_objects):
    dataset = CaptionDataset(without_objects, "train", Vocabulary.load(shapes))
    with pytest.raises(InputError, match="data has no objects, which this model looks at: run"):
        dataset.use_objects()
    with pytest.raises(InputError, match="data has no objects, which --grounding_weight needs: run"):
        dataset.use_names(Vocabulary.load(shapes))


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
