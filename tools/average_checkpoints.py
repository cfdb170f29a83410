"""Average the weights of models that share a start: python tools/average_checkpoints.py runs/a/best.pt runs/b/best.pt

The result captions as fast as one model. docs/training.md has an example.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.files import require_writable, save_torch
from models import DATA_KEYS, captioner_from_checkpoint, load_checkpoint
from utils import BaseSettings, InputError, run_script

ENCODER = "encoder."  # prefix of the names of its weights


@dataclass(frozen=True, kw_only=True)
class Settings(BaseSettings):
    """Write a checkpoint whose weights are the mean of those of several checkpoints of one model ("model soup")."""

    checkpoints: tuple[str, ...]  # what train.py wrote, two or more runs that began with the same --init_from
    output: str = "runs/soup/best.pt"  # the new checkpoint
    overwrite: bool = False  # replace an existing output


def average_weights(models: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Average state dicts with the same names and shapes; tensors of integers are those of the first.

    Source: "Model soups" (Wortsman et al., 2022), the uniform soup.
    """
    mean = {}
    for name, first in models[0].items():
        mean[name] = first
        if first.is_floating_point() and not all(torch.equal(first, model[name]) for model in models[1:]):
            mean[name] = torch.stack([model[name].double() for model in models]).mean(dim=0).to(first.dtype)
    return mean


def require_same_model(first: dict[str, Any], other: dict[str, Any], paths: tuple[str, str]) -> None:
    """Raise InputError if the weights of two checkpoints cannot be averaged: their models or data differ."""
    between = " and ".join(paths)
    settings = (first["model_settings"], other["model_settings"])
    for name in sorted(settings[0]):
        values = tuple(each[name] for each in settings)
        if name not in ("dropout", "encoder_weights") and values[0] != values[1]:
            raise InputError(f"{between} are different models: {name} is {values[0]!r} and {values[1]!r}")
    for name in ("words", *DATA_KEYS):
        if first[name] != other[name]:
            raise InputError(f"{between} are models of different data: they differ in {name}")
    frozen = [name for name in first["model"] if name.startswith(ENCODER) and not first["fine_tune_encoder"]]
    if any(not torch.equal(first["model"][name], other["model"][name]) for name in frozen):
        raise InputError(f"{between} have different frozen encoders: average models that look at the same features")


def main(settings: Settings) -> None:
    """Read the checkpoints, average their weights and write the result."""
    if len(settings.checkpoints) < 2:
        raise InputError("give two checkpoints or more")
    if Path(settings.output).exists():
        load_checkpoint(settings.output)  # refuse to overwrite any other file
        if not settings.overwrite:
            raise InputError(f"{settings.output} exists: give --overwrite or another --output")
    checkpoints = []
    for path in settings.checkpoints:
        checkpoint = load_checkpoint(path)
        captioner_from_checkpoint(checkpoint, path)  # its weights fit its settings and are finite
        if checkpoints:
            require_same_model(checkpoints[0], checkpoint, (settings.checkpoints[0], path))
        if "optimizer" in checkpoint:
            raise InputError(f"{path} is the last.pt of a run: give its best.pt")
        if not checkpoint.get("settings", {}).get("init_from"):
            raise InputError(f"{path} was trained from scratch: average runs that began with the same --init_from")
        checkpoints.append(checkpoint)
    weights = average_weights([checkpoint["model"] for checkpoint in checkpoints])
    require_writable(Path(settings.output).parent)
    save_torch(settings.output, checkpoints[0] | {"model": weights})
    print(f"{settings.output}: the mean of {len(checkpoints)} models")


if __name__ == "__main__":
    run_script(main, Settings)
