"""Data as training reads it: prepared folders as batches, and cached features."""

import contextlib
import hashlib
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from prepared import read_captions, read_card
from utils import InputError, autocast, barrier, gather, rank, world_size, written_whole
from vocabulary import PAD, UNKNOWN

MIRRORED_WORDS = {"left": "right", "right": "left"}


# --------------------------------------------------------------------------------------------------- batches


@dataclass
class Batch:
    """Images with all their captions, the longest caption first in both directions.

    Image b's captions stand in falling length, and so do the images by their longest caption: the captions that are
    still unfinished at any word then fill a rectangle at the top left, and finished ones cost nothing.
    """

    images: torch.Tensor  # (B, 3, h, w) uint8, or cached regions (B, R, D) float16
    words: torch.Tensor  # (B, C, T + 1) int64, <start> ... <end>, padded with <pad>
    lengths: torch.Tensor  # (B, C) int64 on the CPU: words to predict, <end> included; 0 where there is no caption
    indices: list  # each image's place in the split

    def pin_memory(self):
        """Let the loader put the batch where a GPU fetches it without waiting."""
        return replace(self, images=self.images.pin_memory(), words=self.words.pin_memory())

    def totals(self):
        """The number of words to predict and of captions."""
        return int(self.lengths.sum()), int((self.lengths > 0).sum())

    def captions(self):
        """For each image its captions as lists of word numbers, <end> included, without <start> and padding."""
        images = zip(self.words.tolist(), self.lengths.tolist(), strict=True)
        return [[caption[1 : n + 1] for caption, n in zip(*image, strict=True) if n] for image in images]

    def split(self, parts):
        """As many Batches of about equal work; fewer where there are fewer images."""
        parts = min(parts, len(self.indices))
        return [
            Batch(self.images[i::parts], self.words[i::parts], self.lengths[i::parts], self.indices[i::parts])
            for i in range(parts)
        ]


class CaptionDataset(Dataset):
    """One split: item i is (i, image, captions), captions being lists of word numbers.

    Item ~i (that is -1 - i) is image i as in a mirror, its captions with left and right exchanged. The image is
    (3, S, S) uint8, or regions (R, D) float16 where `features` names cache files, of the images and of their mirror
    images. Files are opened at the first item, by each process for itself: an open HDF5 handle must not cross a fork
    or a pickle.
    """

    def __init__(self, data_folder, split, vocabulary):
        self.entries, self.references = read_captions(data_folder, split)
        self.captions = self.references.encoded(vocabulary)
        self.images_path = Path(data_folder) / f"{split}_images.hdf5"
        self.has_boxes = all("objects" in entry for entry in self.entries)
        numbers = vocabulary.numbers
        self.mirrored_words = {
            numbers[word]: numbers.get(other, UNKNOWN) for word, other in MIRRORED_WORDS.items() if word in numbers
        }
        self.features, self.memory = [], None
        self._opened = (None, None)

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, index):
        mirrored, place = index < 0, place_of(index)
        captions = self.captions[place]
        if mirrored:
            captions = [[self.mirrored_words.get(word, word) for word in caption] for caption in captions]
        if self.features:
            image = self._images()[mirrored][place]
        else:
            image = self._images()[place][..., :: -1 if mirrored else 1]
        return index, torch.from_numpy(np.array(image)), captions

    def __getstate__(self):
        return {**self.__dict__, "_opened": (None, None)}

    def use_features(self, paths):
        """Yield the regions of cache files from now on: of the images and, where wanted, of their mirror images."""
        self.features, self._opened = paths, (None, None)

    def read_all(self):
        """Read all photos into memory, once for all workers."""
        with h5py.File(self.images_path) as file:
            self.memory = torch.from_numpy(file["images"][:])  # tensors are shared between processes

    def _images(self):
        if self.memory is not None:
            return self.memory.numpy()
        if self._opened[0] != os.getpid():
            maps = [np.load(path, mmap_mode="r") for path in self.features]
            self._opened = (os.getpid(), maps or h5py.File(self.images_path)["images"])
        return self._opened[1]


def place_of(item):
    """The place in its split of a dataset's item: i of both i and ~i, its mirror image."""
    return max(item, ~item)


def collate(items):
    """Make a `Batch` of dataset items."""
    items = [(index, image, sorted(captions, key=len, reverse=True)) for index, image, captions in items]
    items.sort(key=lambda item: len(item[2][0]), reverse=True)
    indices, images, captions = zip(*items, strict=True)
    longest = len(captions[0][0])
    words = torch.full((len(items), max(map(len, captions)), longest), PAD)
    lengths = torch.zeros(words.shape[:2], dtype=torch.long)
    for b, one_image in enumerate(captions):
        for c, caption in enumerate(one_image):
            words[b, c, : len(caption)] = torch.tensor(caption)
            lengths[b, c] = len(caption) - 1
    return Batch(torch.stack(images), words, lengths, list(indices))


def leave_signals_to_the_parent(_):
    """Let a worker outlive a Ctrl-C or SIGTERM to the whole group: the main process finishes its step and saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setsid"):
        os.setsid()


def make_loader(dataset, batches, workers=0, start_method=None):
    """A loader of batches, each given as a list of indices; where several processes train, of this one's share."""
    shares = [batch[rank() :: world_size()] for batch in batches]
    return DataLoader(
        dataset,
        batch_sampler=[share for share in shares if share],
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=leave_signals_to_the_parent,
        generator=torch.Generator(),  # a loader must not draw from the generator of the dropout
        multiprocessing_context=start_method if workers else None,
    )


def split_order(order, batch_size):
    """Cut a list of indices into batches; the last may be smaller, yet gives each process an image."""
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    if len(batches) > 1 and len(batches[-1]) < world_size():
        batches[-2:] = [batches[-2] + batches[-1]]
    return batches


def epoch_order(length, seed, epoch, mirror=False):
    """The shuffled items of one epoch, half of them mirror images if asked for.

    A function of these arguments alone, so that a resumed run sees the same.
    """
    generator = torch.Generator().manual_seed((seed * 100_003 + epoch) % 2**63)
    order = torch.randperm(length, generator=generator)
    if mirror:
        order = torch.where(torch.rand(length, generator=generator) < 0.5, ~order, order)
    return order.tolist()


# ---------------------------------------------------------------------------------------------- feature cache


def open_split(data_folder, split, vocabulary, captioner, cached, device, dtype, mirror=False, in_memory=False):
    """One split as a captioner takes it: photos, or where `cached` the regions of its frozen encoder.

    `mirror` makes the regions of mirror images, too; those of photos need no preparation. `in_memory` reads all photos
    at once.
    """
    card = read_card(data_folder)
    if (card["image_size"], card["resize"]) != (captioner.image_size, captioner.resize):
        raise InputError(
            f"{data_folder} has images of {card['image_size']} pixels, made by {card['resize']}, the model was trained "
            f"on {captioner.image_size}, {captioner.resize}: run "
            f"create_input_files.py --image_size {captioner.image_size} --resize {captioner.resize}"
        )
    dataset = CaptionDataset(data_folder, split, vocabulary)
    if cached:
        kinds = (False, True) if mirror else (False,)
        dataset.use_features([cache_features(dataset, split, captioner.encoder, device, dtype, kind) for kind in kinds])
    elif in_memory:
        dataset.read_all()
    return dataset


def module_digest(module):
    """A fingerprint of a module's weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.inference_mode()
def cache_features(dataset, split, encoder, device, dtype, mirrored=False, batch_size=32):
    """The file of a frozen encoder's regions of all images, (I, R, D) float16; computed where there is none yet.

    Its name is a fingerprint of the network, its layer and grid, its weights, the images, whether they are mirrored,
    and the number format, so the features of anything else are never taken for these. Raises InputError for features
    that float16 cannot hold.
    """
    with h5py.File(dataset.images_path) as file:
        images_digest = file.attrs["digest"]
    made_from = (encoder.name, encoder.layer, encoder.grid_size, module_digest(encoder), images_digest, str(dtype))
    key = hashlib.sha256(repr((*made_from, mirrored)).encode()).hexdigest()[:16]
    kind = f"{split}_mirrored" if mirrored else split
    path = dataset.images_path.parent / "features" / f"{kind}_{encoder.name}_{encoder.layer}_{key}.npy"
    if gather([path.is_file()])[0]:  # the first process decides for all
        return path
    encoder.eval()
    shape = (len(dataset), encoder.number_of_regions, encoder.region_size)
    batches = split_order([~i if mirrored else i for i in range(len(dataset))], batch_size)
    title, finite = f"{encoder.name} features of {kind}", True
    with written_whole(path) if rank() == 0 else contextlib.nullcontext() as temporary:
        temporary = gather([temporary])[0]  # the first process's: all write their rows into one file
        if rank() == 0:
            np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
        barrier()
        with (
            open(temporary, "rb+") as file,  # written and not mapped: a full disk is then an error and not a crash
            tqdm(total=len(dataset), desc=title, unit="image", disable=rank() > 0) as bar,
        ):
            row_size = encoder.number_of_regions * encoder.region_size * 2  # bytes
            first_row = os.path.getsize(temporary) - len(dataset) * row_size
            for batch in make_loader(dataset, batches):
                with autocast(device, dtype):
                    regions = encoder(batch.images.to(device, non_blocking=True)).half().cpu().numpy()  # (B, R, D)
                assert regions.shape[1:] == shape[1:], "the photos are not of the encoder's image size"
                if not np.isfinite(regions).all():
                    finite = False
                    break
                for index, row in zip(batch.indices, regions, strict=True):
                    file.seek(first_row + place_of(index) * row_size)
                    file.write(row.tobytes())
                bar.update(len(regions) * world_size())
        if not all(gather([finite])):
            raise InputError(
                f"{encoder.name}'s features do not fit into float16, as random weights may make them: train with "
                f"--encoder_weights, or with --fine_tune_encoder"
            )
    barrier()
    return path
