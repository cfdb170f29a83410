"""Words, photos, prepared folders, the feature cache and batches."""

import json
import shutil
from collections import Counter

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import caption
import create_input_files
import datasets
import prepared
from datasets import CaptionDataset, collate, make_loader
from decoders import Decoder
from encoders import Encoder
from graph import RegionGraph
from models import Captioner
from prepared import PackedCaptions, take_captions, write_captions
from utils import InputError
from vocabulary import END, PAD, START, UNKNOWN, Vocabulary


@pytest.fixture
def copied(shapes, tmp_path):
    """A copy of the shapes that a test may spoil."""
    return shutil.copytree(shapes, tmp_path / "copy")


def test_vocabulary_counts_at_least_and_breaks_ties_by_alphabet():
    vocabulary = Vocabulary.from_counts(Counter({"b": 2, "a": 2, "c": 3, "rare": 1}), 2)
    assert vocabulary.words == ["<pad>", "<start>", "<end>", "<unk>", "c", "a", "b"]
    assert [vocabulary.number(word) for word in ("a", "rare", "<end>")] == [5, UNKNOWN, UNKNOWN]
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
            output=str(tmp_path / "data"),
            image_size=32,
            resize=resize,
        )
    )
    (_, image, _), *_ = CaptionDataset(tmp_path / "data", "val", Vocabulary.load(tmp_path / "data"))
    assert image.float().std() > 5
    assert np.array_equal(image.numpy(), caption.load_image(tmp_path / "photo.jpg", 32, resize))


def test_packed_captions_are_the_captions(tmp_path):
    told = [[["a", "dog"], ["two", "dogs", "<end>"]], [], [["a"]]]
    packed = PackedCaptions.pack(told)
    assert packed.strings() == told and len(packed) == 3 and packed.total() == 3
    assert packed.lengths().tolist() == [2, 3, 1]
    assert packed.counts() == Counter({"a": 2, "dog": 1, "two": 1, "dogs": 1, "<end>": 1})
    vocabulary = Vocabulary.from_counts(Counter(["a", "dog"]), 1)
    assert list(packed.encoded(vocabulary)) == [
        [[START, 4, 5, END], [START, UNKNOWN, UNKNOWN, UNKNOWN, END]],
        [],
        [[START, 4, END]],
    ]
    entries = [{"image": "é", "captions": [{"words": words} for words in one]} for one in told]
    write_captions(tmp_path / "lines.json", entries)
    (tmp_path / "one_line.json").write_text(json.dumps(entries))  # as an earlier version wrote it
    assert json.loads((tmp_path / "lines.json").read_text(encoding="utf-8")) == entries
    for name in ("lines.json", "one_line.json"):
        found = []
        assert PackedCaptions.pack(take_captions(tmp_path / name, found)).strings() == told
        assert found == [{"image": "é"}] * 3


def test_batches_are_sorted_both_ways_and_padded():
    captions = [[[START, 4, END]], [[START, 5, END], [START, 5, 5, 5, END]]]
    batch = collate([(i, torch.full((2, 2), i), one) for i, one in enumerate(captions)])
    assert batch.indices == [1, 0] and batch.images[:, 0, 0].tolist() == [1, 0]
    assert batch.lengths.tolist() == [[4, 2], [2, 0]]
    assert batch.words[0].tolist() == [[START, 5, 5, 5, END], [START, 5, END, PAD, PAD]]
    assert batch.words[1].tolist() == [[START, 4, END, PAD, PAD], [PAD] * 5]


@pytest.mark.parametrize(("start_method", "in_memory"), [("fork", False), ("forkserver", False), ("spawn", True)])
def test_workers_give_the_same_batches(shapes, start_method, in_memory):
    dataset = CaptionDataset(shapes, "train", Vocabulary.load(shapes))
    dataset[0]  # a handle is open before the workers start
    batches = datasets.split_order(datasets.epoch_order(len(dataset), seed=1, epoch=0), 8)
    alone = list(make_loader(dataset, batches))
    if in_memory:
        dataset.read_all()
    shared = list(make_loader(dataset, batches, workers=2, start_method=start_method))
    assert sorted(index for batch in alone for index in batch.indices) == list(range(len(dataset)))
    for one, other in zip(alone, shared, strict=True):
        assert one.indices == other.indices
        for name in ("images", "words", "lengths"):
            assert torch.equal(getattr(one, name), getattr(other, name))


def test_the_order_depends_on_seed_and_epoch():
    orders = {tuple(datasets.epoch_order(20, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert datasets.epoch_order(20, 1, 2) == datasets.epoch_order(20, 1, 2)


def small_captioner(weights_seed=0, grid_size=0):
    torch.manual_seed(weights_seed)
    encoder = Encoder("resnet18", "layer1", grid_size=grid_size, image_size=32).eval()
    decoder = Decoder(10, 64, 4, 4, 4, dropout=0.0, cell="lstm", attention="soft")
    return Captioner(encoder, torch.nn.Identity(), RegionGraph(64, 0, 0, 1, 0.0), decoder, 32)


def open_cached(folder, captioner, cached=True, mirror=False):
    prepared.read_card(folder)  # as every script does first
    vocabulary = Vocabulary.load(folder)
    return datasets.open_split(folder, "val", vocabulary, captioner, cached, torch.device("cpu"), torch.float32, mirror)


def test_cached_features_are_the_encoders(copied):
    captioner = small_captioner()
    cached, photos = open_cached(copied, captioner), open_cached(copied, captioner, cached=False)
    images = torch.stack([image for _, image, _ in photos])
    with torch.inference_mode():
        expected = captioner.regions(images)
    found = captioner.regions(torch.stack([regions for _, regions, _ in cached]))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_mirror_images_have_left_and_right_exchanged(copied):
    captioner = small_captioner()
    cached, photos = open_cached(copied, captioner, mirror=True), open_cached(copied, captioner, cached=False)
    numbers, seen = Vocabulary.load(copied).numbers, set()
    exchanged = {numbers["left"]: numbers["right"], numbers["right"]: numbers["left"]}
    for i in range(len(photos)):
        index, image, captions = photos[~i]
        assert index == ~i and torch.equal(image, photos[i][1].flip(-1))
        assert captions == [[exchanged.get(word, word) for word in caption] for caption in photos[i][2]]
        assert captions == cached[~i][2] and photos[i][2] == cached[i][2]
        seen.update(word for caption in captions for word in caption)
        for item in (i, ~i):
            with torch.inference_mode():
                expected = captioner.regions(photos[item][1].unsqueeze(0))[0]
            torch.testing.assert_close(cached[item][1].float(), expected, rtol=1e-3, atol=1e-3)
    assert seen & exchanged.keys()


def test_half_of_an_epoch_is_mirrored():
    order = datasets.epoch_order(1000, 1, 2, mirror=True)
    assert sorted(max(item, ~item) for item in order) == list(range(1000))
    assert 450 < sum(item < 0 for item in order) < 550 and order == datasets.epoch_order(1000, 1, 2, mirror=True)


def test_the_cache_is_reused_but_never_for_anything_else(copied):
    (path,) = open_cached(copied, small_captioner()).features
    written = path.stat().st_mtime_ns
    assert open_cached(copied, small_captioner()).features == [path] and path.stat().st_mtime_ns == written
    assert open_cached(copied, small_captioner(weights_seed=1)).features != [path]
    assert open_cached(copied, small_captioner(grid_size=2)).features != [path]
    with h5py.File(copied / "val_images.hdf5", "a") as file:
        file["images"][0] = 0
        file.attrs["digest"] = "another"
    card = json.loads((copied / "dataset.json").read_text())
    card["splits"]["val"]["digest"] = "another"
    (copied / "dataset.json").write_text(json.dumps(card))
    assert open_cached(copied, small_captioner()).features != [path]


def test_features_that_the_cache_cannot_hold_are_refused_and_nothing_is_left(copied):
    captioner = small_captioner()
    captioner.encoder.network.bn1.weight.data.fill_(1e6)
    before = set(copied.rglob("*"))
    with pytest.raises(InputError, match="resnet18's features do not fit into float16"):
        open_cached(copied, captioner)
    assert set(copied.rglob("*")) - {copied / "features"} == before - {copied / "features"}


@pytest.mark.parametrize(("name", "value"), [("image_size", 64), ("resize", "pad")])
def test_images_of_another_size_or_form_are_refused(copied, name, value):
    captioner = small_captioner()
    setattr(captioner, name, value)
    with pytest.raises(InputError, match=rf"images of 32 pixels, made by squash.*--{name} {value}"):
        open_cached(copied, captioner)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "dataset.json").unlink(), "not a complete data folder"),
        (lambda folder: (folder / "val_images.hdf5").unlink(), "val_images.hdf5 is missing or damaged"),
        (lambda folder: truncate(folder / "val_images.hdf5"), "val_images.hdf5 is missing or damaged"),
        (lambda folder: truncate(folder / "val_captions.json"), "val_captions.json, image 2: not valid JSON"),
        (lambda folder: (folder / "val_captions.json").unlink(), "no such file: .*val_captions.json"),
        (lambda folder: (folder / "word_map.json").unlink(), "no such file: .*word_map.json"),
        (
            lambda folder: shutil.copy(folder / "test_images.hdf5", folder / "val_images.hdf5"),
            "val_images.hdf5 is not the",
        ),
        (lambda folder: write_captions(folder / "val_captions.json", []), "val_captions.json is not the file that"),
        (shutil.rmtree, "no data folder"),
    ],
)
def test_half_made_folders_are_refused(copied, spoil, message):
    spoil(copied)
    with pytest.raises(InputError, match=message):
        open_cached(copied, small_captioner())
