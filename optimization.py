"""What training minimises and how: the loss, the optimizer, its learning rates, the average of the weights."""

import copy
import math

import torch
from torch.nn import functional
from torch.optim.swa_utils import get_ema_multi_avg_fn

from datasets import NEVER_WRITTEN

# Captions drawn at temperature 1 from a model trained with smoothed labels are far from those that a search finds.
TEMPERATURE = 0.5


def captioning_loss(outputs, lengths, settings, words, captions):
    """The loss of teacher forcing and, of it, the cross-entropy of all words, added up and without label smoothing.

    The rest is the doubly stochastic term of "Show, Attend and Tell" (equation 14): over a caption, the weights of
    each region should add up to about one. Label smoothing is that of Szegedy et al. (2016, section 7).

    Args:
        outputs: what `decoders.Decoder.forward` returns.
        lengths: (B, C) as it takes them.
        settings: label_smoothing and doubly_stochastic.
        words, captions: the numbers to divide by, those of the whole step where this is a part of it.
    """
    logits, targets, weights = outputs
    log_probabilities = logits.float().log_softmax(dim=-1)  # (N, V)
    cross_entropy = smoothed = functional.nll_loss(log_probabilities, targets, reduction="sum")
    if share := settings.label_smoothing:
        smoothed = (1 - share) * cross_entropy - share * log_probabilities.mean(dim=-1).sum()
    loss = smoothed / words
    if settings.doubly_stochastic:
        looked = weights.sum(dim=0)[lengths.to(weights.device) > 0]  # (captions, R)
        once = (1 - looked).square().mean(dim=-1).sum()
        loss = loss + settings.doubly_stochastic * once / captions
    return loss, cross_entropy


def self_critical_loss(outputs, lengths, rewards, words):
    """The loss whose gradient makes those captions more probable that were rewarded more than others of their image.

    Source: "Self-critical Sequence Training" (Rennie et al., 2017), equation 7; what a caption is compared with is the
    mean reward of the image's other captions ("Buy 4 REINFORCE samples", Kool et al., 2019).

    Args:
        outputs: what `decoders.Decoder.forward` returns for the captions drawn at TEMPERATURE.
        lengths: (B, C) as it takes them.
        rewards: (B, C) of the captions, C at least 2.
        words: the number to divide by, of the whole step.
    """
    logits, targets, weights = outputs
    logits = logits.float() / TEMPERATURE
    logits[:, NEVER_WRITTEN] = -math.inf  # as they were drawn
    cross_entropy = functional.cross_entropy(logits, targets, reduction="none")  # (N,)
    others = (rewards.sum(dim=1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    real = torch.arange(len(weights)).view(-1, 1, 1) < lengths  # (T, B, C), in whose order the N words are
    advantages = (rewards - others).expand(real.shape)[real].to(logits.device)  # (N,)
    return (advantages * cross_entropy).sum() / words


def make_optimizer(captioner, settings):
    """Adam over what decodes and, where it is fine-tuned, the encoder with its own learning rate."""
    captioner.encoder.requires_grad_(settings.fine_tune_encoder)
    decoding = [*captioner.region_layer.parameters(), *captioner.decoder.parameters()]
    groups = [{"params": decoding, "lr": settings.learning_rate}]
    if settings.fine_tune_encoder:
        groups.append({"params": captioner.encoder.parameters(), "lr": settings.encoder_learning_rate})
    for group in groups:
        group["initial_lr"] = group["lr"]  # what the schedule starts from
    return torch.optim.Adam(groups, fused=True)


def learning_rate_factor(settings, step, steps_per_epoch):
    """The factor on the learning rates at a step, counted from 0 over all epochs."""
    steps = settings.epochs * steps_per_epoch
    warm_up = min(1, (step + 1) / max(1, settings.warm_up * steps))
    if settings.schedule == "step":
        return warm_up * settings.learning_rate_decay ** (step // steps_per_epoch)
    return warm_up * (1 + math.cos(math.pi * step / steps)) / 2


class WeightAverage:
    """A captioner whose weights are the exponential moving average of those that are trained.

    The average forgets faster while it is young, so that the random start does not linger in it.
    """

    def __init__(self, captioner, decay):
        frozen = not any(parameter.requires_grad for parameter in captioner.encoder.parameters())
        shared = {id(captioner.encoder): captioner.encoder} if frozen else {}
        self.captioner, self.decay = copy.deepcopy(captioner, shared), decay
        pairs = zip(self.captioner.parameters(), captioner.parameters(), strict=True)
        self.averages, self.weights = zip(*((own, new) for own, new in pairs if new.requires_grad), strict=True)
        pairs = zip(self.captioner.buffers(), captioner.buffers(), strict=True)
        self.buffers = [(own, new) for own, new in pairs if own is not new]

    @torch.no_grad()
    def update(self, step):
        """Take in the weights after a step, counted from 0 over all epochs."""
        average = get_ema_multi_avg_fn(min(self.decay, (step + 1) / (step + 10)))
        average(self.averages, self.weights, None)
        for own, new in self.buffers:
            own.copy_(new)
