"""The feature cache: the features of a frozen encoder, computed once for all epochs and runs."""

import contextlib
import functools
import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import torch
from tqdm import tqdm

from common.distributed import all_gather, on_rank_zero, rank, world_size
from common.files import hold_lock, name_in_errors, nearest_existing, require_writable
from datasets import Batch, CaptionDataset, in_order, make_batches, make_loader
from models import Captioner
from modules.encoders import Encoder, NoEncoder, folded_encoder
from preparation.storage import read_metadata, region_info
from utils import InputError, Runtime, copy_to_device

NEEDS_BOXES = "leave out --box_features, --geometry and --graph_edges spatial, or prepare features with boxes"
BATCH_SIZE, GPU_BATCH_SIZE = 16, 64  # images that a process encodes at once; 16 fit into the cache of a CPU
SAVE_EVERY = 64  # batches after which the features are on the disk, whatever happens then


def build_dataset(
    data_folder: str | Path,
    split: str,
    captioner: Captioner,
    runtime: Runtime,
    *,
    hflip: bool = False,
    in_memory: bool = False,
    features_folder: str = "",
    cached: bool = True,
    with_objects: bool = True,
) -> CaptionDataset:
    """One split as a captioner takes it: images or, where its encoder is frozen, their cached features.

    Args:
        hflip: cache the features of flipped images, too.
        in_memory: read all images into memory at once.
        features_folder: where features are cached; "": in `features` of the data folder or, where that cannot be
            written, in the user's cache.
        with_objects: False leaves out the boxes of objects, whatever the captioner uses.
        cached: False yields images, whatever the encoder, as several views of a photo need them.

    Raises InputError where the folder's images are not of the captioner's size, where it has no objects and the
    captioner needs them, or where features cannot be cached.
    """
    metadata = read_metadata(data_folder)
    require_fitting_images(captioner, metadata, data_folder)
    dataset = CaptionDataset(data_folder, split, captioner.vocabulary, metadata)
    encoder = captioner.encoder
    if isinstance(encoder, NoEncoder):
        info = region_info(metadata)
        if not info or info.feature_dim != encoder.feature_dim:
            problem = f"region features of {info.feature_dim} numbers" if info else "no region features"
            raise InputError(
                f"{data_folder} has {problem}, the model takes those of {encoder.feature_dim}: run "
                f"create_input_files.py with --region_features"
            )
        if captioner.needs_boxes and not info.has_boxes:
            raise InputError(f"{data_folder} has region features without boxes, which the model needs: {NEEDS_BOXES}")
        dataset.use_region_features()
        return dataset
    if with_objects and captioner.uses_objects:
        dataset.use_objects()
    if cached and not captioner.fine_tune_encoder:
        names = cache_names(dataset, encoder, runtime, hflip)
        size = len(dataset) * encoder.num_regions * encoder.feature_dim * 2  # bytes, of float16
        folder, missing = on_rank_zero(lambda: prepare_cache(names, size, data_folder, features_folder))
        for name in missing:
            compute_features(folder / name, dataset, encoder, runtime, flipped=name != names[0])
        dataset.use_features([folder / name for name in names])
    elif in_memory:
        dataset.load_into_memory()
    return dataset


def require_fitting_images(captioner: Any, metadata: dict[str, Any], data_folder: str | Path) -> None:
    """Raise InputError where a folder of this metadata has other images than a captioner, or an ensemble, takes."""
    if (metadata["image_size"], metadata["resize"]) != (captioner.image_size, captioner.resize):
        raise InputError(
            f"{data_folder} has images of {metadata['image_size']} pixels, made by {metadata['resize']}, the model "
            f"was trained on {captioner.image_size}, {captioner.resize}: run create_input_files.py "
            f"--image_size {captioner.image_size} --resize {captioner.resize}"
        )


def cache_names(dataset: CaptionDataset, encoder: Encoder, runtime: Runtime, hflip: bool) -> list[str]:
    """The names of the files of a split's features: those of its images and, with hflip, of the flipped images.

    A name holds a fingerprint of the network, its layer and grid, its weights, the images, whether they are flipped,
    and the dtype, so the features of anything else are never taken for these.
    """
    with h5py.File(dataset.images_path) as file:
        images_digest = file.attrs["digest"]
    source = (*encoder.fingerprint(), images_digest)
    split, names = dataset.images_path.stem.removesuffix("_images"), []
    for flipped in (False, True) if hflip else (False,):
        key = hashlib.sha256(repr((*source, str(runtime.dtype), flipped)).encode()).hexdigest()[:16]
        names.append(f"{split}{'_flipped' if flipped else ''}_{encoder.name}_{encoder.layer}_{key}.npy")
    return names


def prepare_cache(names: list[str], size: int, data_folder: str | Path, features_folder: str) -> tuple[Path, list[str]]:
    """The folder of the cache, and which of the names are not there yet, each a file of `size` bytes to come.

    Raises InputError where the folder cannot be written or has no room.
    """
    folder = Path(features_folder or Path(data_folder) / "features")
    if not all((folder / name).is_file() for name in names):
        try:
            require_writable(folder)
        except InputError:
            if features_folder:
                raise
            folder = user_cache(folder)
    missing = [name for name in names if not (folder / name).is_file()]
    partials = [path for name in missing if (path := folder / f"{name}.partial").is_file()]
    needed = len(missing) * size - sum(path.stat().st_size for path in partials)
    free = shutil.disk_usage(nearest_existing(folder)).free
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

    They are written into PATH.partial, whose header counts the rows that are complete and on the disk, so that what a
    killed run has computed is kept. Where another program computes the same features, this one waits for it.

    Raises InputError for features that float16 cannot hold, OSError for a full disk.
    """
    partial = path.with_name(f"{path.name}.partial")
    shape = (len(dataset), encoder.num_regions, encoder.feature_dim)
    encoder = folded_encoder(encoder)
    title = f"{encoder.name} features of {dataset.images_path.stem}{', flipped' if flipped else ''}"
    with contextlib.ExitStack() as stack:
        if not on_rank_zero(lambda: try_lock(path, stack)):
            print(f"{path} is being computed by another program, waiting for it")
            while not on_rank_zero(lambda: try_lock(path, stack)):
                time.sleep(1)
        complete = on_rank_zero(lambda: len(dataset) if path.is_file() else open_partial(partial, shape))
        batch_size = BATCH_SIZE if runtime.device.type == "cpu" else GPU_BATCH_SIZE
        batches = make_batches(in_order(len(dataset), flipped), batch_size * world_size())
        batches = [batch for batch in batches if batch[-1][0] >= complete]
        bar = stack.enter_context(
            tqdm(total=len(dataset), initial=complete, desc=title, unit="image", disable=rank() > 0)
        )
        for first in range(0, len(batches), SAVE_EVERY):
            part = batches[first : first + SAVE_EVERY]
            encoded = encode_batches(make_loader(dataset, part), encoder, runtime)
            write_features(partial, encoded, bar)
            on_rank_zero(lambda rows=part[-1][-1][0] + 1: write_header(partial, (rows, *shape[1:])))
        if not on_rank_zero(path.is_file):
            on_rank_zero(lambda: publish(partial, path, shape))


def try_lock(path: Path, stack: contextlib.ExitStack) -> bool:
    """Lock a file of features until the stack is closed; False where another program computes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        stack.enter_context(hold_lock(path.with_name(f".{path.name}.lock"), ""))
    except InputError:
        return False
    return True


def open_partial(path: Path, shape: tuple[int, ...]) -> int:
    """The number of complete rows in an unfinished file of an array of this shape; begins the file where it is new."""
    try:
        with open(path, "rb") as file:
            (rows, *row_shape), _ = read_header(file)
            if tuple(row_shape) == shape[1:]:
                return rows
    except (FileNotFoundError, ValueError):  # new, or killed as it was begun
        pass
    with name_in_errors(path):
        path.write_bytes(b"")
    write_header(path, (0, *shape[1:]))
    return 0


def read_header(file: BinaryIO) -> tuple[tuple[int, ...], int]:
    """The shape in the header of an array's file, and where its first row begins; ValueError where there is none."""
    np.lib.format.read_magic(file)
    shape, _, _ = np.lib.format.read_array_header_1_0(file)
    return shape, file.tell()


def write_header(path: Path, shape: tuple[int, ...]) -> None:
    """Write the header of an array's file; numpy pads it so that it has one length for any number of rows."""
    with name_in_errors(path), open(path, "rb+") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
        file.flush()
        os.fsync(file.fileno())


def publish(partial: Path, path: Path, shape: tuple[int, ...]) -> None:
    """Give a complete file its name. Without locks another program may have counted fewer rows in it meanwhile."""
    write_header(partial, shape)
    os.replace(partial, path)


def encode_batches(
    loader: Iterable[Batch], encoder: Encoder, runtime: Runtime
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield the indices of each batch's images and their features (B, R, F) float16; InputError for an overflow."""
    for batch in loader:
        with torch.inference_mode(), runtime.autocast():
            features = encoder(copy_to_device(batch.inputs, runtime.device)).half().cpu().numpy()
        assert features.shape[1:] == (encoder.num_regions, encoder.feature_dim), "images of another size"
        if not np.isfinite(features).all():
            raise InputError(
                f"{encoder.name}'s features do not fit into float16, as random weights may make them: train with "
                f"--encoder_weights, or with --fine_tune_encoder"
            )
        yield batch.indices, features


def write_features(path: Path, encoded: Iterable[tuple[list[int], np.ndarray]], bar: tqdm) -> None:
    """Write features into their rows of an array's file and, before it returns, to the disk.

    Raises the InputError or OSError of any process; features that do not fit remove the file.
    """
    error = None
    try:
        # Written and not mapped: a full disk is then an error and not a crash.
        with name_in_errors(path), open(path, "rb+") as file:
            _, first_row = read_header(file)
            for indices, features in encoded:
                for index, row in zip(indices, features, strict=True):
                    file.seek(first_row + index * row.nbytes)
                    file.write(row.tobytes())
                bar.update(len(features) * world_size())
            file.flush()
            os.fsync(file.fileno())
    except (InputError, OSError) as raised:
        error = raised
    for raised in filter(None, all_gather([error])):  # of any process
        if isinstance(raised, InputError):
            on_rank_zero(path.unlink)
        raise raised
