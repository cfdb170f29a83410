"""Beam search over any decoder, captions drawn from it, and where it looks at each word of a caption.

Shapes: B images, R regions, D features of a region, K beams, T words, V words of the vocabulary.
"""

import math

import torch

from layers import draw
from vocabulary import END, NEVER_WRITTEN, START


@torch.inference_mode()
def beam_search(decoder, regions, beam_size=5, max_length=30, length_penalty=0.5):
    """Search the most probable captions of all images at once.

    Args:
        decoder: anything with `keys`, `first_state` and `step`.
        regions: (B, R, D).
        beam_size: captions kept an image at each word, K; 1 is greedy decoding.
        max_length: words at most, <end> included.
        length_penalty: captions are ranked by log-probability / length ** length_penalty; 0 ranks by probability,
            which favours short captions (Wu et al., 2016, section 7).

    Returns words (B, K, T), best caption first, <end> repeated after its end, and log-probabilities (B, K), -inf
    where there are fewer than K captions.

    A finished caption stays in its beam and can only go on with <end> at no cost, so nothing is set aside and an
    image none of whose captions ends within max_length still has one.
    """
    B, K = len(regions), beam_size
    keys = decoder.keys(regions)
    state = tuple(part.expand(-1, K, -1) for part in decoder.first_state(regions))  # (B, K, H)
    words = torch.full((B, K), START, device=regions.device)
    totals = torch.full((B, K), -math.inf, device=regions.device)
    totals[:, 0] = 0  # all beams start alike: count only one
    lengths = torch.zeros_like(words)
    finished = torch.zeros_like(words, dtype=torch.bool)
    captions = torch.empty((B, K, 0), dtype=torch.long, device=regions.device)
    for t in range(max_length):
        logits, _, state = decoder.step(words, regions, keys, state)  # (B, K, V)
        step = logits.float().log_softmax(dim=-1)
        step[..., NEVER_WRITTEN if t else [*NEVER_WRITTEN, END]] = -math.inf  # and no empty caption
        step.masked_fill_(finished.unsqueeze(-1), -math.inf)
        step[..., END].masked_fill_(finished, 0)
        lengths = lengths + ~finished
        best = step.topk(min(K, step.shape[-1]))  # (B, K, W): no more than K captions can come from one beam
        candidates = totals.unsqueeze(-1) + best.values  # (B, K, W)
        ranks = candidates / lengths.unsqueeze(-1) ** length_penalty
        chosen = ranks.flatten(1).topk(K).indices  # (B, K)
        parents, words = chosen // ranks.shape[-1], best.indices.flatten(1).gather(1, chosen)
        totals = candidates.flatten(1).gather(1, chosen)
        lengths = lengths.gather(1, parents)
        captions = torch.cat([captions.gather(1, parents.unsqueeze(-1).expand_as(captions)), words.unsqueeze(-1)], -1)
        state = tuple(part.gather(1, parents.unsqueeze(-1).expand_as(part)) for part in state)
        finished = words == END
        if finished.all():
            break
    return captions, totals


@torch.no_grad()
def sample(decoder, regions, number, max_length=30, temperature=1.0):
    """Draw captions of all images at once, each word as probable as softmax(logits / temperature) makes it.

    Args:
        decoder, max_length: as in `beam_search`.
        regions: (B, R, D).
        number: captions drawn an image, K.

    Returns words (B, K, T), <end> repeated after a caption's end; <pad>, <start> and <unk> are never drawn.
    """
    keys = decoder.keys(regions)
    state = tuple(part.expand(-1, number, -1) for part in decoder.first_state(regions))  # (B, K, H)
    words = torch.full((len(regions), number), START, device=regions.device)
    finished = torch.zeros_like(words, dtype=torch.bool)
    captions = []
    for _ in range(max_length):
        logits, _, state = decoder.step(words, regions, keys, state)  # (B, K, V)
        logits = logits.float() / temperature
        logits[..., NEVER_WRITTEN] = -math.inf
        words = draw(logits.softmax(dim=-1)).masked_fill(finished, END)
        captions.append(words)
        finished = words == END
        if finished.all():
            break
    return torch.stack(captions, dim=-1)


@torch.inference_mode()
def attend(decoder, regions, captions):
    """Where a decoder looks at each word of given captions, and how probable it finds them.

    Args:
        regions: (B, R, D).
        captions: (B, T) word numbers as `beam_search` returns them, without <start>.

    Returns log-probabilities (B,) and weights (B, T, R), zero after a caption's <end>.
    """
    keys, state = decoder.keys(regions), decoder.first_state(regions)
    words = torch.full((len(captions), 1), START, device=captions.device)
    totals = torch.zeros(len(captions), device=regions.device)
    unfinished = torch.ones_like(totals)
    weights = []
    for following in captions.split(1, dim=1):  # (B, 1)
        logits, look, state = decoder.step(words, regions, keys, state)
        log_probabilities = logits.squeeze(1).float().log_softmax(dim=-1).gather(1, following).squeeze(1)  # (B,)
        totals += unfinished * log_probabilities
        weights.append(unfinished.unsqueeze(1) * look.squeeze(1))  # (B, R)
        unfinished = unfinished * (following.squeeze(1) != END)
        words = following
    return totals, torch.stack(weights, dim=1)
