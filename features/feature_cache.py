"""Open datasets with the inputs that a captioner needs; compute a frozen encoder's features once and cache them."""

import contextlib
import functools
import hashlib
import os
import shutil
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from common.distributed import all_gather, on_rank_zero, rank, world_size
from common.files import hold_lock, name_in_errors, nearest_existing, require_writable
from datasets import CaptionDataset, in_order, make_batches, make_loader
from models import Captioner
from modules.encoders import Encoder, NoEncoder, folded_encoder
from preparation.storage import read_metadata, region_info
from utils import InputError, Runtime, copy_to_device

BATCH_SIZE, GPU_BATCH_SIZE = 16, 64  # images that a process encodes at once; 16 fit into the cache of a CPU
SAVE_EVERY = 64  # batches between two writes of the number of complete rows
HEADER_BYTES = 128  # of a .npy file, for any shape of features: NumPy pads the header


def build_dataset(
    data_folder: str | Path,
    split: str,
    captioner: Captioner,
    runtime: Runtime,
    *,
    hflip: bool = False,
    features_folder: str = "",
    cached: bool = True,
    with_objects: bool = True,
) -> CaptionDataset:
    """Open a split with the inputs that a captioner takes: images, cached features or region features.

    Args:
        hflip: also cache the features of flipped images.
        features_folder: where to cache features; "": `features` in the data folder, or the user's cache if the data
            folder cannot be written.
        cached: False yields images even if the encoder is frozen, for several views of a photo.
        with_objects: False leaves out the boxes of objects even if the captioner uses them.

    Raises InputError if the folder lacks what the captioner needs (images of its size, objects, region features), or
    if features cannot be cached.
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
            raise InputError(
                f"{data_folder} has region features without boxes, which the model needs: leave out --box_features, "
                f"--geometry and --graph_edges spatial, or prepare features with boxes"
            )
        dataset.use_region_features()
        return dataset
    if with_objects and captioner.uses_objects:
        dataset.use_objects()
    if cached and not captioner.fine_tune_encoder:
        dataset.use_features(cache_features(dataset, encoder, runtime, hflip, features_folder))
    return dataset


def require_fitting_images(captioner: Any, metadata: dict[str, Any], data_folder: str | Path) -> None:
    """Raise InputError if a captioner, or an ensemble, takes other images than those of a folder with this metadata."""
    if (metadata["image_size"], metadata["resize"]) != (captioner.image_size, captioner.resize):
        raise InputError(
            f"{data_folder} has images of {metadata['image_size']} pixels, made by {metadata['resize']}, the model "
            f"was trained on {captioner.image_size}, {captioner.resize}: run create_input_files.py "
            f"--image_size {captioner.image_size} --resize {captioner.resize}"
        )


def cache_features(
    dataset: CaptionDataset, encoder: Encoder, runtime: Runtime, hflip: bool, features_folder: str
) -> list[Path]:
    """Compute the features of a split that are not cached yet; return the files, of images and of flipped images.

    A file's name holds a fingerprint of what the features depend on: network, layer, grid, weights, images, precision
    and flip.
    """
    with h5py.File(dataset.images_path) as file:
        source = (*encoder.fingerprint(), file.attrs["digest"], str(runtime.dtype))
    names = []
    for flipped in (False, True) if hflip else (False,):
        key = hashlib.sha256(repr((*source, flipped)).encode()).hexdigest()[:16]
        names.append(f"{dataset.split}{'_flipped' if flipped else ''}_{encoder.name}_{encoder.layer}_{key}.npy")
    size = len(dataset) * encoder.num_regions * encoder.feature_dim * 2  # bytes of float16
    default = dataset.images_path.parent / "features"
    folder, missing = on_rank_zero(lambda: prepare_folder(names, size, features_folder, default))
    for name in missing:
        compute_features(folder / name, dataset, encoder, runtime, flipped=name != names[0])
    return [folder / name for name in names]


def prepare_folder(names: list[str], size: int, features_folder: str, default: Path) -> tuple[Path, list[str]]:
    """Return the folder of the cache and the names that it lacks, each to become a file of `size` bytes.

    Raises InputError if the folder cannot be written or has no room for them.
    """
    folder = Path(features_folder or default)
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


@functools.cache  # to print once
def user_cache(unwritable: Path) -> Path:
    """Return the folder for features in the user's cache; raise InputError if it cannot be written either."""
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

    The header of PATH.partial counts the rows that are complete and on disk, so a killed run loses only those after
    them. If another program is computing the same features, wait for it.

    Raises InputError for features that float16 cannot hold, OSError if the disk is full.
    """
    partial = path.with_name(f"{path.name}.partial")
    shape = (len(dataset), encoder.num_regions, encoder.feature_dim)
    title = f"{encoder.name} features of {dataset.images_path.stem}{', flipped' if flipped else ''}"
    encoder = folded_encoder(encoder)
    batch_size = world_size() * (BATCH_SIZE if runtime.device.type == "cpu" else GPU_BATCH_SIZE)
    with contextlib.ExitStack() as stack:
        if not on_rank_zero(lambda: try_lock(path, stack)):
            print(f"{path} is being computed by another program, waiting for it")
            while not on_rank_zero(lambda: try_lock(path, stack)):
                time.sleep(1)
        if on_rank_zero(path.is_file):  # by the other program
            return
        rows = on_rank_zero(lambda: open_partial(partial, shape))
        batches = make_batches(in_order(len(dataset), flipped)[rows:], batch_size)
        progress = tqdm(total=len(dataset), initial=rows, desc=title, unit="image", disable=rank() > 0)
        bar = stack.enter_context(progress)
        for first in range(0, len(batches), SAVE_EVERY):
            part = batches[first : first + SAVE_EVERY]
            write_features(partial, make_loader(dataset, part), encoder, runtime, bar)
            last, _ = part[-1][-1]
            on_rank_zero(lambda rows=last + 1: write_header(partial, (rows, *shape[1:])))
        on_rank_zero(lambda: publish(partial, path, shape))


def try_lock(path: Path, stack: contextlib.ExitStack) -> bool:
    """Lock a file of features until the stack is closed; return False if another program has locked it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        stack.enter_context(hold_lock(path.with_name(f".{path.name}.lock"), ""))
    except InputError:
        return False
    return True


def open_partial(path: Path, shape: tuple[int, ...]) -> int:
    """Return the number of complete rows in a partial file; start the file anew if it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, EOFError):
        rows = np.load(path, mmap_mode="r")
        if rows.shape[1:] == shape[1:]:
            return len(rows)
    with name_in_errors(path):
        path.write_bytes(b"")
    write_header(path, (0, *shape[1:]))
    return 0


def write_header(path: Path, shape: tuple[int, ...]) -> None:
    """Write the header of a .npy file and leave the rows after it as they are."""
    with name_in_errors(path), open(path, "rb+") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
        assert file.tell() == HEADER_BYTES
        file.flush()
        os.fsync(file.fileno())


def publish(partial: Path, path: Path, shape: tuple[int, ...]) -> None:
    """Rename a complete file; on a disk without locks, another program may have written a header of fewer rows."""
    write_header(partial, shape)
    os.replace(partial, path)


def write_features(path: Path, loader: DataLoader, encoder: Encoder, runtime: Runtime, bar: tqdm) -> None:
    """Write the features of a loader's images into their rows of a .npy file and flush them to disk.

    Plain writes raise OSError on a full disk; a memory map would crash. An error of one process is raised in all.
    """
    error = None
    try:
        with name_in_errors(path), open(path, "rb+") as file:
            for batch in loader:
                with torch.inference_mode(), runtime.autocast():
                    features = encoder(copy_to_device(batch.inputs, runtime.device)).half().cpu().numpy()
                if not np.isfinite(features).all():
                    raise InputError(
                        f"{encoder.name}'s features do not fit into float16, as random weights may make them: train "
                        f"with --encoder_weights, or with --fine_tune_encoder"
                    )
                for index, row in zip(batch.indices, features, strict=True):
                    file.seek(HEADER_BYTES + index * row.nbytes)
                    file.write(row.tobytes())
                bar.update(len(features) * world_size())
            file.flush()
            os.fsync(file.fileno())
    except (InputError, OSError) as raised:
        error = raised
    for raised in filter(None, all_gather([error])):
        if isinstance(raised, InputError):
            on_rank_zero(path.unlink)
        raise raised
