"""Beam search with any `StepDecoder`, with constraints and diverse groups.

Shapes: B images (in the loop those still searched), R regions, D their width, C captions of an image, K beams, W words
that may extend a caption, T words of a caption, t of the captions so far, V words of the vocabulary.
"""

import math

import torch
from torch import Tensor

from decoding.constraints import Constraints
from decoding.contract import StepDecoder, checks_after, drop_ended, expand, reorder
from decoding.settings import DecodingSettings
from modules.decoders import Nested, first_tensor
from text.vocabulary import BANNED_IDS, END, START


@torch.no_grad()  # not inference_mode, in which autocast would cast the weights anew at each word
def beam_search(
    decoder: StepDecoder,
    regions: Nested,
    settings: DecodingSettings,
    mask: Nested = None,
    constraints: Constraints | None = None,
) -> tuple[Tensor, Tensor]:
    """Search captions of all images at once.

    A finished caption stays in its beam and is extended by <end> at no cost. So there is no list of finished captions,
    and an image without a caption that ends within max_length still gets one.

    Args:
        decoder: in eval mode.
        regions: (B, R, D), or a tuple of them for an ensemble.
        mask: (B, R), False where an image has no region, or a tuple of them for an ensemble; None: all have R.
        constraints: rules that captions must obey; None: none.

    Returns:
        Word ids (B, K, T), best caption first, <end> repeated after its end; <pad>, <start>, <unk> and the empty
        caption are excluded. T is the length of the longest caption, on a GPU up to three more. Log-probabilities
        (B, K), -inf if there are fewer than K captions. Different groups may find the same caption.
    """
    constraints = constraints or Constraints()
    B, K, device = len(first_tensor(regions)), settings.beam_size, first_tensor(regions).device
    all_captions = torch.full((B, K, settings.max_length), END, device=device)
    all_log_probs = torch.full((B, K), -math.inf, device=device)
    images = torch.arange(B, device=device)  # those still searched
    captions = torch.full((B, settings.num_beam_groups, 1), START, device=device)  # (B, C, t); C is K after a few words
    log_probs = torch.zeros((B, settings.num_beam_groups), device=device)
    keys, state = decoder.keys(regions, mask), expand(decoder.init_state(regions, mask), settings.num_beam_groups)
    for t in range(1, settings.max_length + 1):
        logits, state, *_ = decoder.step(captions[..., -1], regions, keys, state)  # (B, C, V)
        beam_indices, next_words, log_probs = _extend(logits, captions, log_probs, settings, constraints)
        captions = torch.cat([reorder(captions, beam_indices), next_words.unsqueeze(-1)], dim=-1)
        state = reorder(state, beam_indices)
        if t == settings.max_length or checks_after(t, device):
            C = captions.shape[1]  # fewer than K if there are fewer captions
            all_captions[images, :C, :t], all_log_probs[images, :C] = captions[..., 1:], log_probs
            ended = (next_words == END) | (log_probs == -math.inf)
            images, regions, keys, captions, log_probs, state = drop_ended(
                ended, (images, regions, keys, captions, log_probs, state)
            )
            if not len(images):
                break
    if settings.num_beam_groups > 1:
        all_captions, all_log_probs = _rank(all_captions, all_log_probs, settings)
    return all_captions[..., :t], all_log_probs


def _extend(
    logits: Tensor, captions: Tensor, log_probs: Tensor, settings: DecodingSettings, constraints: Constraints
) -> tuple[Tensor, Tensor, Tensor]:
    """Extend captions by a word and keep the best, group by group.

    logits (B, C, V), captions (B, C, t), log_probs (B, C)
    -> indices of the beams that are extended, the words and the new log-probabilities, each (B, K).

    "Diverse Beam Search" (Vijayakumar et al., 2018, algorithm 1) with Hamming diversity: in the objective of a group a
    word costs `diversity_penalty` for each beam of the groups before it that chose it at this step. The
    log-probabilities returned are without this cost.
    """
    is_constrained = constraints != Constraints()
    word_log_probs = _word_log_probs(logits, captions, settings, constraints)
    if settings.num_beam_groups == 1:
        return _extend_group(word_log_probs, captions, log_probs, settings, is_constrained)
    size = captions.shape[1] // settings.num_beam_groups  # of a group
    cost = torch.zeros_like(word_log_probs[:, 0])  # (B, V)
    groups = []
    for start in range(0, captions.shape[1], size):
        beams = slice(start, start + size)
        beam_indices, words, new_log_probs = _extend_group(
            word_log_probs[:, beams], captions[:, beams], log_probs[:, beams], settings, is_constrained, cost
        )
        beam_indices += start
        finished = (captions[..., -1] == END).gather(1, beam_indices)
        chosen = ~finished & (new_log_probs > -math.inf)
        cost.scatter_add_(1, words, settings.diversity_penalty * chosen.to(cost.dtype))
        groups.append((beam_indices, words, new_log_probs))
    beam_indices, words, new_log_probs = (torch.cat(parts, dim=1) for parts in zip(*groups, strict=True))
    return beam_indices, words, new_log_probs


def _word_log_probs(logits: Tensor, captions: Tensor, settings: DecodingSettings, constraints: Constraints) -> Tensor:
    """Compute log-probabilities (B, C, V) of the next word, -inf for excluded words; arguments as in `_extend`."""
    t = captions.shape[-1]
    log_probs = logits.float().log_softmax(dim=-1)
    for word_id in BANNED_IDS:
        log_probs[..., word_id] = -math.inf
    if t == 1:  # no empty captions
        log_probs[..., END] = -math.inf
    return constraints.mask(log_probs, captions[..., 1:], is_last=t == settings.max_length)


def _extend_group(
    word_log_probs: Tensor,
    captions: Tensor,
    log_probs: Tensor,
    settings: DecodingSettings,
    is_constrained: bool,
    cost: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Extend the captions of one group: word_log_probs (B, C, V), cost (B, V) of each word, others as in `_extend`."""
    count = settings.beam_size // settings.num_beam_groups
    W = min(count, word_log_probs.shape[-1])
    if cost is None:
        next_log_probs, words = word_log_probs.topk(W)  # (B, C, W)
    else:
        words = (word_log_probs - cost.unsqueeze(1)).topk(W).indices
        next_log_probs = word_log_probs.gather(-1, words)
    finished = captions[..., -1] == END  # (B, C)
    if is_constrained:
        # If the constraints leave an image no next word, its captions stay as they are.
        extensible = (finished | (next_log_probs[..., 0] > -math.inf)) & (log_probs > -math.inf)
        finished = finished | ~extensible.any(dim=1, keepdim=True)
    # A finished caption is only extended by <end>.
    next_log_probs.masked_fill_(finished.unsqueeze(-1), -math.inf)
    next_log_probs[..., 0].masked_fill_(finished, 0)
    words.masked_fill_(finished.unsqueeze(-1), END)
    candidates = log_probs.unsqueeze(-1) + next_log_probs  # (B, C, W)
    objective = candidates
    if cost is not None:
        word_costs = cost.gather(1, words.flatten(1)).view_as(words)
        objective = candidates - word_costs.masked_fill(finished.unsqueeze(-1), 0)
    lengths = (captions != END).sum(dim=-1, keepdim=True)  # with the next word, as <start> is counted, too
    scores = objective / lengths**settings.length_penalty
    scores.masked_fill_(candidates == -math.inf, -math.inf)  # a huge penalty would give -inf / inf, NaN
    top = scores.flatten(1).topk(min(count, scores[0].numel())).indices  # (B, count)
    return top // W, words.flatten(1).gather(1, top), candidates.flatten(1).gather(1, top)


def length_normalized(captions: Tensor, log_probs: Tensor, settings: DecodingSettings) -> Tensor:
    """Compute the scores that rank captions: (B, C, T) of `beam_search`, log-probabilities (B, C) -> scores (B, C).

    The length of a caption includes its <end>, which a caption cut off at max_length lacks.
    """
    lengths = ((captions != END).sum(dim=-1) + 1).clamp(max=settings.max_length)
    return (log_probs / lengths**settings.length_penalty).masked_fill(log_probs == -math.inf, -math.inf)


def _rank(captions: Tensor, log_probs: Tensor, settings: DecodingSettings) -> tuple[Tensor, Tensor]:
    """Sort the captions (B, K, T) of all groups and their log-probabilities (B, K), the best first."""
    order = length_normalized(captions, log_probs, settings).argsort(dim=1, descending=True)
    return reorder(captions, order), log_probs.gather(1, order)
