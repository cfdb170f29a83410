"""The losses: cross-entropy of teacher forcing, REINFORCE for hard attention, self-critical training.

Shapes: B images, C captions of an image, T words, N words of all captions together, R regions, V vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional

from modules.decoders import DecoderOutput, caption_mask
from modules.regions import are_inside
from text.vocabulary import BANNED_IDS
from utils import copy_to_device

if TYPE_CHECKING:
    from train import Settings

# Sampling temperature of SCST. At 1, a model trained with label smoothing samples very unlikely captions.
TEMPERATURE = 0.5

SMALLEST_WEIGHT = 1e-6  # of the attention inside objects, to keep its logarithm finite

# For hard attention. The entropy's weight is the authors'; their 0.1 for the reward learned more slowly.
REWARD_WEIGHT = 0.01
ENTROPY_WEIGHT = 0.002


def captioning_loss(
    output: DecoderOutput, lengths: Tensor, settings: Settings, words: int, captions: int
) -> tuple[Tensor, Tensor]:
    """Return the loss of teacher forcing, and the cross-entropy summed over all words without label smoothing.

    The loss adds label smoothing (Szegedy et al., 2016, section 7) and the doubly stochastic term of "Show, Attend and
    Tell" (equation 14): over a caption, the attention weights of each region should sum to about one.

    Args:
        output: returned by `Decoder.forward`.
        lengths: (B, C) passed to it.
        settings: uses label_smoothing and doubly_stochastic.
        words, captions: counts to divide by: those of the whole step, even for a micro-batch.
    """
    log_probs = output.logits.float().log_softmax(dim=-1)  # (N, V)
    word_losses = functional.nll_loss(log_probs, output.targets, reduction="none")  # (N,)
    cross_entropy = smoothed = word_losses.sum()
    if smoothing := settings.label_smoothing:
        smoothed = (1 - smoothing) * cross_entropy - smoothing * log_probs.mean(dim=-1).sum()
    loss = smoothed / words
    if settings.doubly_stochastic:
        exists = copy_to_device(lengths.flatten().nonzero().squeeze(1), output.alpha.device)
        coverage = output.alpha.sum(dim=0)  # (B, C, R)
        squares, regions = (1 - coverage).square(), coverage.shape[-1]
        if output.mask is not None:
            squares, regions = squares * output.mask.unsqueeze(1), output.mask.sum(dim=-1).view(-1, 1)
        coverage_penalty = (squares.sum(dim=-1) / regions).flatten()[exists].sum()
        loss = loss + settings.doubly_stochastic * coverage_penalty / captions
    if output.sampled_log_probs is not None:
        loss = loss + hard_attention_loss(output, lengths, word_losses.detach()) / words
    return loss, cross_entropy


def grounding_loss(output: DecoderOutput, boxes: Tensor, named: Tensor) -> Tensor:
    """Return the negative logarithm of the attention inside the objects that words name, summed over these words.

    Source: "Attention Correctness in Neural Image Captioning" (Liu et al., 2017), with boxes in place of maps. A region
    is inside a box if its center is; the whole image is inside none. A word without a region inside its objects does
    not count.

    Args:
        output: returned by `models.Captioner.forward`.
        boxes: (B, N, 4) of objects.
        named: (B, C, T, N), True if a word names an object.
    """
    assert output.boxes is not None
    inside = are_inside(output.boxes, boxes)  # (B, R, N)
    alpha = output.alpha.permute(1, 2, 0, 3)  # (B, C, T, R)
    targets = named[:, :, : alpha.shape[2]].float().flatten(1, 2) @ inside.float().transpose(1, 2)  # (B, C T, R)
    inside_any = (targets > 0).unflatten(1, alpha.shape[1:3])
    weights = (alpha * inside_any).sum(dim=-1).clamp_min(SMALLEST_WEIGHT)  # (B, C, T)
    return -(weights.log() * inside_any.any(dim=-1)).sum()


def hard_attention_loss(
    output: DecoderOutput,
    lengths: Tensor,
    word_losses: Tensor,
    reward_weight: float = REWARD_WEIGHT,
    entropy_weight: float = ENTROPY_WEIGHT,
) -> Tensor:
    """Return the REINFORCE loss of hard attention, summed over words.

    It raises the log-probability of sampled regions in proportion to the reward of the words that follow.

    Source: "Show, Attend and Tell", equations 11 and 12, with a moving average as baseline
    (`HardAttention.update_baseline`). The entropy of the attention weights keeps them from settling too early.
    A sampled region influences only the words from its time step on, so only these reward it. The baseline is that of
    a word, not of a caption, because the loss of a caption depends mostly on its length.

    Args:
        output: returned by `Decoder.forward` with hard attention.
        lengths: (B, C) passed to it.
        word_losses: (N,) of the words, without gradient.
        reward_weight: lambda_r of the equation; at 1 the gradient is that of the expected loss.
        entropy_weight: lambda_e.
    """
    assert output.baseline is not None and output.sampled_log_probs is not None, "not the output of hard attention"
    mask = copy_to_device(caption_mask(lengths), word_losses.device)
    baseline = output.baseline.where(output.baseline != 0, word_losses.mean())  # before the first update
    excess = word_losses.new_zeros(mask.shape).masked_scatter(mask, word_losses - baseline)  # (T, B, C)
    advantages = excess.flip(0).cumsum(dim=0).flip(0)  # of each word and those after it
    reinforce = (advantages * output.sampled_log_probs).sum()
    entropy = -(output.alpha * output.alpha.clamp_min(1e-20).log()).sum()  # 0 after the end of a caption
    return reward_weight * reinforce - entropy_weight * entropy


def self_critical_loss(output: DecoderOutput, lengths: Tensor, rewards: Tensor, words: int) -> Tensor:
    """Return the self-critical loss: captions with more reward than the image's other ones become more probable.

    Source: "Self-critical Sequence Training" (Rennie et al., 2017), equation 7. The baseline of a caption is the mean
    reward of the image's other captions ("Buy 4 REINFORCE Samples, Get a Baseline for Free!", Kool et al., 2019).

    Args:
        output: returned by `Decoder.forward` for captions sampled at TEMPERATURE.
        lengths: (B, C) passed to it.
        rewards: (B, C) of the captions; C is at least 2.
        words: count to divide by, of the whole step.
    """
    logits = output.logits.float() / TEMPERATURE
    for word_id in BANNED_IDS:  # never sampled
        logits[:, word_id] = -math.inf
    cross_entropy = functional.cross_entropy(logits, output.targets, reduction="none")  # (N,)
    baselines = (rewards.sum(dim=1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    mask = caption_mask(lengths)
    advantages = copy_to_device((rewards - baselines).expand(mask.shape)[mask], logits.device)  # (N,)
    return (advantages * cross_entropy).sum() / words
