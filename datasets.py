"""Data as training reads it: the images of a prepared folder, or their cached features, in batches with captions."""

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
from preparation.images import flip_boxes
from preparation.objects import MIN_SCORE
from preparation.storage import StoredRegions, read_captions, read_metadata
from text.nouns import nouns_of
from text.vocabulary import PAD, Vocabulary
from utils import InputError

Item = tuple[int, bool]  # the index of an image in its split, and whether it is flipped horizontally


class Example(NamedTuple):
    """An image of a split with its captions."""

    index: int  # in its split
    input: Tensor  # image (3, S, S) uint8 or features (R, F) float16
    captions: list[list[int]]  # word ids from <start> to <end>
    boxes: Tensor | None = None  # (N, 4) of its objects, or of region features, in fractions of the sides
    object_boxes: Tensor | None = None  # (N, 4) of its objects, for `names`
    names: list[list[int]] | None = None  # of each object the ids of the words that name it


@dataclass
class Batch:
    """Images with all their captions.

    Captions are sorted by decreasing length within and across images, so at each time step the unfinished ones form
    the block [:b, :c] and padding costs nothing.
    """

    inputs: Tensor  # images (B, 3, h, w) uint8 or features (B, R, F) float16
    words: Tensor  # (B, C, T + 1) int64 on the CPU, <start> ... <end>, padded with <pad>
    lengths: Tensor  # (B, C) int64 on the CPU: words to predict, <end> included; 0 where there is no caption
    indices: list[int]  # of the images in their split
    # (B, N, 4) of the objects or, for a model of region features, of the regions, padded with boxes without area as
    # `modules.regions` has them; None: not asked for
    boxes: Tensor | None = None
    object_boxes: Tensor | None = None  # (B, N, 4) of the objects, for `named`
    named: Tensor | None = None  # (B, C, T, N) on the CPU: whether a word to predict names an object

    def pin_memory(self) -> "Batch":
        """Copy the inputs to page-locked memory, from which a GPU copies asynchronously; the loader calls it."""
        pinned = {}
        for name in ("inputs", "boxes", "object_boxes"):
            tensor = getattr(self, name)
            pinned[name] = None if tensor is None else tensor.pin_memory()
        return replace(self, **pinned)

    def counts(self) -> tuple[int, int]:
        """The number of words to predict and of captions."""
        return int(self.lengths.sum()), int((self.lengths > 0).sum())

    def captions(self) -> list[list[list[int]]]:
        """For each image its captions as lists of word ids, <end> included, without <start> and padding."""
        images = zip(self.words.tolist(), self.lengths.tolist(), strict=True)
        return [[caption[1 : n + 1] for caption, n in zip(*image, strict=True) if n] for image in images]

    def micro_batches(self, count: int) -> list["Batch"]:
        """Split the batch into `count` batches of about equal work; fewer where there are fewer images."""
        count = min(count, len(self.indices))
        return [self._select(slice(i, None, count)) for i in range(count)]

    def _select(self, images: slice) -> "Batch":
        optional = (self.boxes, self.object_boxes, self.named)
        parts = (self.inputs[images], self.words[images], self.lengths[images], self.indices[images])
        return Batch(*parts, *(None if x is None else x[images] for x in optional))


class CaptionDataset(Dataset):
    """One split: item (i, flipped) is the `Example` of image i.

    A flipped item is the image mirrored horizontally, with left and right exchanged in its captions. The input is the
    image, or its features after `use_features` or `use_region_features`; boxes are there after the latter or after
    `use_objects`, names after `use_names`. Files are opened at the first item, by each process for itself: an open HDF5
    handle must not cross a fork or a pickle. `metadata` is the folder's where it is read already
    (`preparation.storage.read_metadata`).
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
        self.feature_paths: list[Path] = []  # of the images and, where wanted, of the flipped images
        self.uses_region_features = False
        self.uses_objects = False
        self.word_ids: list[list[int]] | None = None  # of `objects.words`, the ids of those that name the object
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
        if self.word_ids is not None:
            object_boxes, names = self.objects.boxes(index), self.objects.names(index, self.word_ids, MIN_SCORE)
        if self.uses_objects:
            boxes = self.objects.boxes(index) if object_boxes is None else object_boxes
        if self.uses_region_features:
            assert not flipped, "region features are those of the photos as they are"
            array, boxes = self._arrays()[index]
        elif self.feature_paths:
            array = self._arrays()[flipped][index]
        else:
            array = self._arrays()[index][..., :: -1 if flipped else 1]
        boxes, object_boxes = (None if x is None else torch.from_numpy(x) for x in (boxes, object_boxes))
        if flipped:
            boxes, object_boxes = (None if x is None else flip_boxes(x) for x in (boxes, object_boxes))
        return Example(index, torch.from_numpy(np.array(array)), captions, boxes, object_boxes, names)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": (None, None)}

    def use_features(self, paths: list[Path]) -> None:
        """Yield the cached features of these files from now on: of the images and, where given, the flipped images."""
        self.feature_paths, self._opened = paths, (None, None)

    def use_region_features(self) -> None:
        """Yield the region features of the prepared folder and their boxes from now on.

        Raises InputError where their file is missing or is not the one that dataset.json describes.
        """
        self._open_regions()  # an error is one before all work
        self.uses_region_features, self._opened = True, (None, None)

    def _open_regions(self) -> StoredRegions:
        return StoredRegions(self.images_path.parent, self.split, self.metadata)

    def use_objects(self) -> None:
        """Yield the boxes of the images' objects from now on. Raises InputError where the split has none."""
        self._require_objects("which this model looks at")
        self.uses_objects = True

    def use_names(self, vocabulary: Vocabulary) -> None:
        """Yield the words that name objects, and their boxes, from now on. Raises InputError as `use_objects`."""
        self._require_objects("which --grounding_weight needs")
        self.word_ids = [
            [vocabulary.word2idx[noun] for noun in nouns_of(words) if noun in vocabulary.word2idx]
            for words in self.objects.words
        ]

    def _require_objects(self, purpose: str) -> None:
        if not self.has_boxes:
            raise InputError(
                f"{self.images_path.parent} has no objects, {purpose}: run create_input_files.py again with --objects"
            )

    def load_into_memory(self) -> None:
        """Read all images into memory, once for all workers."""
        with h5py.File(self.images_path) as file:
            self.memory = torch.from_numpy(np.asarray(file["images"]))  # tensors are shared between processes

    def _arrays(self) -> Any:
        if self.memory is not None:
            return self.memory.numpy()
        if self._opened[0] != os.getpid():
            if self.uses_region_features:
                opened: Any = self._open_regions()
            else:
                opened = [np.load(path, mmap_mode="r") for path in self.feature_paths]
            self._opened = (os.getpid(), opened or h5py.File(self.images_path)["images"])
        return self._opened[1]


def collate(examples: Sequence[Example]) -> Batch:
    """Make a `Batch` of examples, sorted by the lengths of their captions."""
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
        None if each[0] is None else pad_sequence(list(each), batch_first=True) for each in (boxes, object_boxes)
    )
    named = None
    if names[0] is not None:
        named = torch.zeros(*words[..., 1:].shape, max(map(len, names)), dtype=torch.bool)
        for b, of_objects in enumerate(names):
            for i, ids in enumerate(of_objects):
                named[b, ..., i] = torch.isin(words[b, :, 1:], torch.tensor(ids, dtype=torch.long))
    same = len(set(map(len, inputs))) == 1  # region features may differ in their number
    inputs = torch.stack(inputs) if same else pad_sequence(list(inputs), batch_first=True)
    return Batch(inputs, words, lengths, list(indices), boxes, object_boxes, named)


def ignore_sigint(_: int) -> None:
    """Let a worker outlive a Ctrl-C or SIGTERM to the whole group: the main process finishes its step and saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setsid"):
        os.setsid()


def make_loader(
    dataset: CaptionDataset, batches: list[list[Item]], workers: int = 0, start_method: str | None = None
) -> DataLoader:
    """A loader of `Batch`es, each given as a list of items; of several processes each loads its share of every batch.

    Args:
        workers: processes that load batches; 0: the calling one.
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
        generator=torch.Generator(),  # a loader must not draw from the generator of the dropout
        multiprocessing_context=start_method if workers else None,
    )


def make_batches(items: list[Item], batch_size: int) -> list[list[Item]]:
    """Cut a list of items into batches; the last may be smaller, yet gives each process an image."""
    batches = [items[i : i + batch_size] for i in range(0, len(items), batch_size)]
    if len(batches) > 1 and len(batches[-1]) < world_size():
        batches[-2:] = [batches[-2] + batches[-1]]
    return batches


def in_order(length: int, flipped: bool = False) -> list[Item]:
    """The items of a split of so many images in their order, all flipped or none."""
    return [(i, flipped) for i in range(length)]


def shuffled_indices(length: int, seed: int, epoch: int, hflip: bool = False) -> list[Item]:
    """The shuffled items of one epoch, half of them flipped if asked for.

    A function of these arguments alone, so that a resumed run sees the same.
    """
    generator = torch.Generator().manual_seed((seed * 100_003 + epoch) % 2**63)
    indices = torch.randperm(length, generator=generator).tolist()
    flipped = (torch.rand(length, generator=generator) < 0.5).tolist() if hflip else [False] * length
    return list(zip(indices, flipped, strict=True))
