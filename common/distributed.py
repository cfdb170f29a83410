"""Processes that train together (torchrun): their ranks and what they exchange."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, distributed

from utils import InputError, choose_device


def rank() -> int:
    """Return the rank of this process; rank 0, the first or only process, writes files and prints."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes that train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


@contextlib.contextmanager
def init_distributed(device_name: str) -> Iterator[torch.device]:
    """Join the process group if torchrun started this process; yields its device."""
    if not distributed.is_torchelastic_launched():
        yield choose_device(device_name)
        return
    if device_name == "cuda" or (device_name == "auto" and torch.cuda.is_available()):
        device_name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = choose_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    output = io.StringIO() if rank() else sys.stdout  # only rank 0 prints
    try:
        with contextlib.redirect_stdout(output):
            yield device
    finally:
        distributed.destroy_process_group()


def all_reduce_sum(values: list) -> list:
    """Sum numbers over all processes; each keeps its type."""
    if world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(total)
    return [type(value)(summed) for value, summed in zip(values, total.tolist(), strict=True)]


def all_gather(items: list) -> list:
    """Join the lists of all processes in the order of their ranks."""
    if world_size() == 1:
        return items
    lists: list[Any] = [None] * world_size()
    distributed.all_gather_object(lists, items)
    return [item for items in lists for item in items]


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors with those of rank 0."""
    if world_size() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor, 0)


def on_rank_zero(function: Callable[[], Any]) -> Any:
    """Call a function on rank 0 only. All processes return its result, or raise its InputError or OSError."""
    result = error = None
    if rank() == 0:
        try:
            result = function()
        except (InputError, OSError) as raised:
            error = raised
    result, error = all_gather([(result, error)])[0]
    if error:
        raise error
    return result
