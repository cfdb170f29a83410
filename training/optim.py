"""The optimizer, its learning rate schedule and the moving average of the weights."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from models import DECODERS, Captioner
from modules.encoders import Encoder

if TYPE_CHECKING:
    from train import Settings


def make_optimizer(captioner: Captioner, settings: Settings) -> torch.optim.Optimizer:
    """Return Adam over the decoder and, if it is fine-tuned, the encoder with its own learning rate.

    Sets `requires_grad` of all parameters. Raises InputError if --unfreeze_from names no part of the encoder.
    """
    captioner.encoder.requires_grad_(False)
    if settings.fine_tune_encoder and isinstance(captioner.encoder, Encoder):
        captioner.encoder.unfreeze_from(settings.unfreeze_from)
    captioner.decoder.embedding.weight.requires_grad_(not settings.freeze_embeddings)
    encoder_params = [param for param in captioner.encoder.parameters() if param.requires_grad]
    encoder_ids = set(map(id, captioner.encoder.parameters()))
    decoder_params = [p for p in captioner.parameters() if p.requires_grad and id(p) not in encoder_ids]
    groups = [{"params": decoder_params, "lr": settings.learning_rate}]
    if encoder_params:
        groups.append({"params": encoder_params, "lr": settings.encoder_learning_rate})
    for group in groups:
        group["initial_lr"] = group["lr"]  # the schedule multiplies it by a factor
    return torch.optim.Adam(groups, fused=True)


def learning_rate_factor(settings: Settings, step: int, steps_per_epoch: int) -> float:
    """Return the factor of the learning rates at a step, counted from 0 over all epochs: warmup, then the schedule."""
    steps = settings.epochs * steps_per_epoch
    ratio = DECODERS[settings.decoder].WARMUP_RATIO if settings.warmup_ratio < 0 else settings.warmup_ratio
    warmup = min(1, (step + 1) / max(1, ratio * steps))
    if settings.lr_schedule == "step":
        return warmup * settings.learning_rate_decay ** (step // steps_per_epoch)
    return warmup * (1 + math.cos(math.pi * step / steps)) / 2


class ModelEMA:
    """A captioner whose weights are the exponential moving average of the trained ones.

    The decay starts low and rises to `decay`, so the average soon forgets the random start.
    """

    def __init__(self, captioner: Captioner, decay: float) -> None:
        frozen = not any(param.requires_grad for param in captioner.encoder.parameters())
        shared = {id(captioner.encoder): captioner.encoder} if frozen else {}
        self.captioner, self.decay = copy.deepcopy(captioner, shared), decay
        averages = dict(self.captioner.named_parameters())
        trained = {name: param for name, param in captioner.named_parameters() if param.requires_grad}
        self.averages = {name: averages[name] for name in trained}
        self.params: list[torch.Tensor] = list(trained.values())
        pairs = zip(self.captioner.buffers(), captioner.buffers(), strict=True)
        self.buffers = [(average, buffer) for average, buffer in pairs if average is not buffer]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average after a step, counted from 0 over all epochs."""
        update_averages = get_ema_multi_avg_fn(min(self.decay, (step + 1) / (step + 10)))
        update_averages(list(self.averages.values()), self.params, None)
        for average, buffer in self.buffers:
            average.copy_(buffer)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the averages by parameter name."""
        return {name: average.detach() for name, average in self.averages.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Copy the averages that `state_dict` returned."""
        for name, average in self.averages.items():
            average.data.copy_(state[name])
