"""What training minimises and how: the loss, the optimizer, its learning rates, the average of the weights."""

import copy
import math

import torch
from torch.nn import functional
from torch.optim.swa_utils import get_ema_multi_avg_fn

from vocabulary import NEVER_WRITTEN

# Captions drawn at temperature 1 from a model trained with smoothed labels are far from those that a search finds.
TEMPERATURE = 0.5

# Of hard attention's looks. The entropy's weight is that of the authors' code, whose 0.1 for the reward learned slower.
REWARD_WEIGHT = 0.01
ENTROPY_WEIGHT = 0.002


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
    log_probabilities = outputs.logits.float().log_softmax(dim=-1)  # (N, V)
    losses = functional.nll_loss(log_probabilities, outputs.targets, reduction="none")  # (N,)
    cross_entropy = smoothed = losses.sum()
    if share := settings.label_smoothing:
        smoothed = (1 - share) * cross_entropy - share * log_probabilities.mean(dim=-1).sum()
    loss = smoothed / words
    if settings.doubly_stochastic:
        looked = outputs.weights.sum(dim=0)[lengths.to(outputs.weights.device) > 0]  # (captions, R)
        once = (1 - looked).square().mean(dim=-1).sum()
        loss = loss + settings.doubly_stochastic * once / captions
    if outputs.choices is not None:
        loss = loss + hard_attention_loss(outputs, lengths, losses.detach()) / words
    return loss, cross_entropy


def real_words(lengths):
    """Which words there are, in whose order teacher forcing has its N words: (B, C) -> (T, B, C)."""
    return torch.arange(int(lengths.max())).view(-1, 1, 1) < lengths


def hard_attention_loss(outputs, lengths, losses, reward_weight=REWARD_WEIGHT, entropy_weight=ENTROPY_WEIGHT):
    """The loss, added up, whose gradient makes looks more probable after which captions were more probable.

    Source: "Show, Attend and Tell", equations 11 and 12: REINFORCE, with a moving average as baseline (`follow`), and
    the weights' entropy, so that looks do not settle too early. A look is compared by the words from it on, as it
    changes none before, each with the baseline of a word: a whole caption's loss tells of its length most of all.

    Args:
        outputs: what `decoders.Decoder.forward` returns with hard attention.
        lengths: (B, C) as it takes them.
        losses: (N,) of the words, without gradient.
        reward_weight: lambda_r of the equation; 1 is the gradient of the expected loss.
        entropy_weight: lambda_e.
    """
    real = real_words(lengths).to(losses.device)
    baseline = outputs.baseline.where(outputs.baseline != 0, losses.mean())  # until there is an average
    of_words = losses.new_zeros(real.shape).masked_scatter(real, losses - baseline)  # (T, B, C)
    advantages = of_words.flip(0).cumsum(dim=0).flip(0)  # of each word and all behind it
    reinforce = (advantages * outputs.choices).sum()
    looks = outputs.weights[real]  # (N, R)
    entropy = -(looks * looks.clamp_min(1e-20).log()).sum()
    return reward_weight * reinforce - entropy_weight * entropy


def follow(baseline, loss):
    """Move hard attention's baseline () on to the mean loss of the words of one more step, a number."""
    baseline.fill_(0.9 * baseline.item() + 0.1 * loss if baseline else loss)


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
    logits = outputs.logits.float() / TEMPERATURE
    logits[:, NEVER_WRITTEN] = -math.inf  # as they were drawn
    cross_entropy = functional.cross_entropy(logits, outputs.targets, reduction="none")  # (N,)
    others = (rewards.sum(dim=1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    real = real_words(lengths)
    advantages = (rewards - others).expand(real.shape)[real].to(logits.device)  # (N,)
    return (advantages * cross_entropy).sum() / words


def make_optimizer(captioner, settings):
    """Adam over what decodes and, where it is fine-tuned, the encoder with its own learning rate."""
    captioner.encoder.requires_grad_(False)
    if settings.fine_tune_encoder:
        captioner.encoder.train_from(settings.fine_tune_from)
    captioner.decoder.embedding.weight.requires_grad_(not settings.freeze_word_vectors)
    encoding = [weight for weight in captioner.encoder.parameters() if weight.requires_grad]
    own = set(map(id, captioner.encoder.parameters()))
    decoding = [weight for weight in captioner.parameters() if weight.requires_grad and id(weight) not in own]
    groups = [{"params": decoding, "lr": settings.learning_rate}]
    if encoding:
        groups.append({"params": encoding, "lr": settings.encoder_learning_rate})
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
