"""Batches for training: the images of a prepared folder, or their features, with their captions."""

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from common.distributed import rank, world_size
from preparation.images import boxes_of, flip_boxes
from preparation.storage import MIN_SCORE, StoredRegions, read_captions, read_metadata
from text.nouns import nouns_of
from text.vocabulary import PAD, Vocabulary
from utils import InputError

Item = tuple[int, bool]  # the index of an image in its split; True to flip it horizontally


class Example(NamedTuple):
    """An image of a split with its captions."""

    index: int  # in its split
    input: Tensor  # image (3, S, S) uint8 or features (R, F) float16
    captions: list[list[int]]  # word ids from <start> to <end>
    boxes: Tensor | None = None  # (N, 4) of its objects, or of region features, in fractions of the sides
    object_boxes: Tensor | None = None  # (N, 4) of its objects, parallel to `names`
    names: list[list[int]] | None = None  # for each object the ids of the words that name it


@dataclass
class Batch:
    """Images with all their captions.

    Captions are sorted by decreasing length within and across images. At each time step the unfinished ones form the
    block [:b, :c], so padding costs nothing.
    """

    inputs: Tensor  # images (B, 3, h, w) uint8 or features (B, R, F) float16
    words: Tensor  # (B, C, T + 1) int64 on the CPU, <start> ... <end>, padded with <pad>
    lengths: Tensor  # (B, C) int64 on the CPU: words to predict, <end> included; 0: no caption
    indices: list[int]  # of the images in their split
    boxes: Tensor | None = None  # (B, N, 4) of objects or region features, padded with boxes without area
    object_boxes: Tensor | None = None  # (B, N, 4) of the objects, parallel to `named`
    named: Tensor | None = None  # (B, C, T, N) on the CPU: True if a word to predict names an object

    def pin_memory(self) -> "Batch":
        """Copy the inputs to page-locked memory, from which a GPU copies asynchronously; called by the loader."""
        tensors = {name: getattr(self, name) for name in ("inputs", "boxes", "object_boxes")}
        return replace(self, **{name: x.pin_memory() for name, x in tensors.items() if x is not None})

    def counts(self) -> tuple[int, int]:
        """Return the number of words to predict and of captions."""
        return int(self.lengths.sum()), int((self.lengths > 0).sum())

    def captions(self) -> list[list[list[int]]]:
        """Return the captions of each image as lists of word ids with <end>, without <start> and padding."""
        images = zip(self.words.tolist(), self.lengths.tolist(), strict=True)
        return [[caption[1 : n + 1] for caption, n in zip(*image, strict=True) if n] for image in images]

    def micro_batches(self, count: int) -> list["Batch"]:
        """Split the batch into `count` batches of about equal work; fewer if there are fewer images."""
        count = min(count, len(self.indices))
        return [self._select(slice(i, None, count)) for i in range(count)]

    def _select(self, images: slice) -> "Batch":
        return replace(self, **{name: x[images] for name, x in vars(self).items() if x is not None})


class CaptionDataset(Dataset):
    """One split: item (i, flipped) is the `Example` of image i.

    A flipped item is the mirrored image, with left and right exchanged in its captions. The input is the image, or its
    features after `use_features` or `use_region_features`. Boxes are included after `use_objects` or
    `use_region_features`, names after `use_names`. Each process opens the files at its first item: an open HDF5 handle
    must not cross a fork or a pickle. `metadata` is that of the folder, if it has been read already.
    """

    def __init__(
        self, data_folder: str | Path, split: str, vocabulary: Vocabulary, metadata: dict[str, Any] | None = None
    ) -> None:
        self.metadata = metadata or read_metadata(data_folder)
        self.entries, self.references, self.objects = read_captions(data_folder, split, self.metadata)
        self.captions = self.references.encode(vocabulary)
        self.split, self.images_path = split, Path(data_folder) / f"{split}_images.hdf5"
        self.has_boxes = self.objects.any()
        self.flipped_ids = vocabulary.flipped_ids
        self.feature_paths: list[Path] = []  # of the images and, optionally, of the flipped images
        self.uses_region_features = False
        self.uses_objects = False
        self.word2idx: dict[str, int] | None = None  # of the words that may name objects
        self.memory: Tensor | None = None
        self._opened: tuple[int | None, Any] = (None, None)  # process id, arrays

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, item: Item) -> Example:
        index, flipped = item
        captions = self.captions[index]
        if flipped:
            captions = [[self.flipped_ids.get(word, word) for word in caption] for caption in captions]
        boxes = object_boxes = names = None
        if self.uses_objects:
            boxes = boxes_of(self.objects[index])
        if self.word2idx is not None:
            object_boxes = boxes_of(self.objects[index])
            names = [self._name_ids(item, self.word2idx) for item in self.objects[index]]
        if self.uses_region_features:
            assert not flipped, "region features are those of the unflipped photos"
            array, region_boxes = self._arrays()[index]
            boxes = torch.from_numpy(region_boxes)
        elif self.feature_paths:
            array = self._arrays()[flipped][index]
        else:
            array = self._arrays()[index][..., :: -1 if flipped else 1]
        if flipped:
            boxes, object_boxes = (None if each is None else flip_boxes(each) for each in (boxes, object_boxes))
        return Example(index, torch.from_numpy(np.array(array)), captions, boxes, object_boxes, names)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": (None, None)}

    def use_features(self, paths: list[Path]) -> None:
        """Switch the input to cached features, from files of the images and, optionally, of the flipped images."""
        self.feature_paths, self._opened = paths, (None, None)

    def use_region_features(self) -> None:
        """Switch the input to the region features of the prepared folder and their boxes.

        Raises InputError if their file is missing or is not the one that dataset.json describes.
        """
        self._open_regions()  # fail before doing any work
        self.uses_region_features, self._opened = True, (None, None)

    def _open_regions(self) -> StoredRegions:
        return StoredRegions(self.images_path.parent, self.split, self.metadata)

    def use_objects(self) -> None:
        """Include the boxes of objects. Raises InputError if the split has none."""
        self._require_objects("which this model looks at")
        self.uses_objects = True

    def use_names(self, vocabulary: Vocabulary) -> None:
        """Include the words that name objects, and their boxes. Raises InputError if the split has none."""
        self._require_objects("which --grounding_weight needs")
        self.word2idx = vocabulary.word2idx

    @staticmethod
    def _name_ids(item: dict[str, Any], word2idx: dict[str, int]) -> list[int]:
        """Return the ids of the words that name an object; none if its score is low."""
        if item.get("score", 1.0) < MIN_SCORE:
            return []
        return [word2idx[noun] for noun in nouns_of(item["words"]) if noun in word2idx]

    def _require_objects(self, purpose: str) -> None:
        if not self.has_boxes:
            raise InputError(
                f"{self.images_path.parent} has no objects, {purpose}: run create_input_files.py again with --objects"
            )

    def load_into_memory(self) -> None:
        """Read all images into memory, shared by all workers."""
        with h5py.File(self.images_path) as file:
            self.memory = torch.from_numpy(np.asarray(file["images"]))  # tensors are shared between processes

    def _arrays(self) -> Any:
        """Return the array of images, the arrays of features or the `StoredRegions`, opened by this process."""
        if self.memory is not None:
            return self.memory.numpy()
        process_id, arrays = self._opened
        if process_id != os.getpid():
            if self.uses_region_features:
                arrays = self._open_regions()
            elif self.feature_paths:
                arrays = [np.load(path, mmap_mode="r") for path in self.feature_paths]
            else:
                arrays = h5py.File(self.images_path)["images"]
            self._opened = (os.getpid(), arrays)
        return arrays


def collate(examples: Sequence[Example]) -> Batch:
    """Make a `Batch` of examples and sort it by the lengths of their captions."""
    examples = [each._replace(captions=sorted(each.captions, key=len, reverse=True)) for each in examples]
    examples.sort(key=lambda each: len(each.captions[0]), reverse=True)
    indices, inputs, captions, boxes, object_boxes, names = zip(*examples, strict=True)
    max_length = len(captions[0][0])
    words = torch.full((len(examples), max(map(len, captions)), max_length), PAD)
    lengths = torch.zeros(words.shape[:2], dtype=torch.long)
    for b, image_captions in enumerate(captions):
        for c, caption in enumerate(image_captions):
            words[b, c, : len(caption)] = torch.tensor(caption)
            lengths[b, c] = len(caption) - 1
    boxes, object_boxes = (
        None if each[0] is None else pad_sequence(list(each), True) for each in (boxes, object_boxes)
    )
    named = None
    if names[0] is not None:
        named = torch.zeros(*words[..., 1:].shape, max(map(len, names)), dtype=torch.bool)
        for b, of_objects in enumerate(names):
            for i, ids in enumerate(of_objects):
                named[b, ..., i] = torch.isin(words[b, :, 1:], torch.tensor(ids, dtype=torch.long))
    is_ragged = len(set(map(len, inputs))) > 1  # photos differ in their number of region features
    inputs = pad_sequence(list(inputs), True) if is_ragged else torch.stack(inputs)
    return Batch(inputs, words, lengths, list(indices), boxes, object_boxes, named)


def ignore_sigint(_: int) -> None:
    """Keep a worker alive through a Ctrl-C or SIGTERM to the group: the main process finishes its step and saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setsid"):
        os.setsid()


def make_loader(
    dataset: CaptionDataset, batches: list[list[Item]], workers: int = 0, start_method: str | None = None
) -> DataLoader:
    """Return a loader of the given batches; in distributed training each process loads its share.

    Args:
        workers: number of processes that load batches; 0: the calling process loads them.
        start_method: how they start (fork, spawn, ...); None: the platform's default.
    """
    shares = [batch[rank() :: world_size()] for batch in batches]
    return DataLoader(
        dataset,
        batch_sampler=[share for share in shares if share],  # pyright: ignore[reportArgumentType]
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_sigint,
        generator=torch.Generator(),  # a separate one: dropout uses the default generator
        multiprocessing_context=start_method if workers else None,
    )


def make_batches(items: list[Item], batch_size: int) -> list[list[Item]]:
    """Split a list of items into batches; the last may be smaller, but has an image for each process."""
    batches = [items[i : i + batch_size] for i in range(0, len(items), batch_size)]
    if len(batches) > 1 and len(batches[-1]) < world_size():
        batches[-2:] = [batches[-2] + batches[-1]]
    return batches


def in_order(length: int, flipped: bool = False) -> list[Item]:
    """Return the items of a split of `length` images in their order, all flipped or none."""
    return [(i, flipped) for i in range(length)]


def shuffled_indices(length: int, seed: int, epoch: int, hflip: bool = False) -> list[Item]:
    """Return the shuffled items of one epoch; with `hflip`, half of them are flipped.

    They depend on these arguments alone, so a resumed run sees the same.
    """
    generator = torch.Generator().manual_seed((seed * 100_003 + epoch) % 2**63)
    indices = torch.randperm(length, generator=generator).tolist()
    flipped = (torch.rand(length, generator=generator) < 0.5).tolist() if hflip else [False] * length
    return list(zip(indices, flipped, strict=True))
