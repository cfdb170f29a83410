"""The state of a training run: all that it changes, saves and restores, and how a signal stops it."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from common.distributed import all_gather, all_reduce_sum, on_rank_zero, rank
from common.files import save_torch
from models import CHECKPOINT_FORMAT, Captioner, model_settings
from modules.encoders import NoEncoder
from training.optim import ModelEMA
from utils import InputError, StopRequested, has_type

if TYPE_CHECKING:
    from train import Settings


@dataclass
class TrainState:
    """All that a training run changes and so must save."""

    settings: Settings
    captioner: Captioner
    optimizer: torch.optim.Optimizer
    ema: ModelEMA
    network: nn.Module  # the captioner, wrapped in DistributedDataParallel if there are several processes
    data_digest: str  # of the data folder
    data_folders: list[str]  # paths at which that data has been found, the latest first
    epoch: int = 0  # complete epochs
    step: int = 0  # complete steps of the current epoch
    seconds: float = 0.0  # time spent on these steps
    loss: float = 0.0  # cross-entropy, or reward under SCST, summed over the words or captions of this process
    count: int = 0  # number of these words or captions
    best_key: tuple[float, ...] = ()  # `training.logs.epoch_key` of the best epoch so far
    epochs_since_improvement: int = 0

    PROGRESS: ClassVar = ("epoch", "step", "seconds", "best_key", "epochs_since_improvement")

    @property
    def device(self) -> torch.device:
        """The device that the captioner is trained on."""
        return next(self.captioner.parameters()).device

    def end_epoch(self, key: tuple[float, ...]) -> bool:
        """Go on to the next epoch; return True if the one that ends is the best so far.

        An epoch counts against --patience only once the first value of a key has been above 0: until then the scores
        do not tell whether the captioner improves.
        """
        improved = key > self.best_key
        self.best_key = max(key, self.best_key)
        stagnates = not improved and self.best_key[0] > 0
        self.epochs_since_improvement = self.epochs_since_improvement + 1 if stagnates else 0
        self.epoch += 1
        self.step = self.count = 0
        self.seconds = self.loss = 0.0
        return improved

    def save(self, name: str, with_training_state: bool) -> None:
        """Write a checkpoint into the run folder: the averaged weights or, with the training state, the trained ones.

        All processes must call it; rank 0 writes.
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
            "defaults": asdict(type(self.settings)()),  # to recognize an edited default later
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
        """Restore the training state that `save` wrote, the random number generators last.

        Raises InputError if it is damaged or belongs to another model.
        """
        if not self._fits(checkpoint):
            raise InputError(
                f"{self.settings.resume}: its training state is not what train.py writes for this model: start a new "
                f"run from best.pt with --init_from"
            )
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.ema.load_state_dict(checkpoint["ema"])
        self.data_folders = list(dict.fromkeys([*self.data_folders, *checkpoint["data"]["folders"]]))
        for name in self.PROGRESS:
            setattr(self, name, checkpoint["progress"][name])
        if rank() == 0:  # the sums over all processes, however many there were
            self.loss, self.count = checkpoint["progress"]["loss"], checkpoint["progress"]["count"]
        if rank() < len(checkpoint["rng"]):
            set_rng_state(checkpoint["rng"][rank()], self.device)

    def _fits(self, checkpoint: dict[str, Any]) -> bool:
        """Return True if a checkpoint's training state is complete and belongs to this model and optimizer."""
        names = ("epoch", "step", "count", "seconds", "epochs_since_improvement")
        group = {"lr": 0.0, "initial_lr": 0.0, "betas": (0.9, 0.999), "eps": 0.0, "weight_decay": 0.0, "params": [0]}
        example = {
            "progress": {name: getattr(self, name) for name in (*names, "loss", "best_key")},
            "optimizer": {"state": {}, "param_groups": [group]},
            "ema": self.ema.state_dict(),
            "rng": [{"cpu": torch.get_rng_state()}],
        }
        if not has_structure(checkpoint, example) or min(checkpoint["progress"][name] for name in names) < 0:
            return False
        found, own = checkpoint["optimizer"], self.optimizer.state_dict()["param_groups"]
        if [group["params"] for group in found["param_groups"]] != [group["params"] for group in own]:
            return False
        moments = {}  # of each parameter
        for i, param in enumerate(param for group in self.optimizer.param_groups for param in group["params"]):
            moments[i] = {"step": torch.tensor(0.0), "exp_avg": param, "exp_avg_sq": param}
        return all(i in moments and has_structure(state, moments[i]) for i, state in found["state"].items())


def has_structure(found: Any, example: Any) -> bool:
    """Return True if a part of a checkpoint has the types, keys and shapes of tensors of an example.

    A dictionary may have more keys. A list has one item or more, all like the first of the example.
    """
    if isinstance(example, Tensor):
        is_dense = isinstance(found, Tensor) and found.layout == torch.strided and not found.is_nested
        return is_dense and (found.shape, found.dtype) == (example.shape, example.dtype)
    if isinstance(example, dict):
        has_keys = isinstance(found, dict) and found.keys() >= example.keys()
        return has_keys and all(has_structure(found[key], example[key]) for key in example)
    if isinstance(example, list):
        return isinstance(found, list) and found != [] and all(has_structure(item, example[0]) for item in found)
    return has_type(found, tuple[float, ...] if isinstance(example, tuple) else type(example))


def get_rng_state(device: torch.device) -> dict[str, Tensor]:
    """Return the state of every random number generator that training on a device draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Restore the state that `get_rng_state` returned, on the same device or another."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def git_revision() -> str:
    """Return the commit of the running code; "" outside a checkout."""
    with contextlib.suppress(OSError):
        command = ["git", "rev-parse", "HEAD"]
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        return result.stdout.strip()
    return ""


@contextlib.contextmanager
def graceful_shutdown() -> Iterator[list[int]]:
    """Collect the numbers of Ctrl-C and SIGTERM in the list that it yields, so that the program can stop in order.

    A second signal raises KeyboardInterrupt.
    """
    caught: list[int] = []

    def catch(signum: int, _: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(signum)

    previous = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        for signum, handler in previous.items():
            if handler is not signal.SIG_IGN:  # keep signals ignored under nohup or &
                signal.signal(signum, catch)
        yield caught
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def stop_request(state: TrainState, caught: list[int]) -> StopRequested:
    """Return the exception that ends a training stopped by a signal; it says how to continue."""
    last = Path(state.settings.run_folder) / "last.pt"
    signum = caught[0] if caught else signal.SIGTERM  # another process caught it
    return StopRequested(signum, f"stopped in epoch {state.epoch + 1}: continue with python train.py --resume {last}")
