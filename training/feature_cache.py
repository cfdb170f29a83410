"""The feature cache: the features of a frozen encoder, computed once for all epochs and runs."""

import contextlib
import functools
import hashlib
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from common.distributed import all_gather, on_rank_zero, rank, world_size
from common.files import atomic_write, nearest_existing, remove_leftovers, require_writable
from datasets import CaptionDataset, in_order, make_batches, make_loader
from models import Captioner
from modules.encoders import Encoder
from preparation.storage import read_metadata
from text.vocabulary import Vocabulary
from utils import InputError, Runtime

BATCH_SIZE = 32  # images that the encoder sees at once


def build_dataset(
    data_folder: str | Path,
    split: str,
    vocabulary: Vocabulary,
    captioner: Captioner,
    runtime: Runtime,
    *,
    hflip: bool = False,
    in_memory: bool = False,
    features_folder: str = "",
) -> CaptionDataset:
    """One split as a captioner takes it: images or, where its encoder is frozen, their cached features.

    Args:
        hflip: cache the features of flipped images, too.
        in_memory: read all images into memory at once.
        features_folder: where features are cached; "": in `features` of the data folder or, where that cannot be
            written, in the user's cache.

    Raises InputError where the folder's images are not of the captioner's size, or features cannot be cached.
    """
    metadata = read_metadata(data_folder)
    if (metadata["image_size"], metadata["resize"]) != (captioner.image_size, captioner.resize):
        raise InputError(
            f"{data_folder} has images of {metadata['image_size']} pixels, made by {metadata['resize']}, the model "
            f"was trained on {captioner.image_size}, {captioner.resize}: run create_input_files.py "
            f"--image_size {captioner.image_size} --resize {captioner.resize}"
        )
    dataset = CaptionDataset(data_folder, split, vocabulary, metadata)
    if not captioner.fine_tune_encoder:
        encoder = captioner.encoder
        names = cache_names(dataset, encoder, runtime, hflip)
        size = len(dataset) * encoder.num_regions * encoder.feature_dim * 2  # bytes, of float16
        folder, missing = on_rank_zero(lambda: prepare_cache(names, size, data_folder, features_folder))
        for name in missing:
            compute_features(folder / name, dataset, encoder, runtime, flipped=name != names[0])
        dataset.use_features([folder / name for name in names])
    elif in_memory:
        dataset.load_into_memory()
    return dataset


def module_digest(module: nn.Module) -> str:
    """A fingerprint of a module's weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def cache_names(dataset: CaptionDataset, encoder: Encoder, runtime: Runtime, hflip: bool) -> list[str]:
    """The names of the files of a split's features: those of its images and, with hflip, of the flipped images.

    A name holds a fingerprint of the network, its layer and grid, its weights, the images, whether they are flipped,
    and the dtype, so the features of anything else are never taken for these.
    """
    with h5py.File(dataset.images_path) as file:
        images_digest = file.attrs["digest"]
    source = (encoder.name, encoder.layer, encoder.grid_size, module_digest(encoder), images_digest)
    split, names = dataset.images_path.stem.removesuffix("_images"), []
    for flipped in (False, True) if hflip else (False,):
        key = hashlib.sha256(repr((*source, str(runtime.dtype), flipped)).encode()).hexdigest()[:16]
        names.append(f"{split}{'_flipped' if flipped else ''}_{encoder.name}_{encoder.layer}_{key}.npy")
    return names


def prepare_cache(names: list[str], size: int, data_folder: str | Path, features_folder: str) -> tuple[Path, list[str]]:
    """The folder of the cache, and which of the names are not there yet, each a file of `size` bytes to come.

    Removes what killed processes left there. Raises InputError where the folder cannot be written or has no room.
    """
    folder = Path(features_folder or Path(data_folder) / "features")
    if not all((folder / name).is_file() for name in names):
        try:
            require_writable(folder)
        except InputError:
            if features_folder:
                raise
            folder = user_cache(folder)
    remove_leftovers(folder, ".*.partial-*.npy")
    missing = [name for name in names if not (folder / name).is_file()]
    needed, free = len(missing) * size, shutil.disk_usage(nearest_existing(folder)).free
    if needed > free:
        raise InputError(
            f"the encoder's features take {needed / 1e6:,.0f} MB, {folder} has {free / 1e6:,.0f} MB free: make room, "
            f"or give a --features_folder on another disk"
        )
    return folder, missing


@functools.cache  # printed once
def user_cache(unwritable: Path) -> Path:
    """The folder for features in the user's cache, instead of one that cannot be written.

    Raises InputError where it cannot be written either.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "image-captioning" / "features"
    try:
        require_writable(folder)
    except InputError:
        raise InputError(
            f"features can be cached neither in {unwritable} nor in {folder}: give a --features_folder that you may "
            f"write into"
        ) from None
    print(f"{unwritable} cannot be written: features are cached in {folder}, --features_folder chooses another place")
    return folder


def compute_features(path: Path, dataset: CaptionDataset, encoder: Encoder, runtime: Runtime, flipped: bool) -> None:
    """Write a frozen encoder's features of all images, (I, R, F) float16; each process computes its share.

    Raises InputError for features that float16 cannot hold, OSError for a full disk.
    """
    error = None
    with contextlib.ExitStack() as stack:

        def make_file() -> Path:
            temporary = stack.enter_context(atomic_write(path))
            shape = (len(dataset), encoder.num_regions, encoder.feature_dim)
            np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
            return temporary

        temporary = on_rank_zero(make_file)  # all processes write their rows into one file
        try:
            write_features(temporary, dataset, encoder, runtime, flipped)
        except (InputError, OSError) as raised:
            error = raised
        for raised in filter(None, all_gather([error])):  # by any process
            raise raised
        on_rank_zero(stack.close)


@torch.inference_mode()
def write_features(path: Path, dataset: CaptionDataset, encoder: Encoder, runtime: Runtime, flipped: bool) -> None:
    """Write the features of this process's share of the images into their rows of an array's file."""
    encoder.eval()
    batches = make_batches(in_order(len(dataset), flipped), BATCH_SIZE)
    title = f"{encoder.name} features of {dataset.images_path.stem}{', flipped' if flipped else ''}"
    with (
        open(path, "rb+") as file,  # written and not mapped: a full disk is then an error and not a crash
        tqdm(total=len(dataset), desc=title, unit="image", disable=rank() > 0) as bar,
    ):
        row_size = encoder.num_regions * encoder.feature_dim * 2  # bytes
        first_row = os.path.getsize(path) - len(dataset) * row_size
        for batch in make_loader(dataset, batches):
            with runtime.autocast():
                images = batch.inputs.to(runtime.device, non_blocking=True)
                features = encoder(images).half().cpu().numpy()  # (B, R, F)
            assert features.shape[1:] == (encoder.num_regions, encoder.feature_dim), "images of another size"
            if not np.isfinite(features).all():
                raise InputError(
                    f"{encoder.name}'s features do not fit into float16, as random weights may make them: train with "
                    f"--encoder_weights, or with --fine_tune_encoder"
                )
            for index, row in zip(batch.indices, features, strict=True):
                file.seek(first_row + index * row_size)
                file.write(row.tobytes())
            bar.update(len(features) * world_size())
