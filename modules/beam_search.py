"""Decoding: beam search, sampling and forced decoding, over any decoder with the three methods of `StepDecoder`.

Shapes: B images, R regions, D their width, A of the attention, H of the hidden state, C captions of an image, K beams,
T words of a caption, V words of the vocabulary.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from modules.layers import sample_categorical
from text.vocabulary import BANNED_IDS, END, START


class StepDecoder(Protocol):
    """What decoding needs of a decoder; see `modules.decoders.Decoder`."""

    def keys(self, regions: Tensor) -> Tensor:
        """regions (B, R, D) -> keys (B, R, A), once per image."""
        ...

    def init_state(self, regions: Tensor) -> tuple[Tensor, ...]:
        """regions (B, R, D) -> state before the first word, a tuple of (B, 1, H)."""
        ...

    def step(
        self, words: Tensor, regions: Tensor, keys: Tensor, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """words (B, C), state tuple of (B, C, H) -> logits (B, C, V), alpha (B, C, R), state."""
        ...


@torch.inference_mode()
def beam_search(
    decoder: StepDecoder, regions: Tensor, beam_size: int = 5, max_length: int = 30, length_penalty: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Beam search for all images at once.

    A finished caption stays in its beam and is only extended by <end> at no cost. So no list of finished captions is
    needed, and an image without a caption that ends within max_length still gets one.

    Args:
        decoder: in eval mode.
        regions: (B, R, D).
        beam_size: captions kept per image at each step, K; 1 is greedy decoding.
        max_length: words at most, <end> included.
        length_penalty: captions are ranked by log-probability / length ** length_penalty; 0 ranks by probability,
            which favors short captions (Wu et al., 2016, section 7).

    Returns:
        Word ids (B, K, T), best caption first, <end> repeated after its end; <pad>, <start>, <unk> and the empty
        caption are excluded. Log-probabilities (B, K), -inf where there are fewer than K captions.
    """
    B, K = len(regions), beam_size
    keys = decoder.keys(regions)
    state = tuple(part.expand(-1, K, -1) for part in decoder.init_state(regions))  # (B, K, H)
    words = torch.full((B, K), START, device=regions.device)
    log_probs = torch.full((B, K), -math.inf, device=regions.device)
    log_probs[:, 0] = 0  # all beams start equal: only the first counts
    lengths = torch.zeros_like(words)
    finished = torch.zeros_like(words, dtype=torch.bool)
    captions = torch.empty((B, K, 0), dtype=torch.long, device=regions.device)
    for t in range(max_length):
        logits, _, state = decoder.step(words, regions, keys, state)  # (B, K, V)
        word_log_probs = _next_word_log_probs(logits, finished, BANNED_IDS if t else [*BANNED_IDS, END])
        lengths = lengths + ~finished
        best = word_log_probs.topk(min(K, logits.shape[-1]))  # (B, K, W): at most K captions extend the same beam
        candidates = log_probs.unsqueeze(-1) + best.values  # (B, K, W)
        scores = candidates / lengths.unsqueeze(-1) ** length_penalty
        scores.masked_fill_(candidates == -math.inf, -math.inf)  # not NaN, as -inf / inf of a huge penalty is
        top = scores.flatten(1).topk(K).indices  # (B, K)
        beam_indices, words = top // scores.shape[-1], best.indices.flatten(1).gather(1, top)
        log_probs = candidates.flatten(1).gather(1, top)
        lengths = lengths.gather(1, beam_indices)
        captions = torch.cat([_reorder(captions, beam_indices), words.unsqueeze(-1)], dim=-1)
        state = tuple(_reorder(part, beam_indices) for part in state)
        finished = words == END
        if finished.all():
            break
    return captions, log_probs


def _next_word_log_probs(logits: Tensor, finished: Tensor, banned_ids: list[int]) -> Tensor:
    """Log-probabilities (B, K, V) of the next word: -inf for banned ids; a finished caption only goes on with <end>."""
    log_probs = logits.float().log_softmax(dim=-1)
    log_probs[..., banned_ids] = -math.inf
    log_probs.masked_fill_(finished.unsqueeze(-1), -math.inf)
    log_probs[..., END].masked_fill_(finished, 0)
    return log_probs


def _reorder(x: Tensor, beam_indices: Tensor) -> Tensor:
    """x (B, K, ...) of the beams (B, K) that the new ones extend."""
    return x.gather(1, beam_indices.unsqueeze(-1).expand_as(x))


@torch.no_grad()
def sample(
    decoder: StepDecoder, regions: Tensor, num_captions: int, max_length: int = 30, temperature: float = 1.0
) -> Tensor:
    """Sample captions of all images at once, each word from softmax(logits / temperature).

    Args:
        decoder, max_length: as in `beam_search`.
        regions: (B, R, D).
        num_captions: captions per image, C.
        temperature: below 1 it favors probable words.

    Returns:
        Word ids (B, C, T), <end> repeated after a caption's end; <pad>, <start> and <unk> are excluded.
    """
    keys = decoder.keys(regions)
    state = tuple(part.expand(-1, num_captions, -1) for part in decoder.init_state(regions))  # (B, C, H)
    words = torch.full((len(regions), num_captions), START, device=regions.device)
    finished = torch.zeros_like(words, dtype=torch.bool)
    captions = []
    for _ in range(max_length):
        logits, _, state = decoder.step(words, regions, keys, state)  # (B, C, V)
        logits = logits.float() / temperature
        logits[..., BANNED_IDS] = -math.inf
        words = sample_categorical(logits.softmax(dim=-1)).masked_fill(finished, END)
        captions.append(words)
        finished = words == END
        if finished.all():
            break
    return torch.stack(captions, dim=-1)


@torch.inference_mode()
def force_decode(decoder: StepDecoder, regions: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and attention weights of given captions.

    Args:
        decoder: in eval mode.
        regions: (B, R, D).
        captions: (B, T) word ids as `beam_search` returns them, without <start>.

    Returns:
        Log-probabilities (B,) and alpha (B, T, R), zero after a caption's <end>.
    """
    keys, state = decoder.keys(regions), decoder.init_state(regions)
    words = torch.full((len(captions), 1), START, device=captions.device)
    log_probs = torch.zeros(len(captions), device=regions.device)
    unfinished = torch.ones_like(log_probs)
    alphas = []
    for target in captions.split(1, dim=1):  # (B, 1)
        logits, alpha, state = decoder.step(words, regions, keys, state)
        word_log_probs = logits.squeeze(1).float().log_softmax(dim=-1).gather(1, target).squeeze(1)  # (B,)
        log_probs += unfinished * word_log_probs
        alphas.append(unfinished.unsqueeze(1) * alpha.squeeze(1))  # (B, R)
        unfinished = unfinished * (target.squeeze(1) != END)
        words = target
    return log_probs, torch.stack(alphas, dim=1)
