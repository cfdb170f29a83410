"""The feature cache: the features of a frozen encoder, computed once for all epochs and runs."""

import contextlib
import hashlib
import os
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from common.distributed import all_gather, barrier, rank, world_size
from common.files import atomic_write
from datasets import CaptionDataset, in_order, make_batches, make_loader
from models import Captioner
from modules.encoders import Encoder
from preparation.storage import read_metadata
from text.vocabulary import Vocabulary
from utils import InputError, Runtime


def build_dataset(
    data_folder: str | Path,
    split: str,
    vocabulary: Vocabulary,
    captioner: Captioner,
    runtime: Runtime,
    *,
    hflip: bool = False,
    in_memory: bool = False,
) -> CaptionDataset:
    """One split as a captioner takes it: images or, where its encoder is frozen, their cached features.

    Args:
        hflip: cache the features of flipped images, too.
        in_memory: read all images into memory at once.

    Raises InputError where the folder's images are not of the captioner's size.
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
        paths = [cache_features(dataset, split, captioner.encoder, runtime, flipped=False)]
        if hflip:
            paths.append(cache_features(dataset, split, captioner.encoder, runtime, flipped=True))
        dataset.use_features(paths)
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


def cache_path(dataset: CaptionDataset, split: str, encoder: Encoder, runtime: Runtime, flipped: bool) -> Path:
    """Where a split's features lie.

    The name holds a fingerprint of the network, its layer and grid, its weights, the images, whether they are flipped,
    and the dtype, so the features of anything else are never taken for these.
    """
    with h5py.File(dataset.images_path) as file:
        images_digest = file.attrs["digest"]
    source = (encoder.name, encoder.layer, encoder.grid_size, module_digest(encoder), images_digest)
    key = hashlib.sha256(repr((*source, str(runtime.dtype), flipped)).encode()).hexdigest()[:16]
    kind = f"{split}_flipped" if flipped else split
    return dataset.images_path.parent / "features" / f"{kind}_{encoder.name}_{encoder.layer}_{key}.npy"


@torch.inference_mode()
def cache_features(
    dataset: CaptionDataset, split: str, encoder: Encoder, runtime: Runtime, *, flipped: bool, batch_size: int = 32
) -> Path:
    """The file of a frozen encoder's features of all images, (I, R, F) float16; computed where there is none yet.

    Each process computes its share. Raises InputError for features that float16 cannot hold.
    """
    path = cache_path(dataset, split, encoder, runtime, flipped)
    if all_gather([path.is_file()])[0]:  # rank 0 decides for all
        return path
    encoder.eval()
    shape = (len(dataset), encoder.num_regions, encoder.feature_dim)
    batches = make_batches(in_order(len(dataset), flipped), batch_size)
    title = f"{encoder.name} features of {split}{', flipped' if flipped else ''}"
    finite = True
    with atomic_write(path) if rank() == 0 else contextlib.nullcontext() as temporary:
        temporary = all_gather([temporary])[0]  # that of rank 0: all write their rows into one file
        if rank() == 0:
            np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
        barrier()
        with (
            open(temporary, "rb+") as file,  # written and not mapped: a full disk is then an error and not a crash
            tqdm(total=len(dataset), desc=title, unit="image", disable=rank() > 0) as bar,
        ):
            row_size = encoder.num_regions * encoder.feature_dim * 2  # bytes
            first_row = os.path.getsize(temporary) - len(dataset) * row_size
            for batch in make_loader(dataset, batches):
                with runtime.autocast():
                    images = batch.inputs.to(runtime.device, non_blocking=True)
                    features = encoder(images).half().cpu().numpy()  # (B, R, F)
                assert features.shape[1:] == shape[1:], "the images are not of the encoder's image size"
                if not np.isfinite(features).all():
                    finite = False
                    break
                for index, row in zip(batch.indices, features, strict=True):
                    file.seek(first_row + index * row_size)
                    file.write(row.tobytes())
                bar.update(len(features) * world_size())
        if not all(all_gather([finite])):
            raise InputError(
                f"{encoder.name}'s features do not fit into float16, as random weights may make them: train with "
                f"--encoder_weights, or with --fine_tune_encoder"
            )
    barrier()
    return path
