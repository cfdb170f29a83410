"""Several processes that train together (torchrun): their ranks and what they exchange."""

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
    """The rank of this process; 0 for the first or only one, which writes files and prints."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """The number of processes that train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


@contextlib.contextmanager
def init_distributed(device_name: str) -> Iterator[torch.device]:
    """Join the process group where torchrun started several processes; yields this process's device."""
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
    """Numbers summed over all processes, each of its type."""
    if world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(total)
    return [type(value)(summed) for value, summed in zip(values, total.tolist(), strict=True)]


def all_gather(items: list) -> list:
    """The lists of all processes joined in the order of their ranks."""
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
    """Call a function on rank 0 alone; all processes get what it returns, or raise its InputError or OSError."""
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
