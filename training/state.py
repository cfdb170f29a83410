"""The state of a training run and its checkpoints: all that a run changes, saves and restores."""

from __future__ import annotations

import contextlib
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from common.distributed import all_gather, all_reduce_sum, on_rank_zero, rank
from common.files import save_torch
from models import CHECKPOINT_FORMAT, Captioner, model_settings
from modules.encoders import NoEncoder
from training.optim import ModelEMA
from utils import InputError, has_type

if TYPE_CHECKING:
    from train import Settings

# What Adam's groups have besides their parameters; the rest depends on torch's version.
ADAM_GROUP = {"lr": 0.0, "initial_lr": 0.0, "betas": (0.9, 0.999), "eps": 0.0, "weight_decay": 0.0}


@dataclass
class TrainState:
    """All that a training run changes as it goes, and so all that it must save."""

    settings: Settings
    captioner: Captioner
    optimizer: torch.optim.Optimizer
    ema: ModelEMA
    network: nn.Module  # the captioner, in DistributedDataParallel where there are several processes
    data_digest: str  # of the data folder
    data_folders: list[str]  # where that data has been found, the latest first
    epoch: int = 0  # complete epochs
    step: int = 0  # steps of the current epoch
    seconds: float = 0.0  # that they took
    loss: float = 0.0  # cross-entropy or, under SCST, reward in them, summed over the words or captions of this process
    count: int = 0  # of these words or captions
    best_key: tuple[float, ...] = ()  # of the best epoch so far (`training.validation.epoch_key`)
    epochs_since_improvement: int = 0

    PROGRESS: ClassVar = ("epoch", "step", "seconds", "best_key", "epochs_since_improvement")

    @property
    def device(self) -> torch.device:
        """Where the captioner is trained."""
        return next(self.captioner.parameters()).device

    def end_epoch(self, key: tuple[float, ...]) -> bool:
        """Go on to the next epoch; returns whether the one that ends is the best so far.

        An epoch counts against --patience only where the first value of its key has been above 0 in any epoch: until
        then the scores do not tell whether the captioner improves.
        """
        improved = key > self.best_key
        self.best_key = max(key, self.best_key)
        stagnates = not improved and self.best_key[0] > 0
        self.epochs_since_improvement = self.epochs_since_improvement + 1 if stagnates else 0
        self.epoch, self.step, self.seconds, self.loss, self.count = self.epoch + 1, 0, 0.0, 0.0, 0
        return improved

    def save(self, name: str, with_training_state: bool) -> None:
        """Write a checkpoint into the run folder: the averaged weights or, with the training state, the trained ones.

        Every process calls it, rank 0 writes.
        """
        captioner = self.captioner if with_training_state else self.ema.captioner
        checkpoint = {
            "format": CHECKPOINT_FORMAT,
            "model": captioner.state_dict(),
            "model_settings": model_settings(self.settings),
            "image_size": captioner.image_size,
            "resize": captioner.resize,
            "feature_dim": captioner.encoder.feature_dim if isinstance(captioner.encoder, NoEncoder) else 0,
            "fine_tune_encoder": captioner.fine_tune_encoder,
            "words": captioner.vocabulary.idx2word,
            "settings": asdict(self.settings),
            "defaults": asdict(type(self.settings)()),  # by which an edited default is recognized later
            "epoch": self.epoch,
            "git": git_revision(),
        }
        if with_training_state:
            loss, count = all_reduce_sum([self.loss, self.count])
            progress = {name: getattr(self, name) for name in self.PROGRESS}
            checkpoint["progress"] = progress | {"loss": loss, "count": count}
            checkpoint["data"] = {"digest": self.data_digest, "folders": self.data_folders}
            checkpoint["optimizer"] = self.optimizer.state_dict()
            checkpoint["ema"] = self.ema.state_dict()
            checkpoint["rng"] = all_gather([get_rng_state(self.device)])
        on_rank_zero(lambda: save_torch(Path(self.settings.run_folder) / name, checkpoint))

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Take over what `save` wrote beside the model, the random number generators last.

        Raises InputError where it is not what `save` writes for this model.
        """
        self._validate(checkpoint)
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.ema.load_state_dict(checkpoint["ema"])
        self.data_folders = list(dict.fromkeys([*self.data_folders, *checkpoint["data"]["folders"]]))
        for name in self.PROGRESS:
            setattr(self, name, checkpoint["progress"][name])
        if rank() == 0:  # sums over all processes, however many there were
            self.loss, self.count = checkpoint["progress"]["loss"], checkpoint["progress"]["count"]
        if rank() < len(checkpoint["rng"]):
            set_rng_state(checkpoint["rng"][rank()], self.device)

    def _validate(self, checkpoint: dict[str, Any]) -> None:
        """Raise InputError where a checkpoint's training state is not one that `save` writes for this model."""
        path = self.settings.resume
        progress: Any = checkpoint.get("progress")
        names = (*self.PROGRESS, "loss", "count")
        require_like(progress, {name: getattr(self, name) for name in names}, f"{path}: progress")
        if any(progress[name] < 0 for name in names if name not in ("loss", "best_key")):
            raise InputError(f"{path}: progress has a number below 0")
        require_like(checkpoint.get("ema"), self.ema.state_dict(), f"{path}: ema")
        optimizer: Any = checkpoint.get("optimizer")
        require_like(optimizer, {"state": {}, "param_groups": []}, f"{path}: optimizer")
        groups = [ADAM_GROUP | {"params": group["params"]} for group in self.optimizer.state_dict()["param_groups"]]
        require_like(optimizer["param_groups"], groups, f"{path}: optimizer.param_groups")
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        for i, state in optimizer["state"].items():
            param = params[i] if i in range(len(params)) else None
            example = {"step": torch.tensor(0.0), "exp_avg": param, "exp_avg_sq": param}
            require_like(state, example, f"{path}: optimizer.state.{i}")
        require_like(checkpoint.get("rng"), [], f"{path}: rng")
        for state in checkpoint["rng"]:  # of each process
            require_like(state, {"cpu": torch.get_rng_state()}, f"{path}: rng")


def require_like(found: Any, example: Any, name: str) -> None:
    """Raise InputError where a part of a checkpoint is not built like an example: types, keys, shapes of tensors.

    A dictionary may have more keys, and a list of any length is like an empty one.
    """
    if isinstance(example, Tensor):
        fits = isinstance(found, Tensor) and found.layout == example.layout and not found.is_nested
        fits = fits and (found.shape, found.dtype) == (example.shape, example.dtype)
    elif isinstance(example, dict):
        fits = isinstance(found, dict) and found.keys() >= example.keys()
    elif isinstance(example, list):
        fits = isinstance(found, list) and len(found) == (len(example) or len(found))
    else:
        fits = has_type(found, tuple[float, ...] if isinstance(example, tuple) else type(example))
    if not fits:
        raise InputError(f"{name} is not what train.py writes: start a new run from best.pt with --init_from")
    for key in example if isinstance(example, dict) else range(len(example)) if isinstance(example, list) else ():
        require_like(found[key], example[key], f"{name}.{key}")


def get_rng_state(device: torch.device) -> dict[str, Tensor]:
    """The state of every random number generator that training on a device draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Put back what `get_rng_state` returned, on the same device or another."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def git_revision() -> str:
    """The commit of the code that runs, "" outside a checkout."""
    with contextlib.suppress(OSError):
        command = ["git", "rev-parse", "HEAD"]
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        return result.stdout.strip()
    return ""
