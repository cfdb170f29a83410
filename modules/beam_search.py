"""Decoding: beam search, sampling and forced decoding, over any decoder with the three methods of `StepDecoder`.

Shapes: B images (in a loop those still decoded), R regions, D their width, A of the attention, H of the hidden state,
C captions of an image, K beams, W words that may extend a caption, T words of a caption, V words of the vocabulary.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from modules.layers import sample_categorical
from modules.step_decoder import Nested, map_tensors
from text.vocabulary import BANNED_IDS, END, START

CHECK_EVERY = 4  # words after which a search on a GPU asks which images have ended


class StepDecoder(Protocol):
    """What decoding needs of a decoder; see `modules.decoders.Decoder`."""

    def keys(self, regions: Tensor) -> Nested:
        """regions (B, R, D) -> tensors (B, ...), once per image."""
        ...

    def init_state(self, regions: Tensor) -> tuple[Nested, ...]:
        """regions (B, R, D) -> state before the first word, tensors (B, 1, ...)."""
        ...

    def step(
        self, words: Tensor, regions: Tensor, keys: Nested, state: tuple[Nested, ...]
    ) -> tuple[Tensor, Tensor, tuple[Nested, ...]]:
        """words (B, C), state of tensors (B, C, ...) -> logits (B, C, V), alpha (B, C, R), state."""
        ...


@torch.no_grad()  # not inference_mode, in which autocast would cast the weights anew at each word
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
        caption are excluded. T is that of the longest caption, on a GPU up to three more. Log-probabilities (B, K),
        -inf where there are fewer than K captions.
    """
    B, K = len(regions), beam_size
    all_captions = torch.full((B, K, max_length), END, device=regions.device)
    all_log_probs = torch.full((B, K), -math.inf, device=regions.device)
    images = torch.arange(B, device=regions.device)  # those still searched
    captions = torch.full((B, 1, 1), START, device=regions.device)  # (B, C, t), C = 1 before the first word, then K
    log_probs = torch.zeros((B, 1), device=regions.device)
    keys, state = decoder.keys(regions), decoder.init_state(regions)
    for t in range(1, max_length + 1):
        words = captions[..., -1]  # (B, C)
        logits, _, state = decoder.step(words, regions, keys, state)  # (B, C, V)
        next_log_probs, next_words = _best_next_words(
            logits, words == END, K, BANNED_IDS if t > 1 else [*BANNED_IDS, END]
        )
        lengths = (captions != END).sum(dim=-1, keepdim=True)  # with the next word, as <start> is counted, too
        candidates = log_probs.unsqueeze(-1) + next_log_probs  # (B, C, W)
        scores = candidates / lengths**length_penalty
        scores.masked_fill_(candidates == -math.inf, -math.inf)  # not NaN, as -inf / inf of a huge penalty is
        top = scores.flatten(1).topk(min(K, scores[0].numel())).indices  # (B, K)
        beam_indices = top // scores.shape[-1]
        log_probs, next_words = candidates.flatten(1).gather(1, top), next_words.flatten(1).gather(1, top)
        captions = torch.cat([_reorder(captions, beam_indices), next_words.unsqueeze(-1)], dim=-1)
        state = map_tensors(lambda x, indices=beam_indices: _reorder(x, indices), state)
        if t == max_length or _checks_after(t, regions.device):
            C = captions.shape[1]  # fewer than K where there are not so many captions
            all_captions[images, :C, :t], all_log_probs[images, :C] = captions[..., 1:], log_probs
            ended = (next_words == END) | (log_probs == -math.inf)
            images, regions, keys, captions, log_probs, state = _drop_ended(
                ended, (images, regions, keys, captions, log_probs, state)
            )
            if not len(images):
                break
    return all_captions[..., :t], all_log_probs


def _best_next_words(logits: Tensor, finished: Tensor, count: int, banned_ids: list[int]) -> tuple[Tensor, Tensor]:
    """The W best words to extend each caption, `count` or all; a finished caption only goes on with <end>.

    logits (B, C, V), finished (B, C) -> log-probabilities (B, C, W), -inf for words excluded, and word ids (B, C, W).
    """
    log_probs = logits.float().log_softmax(dim=-1)
    for word_id in banned_ids:
        log_probs[..., word_id] = -math.inf
    log_probs, words = log_probs.topk(min(count, logits.shape[-1]))
    log_probs.masked_fill_(finished.unsqueeze(-1), -math.inf)
    log_probs[..., 0].masked_fill_(finished, 0)
    return log_probs, words.masked_fill_(finished.unsqueeze(-1), END)


def _reorder(x: Tensor, beam_indices: Tensor) -> Tensor:
    """x (B, C, ...) of the beams (B, K) that the new ones extend."""
    rows = torch.arange(len(x), device=x.device).unsqueeze(1) * x.shape[1] + beam_indices  # (B, K)
    return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)


def _checks_after(t: int, device: torch.device) -> bool:
    """Whether to ask after word t which images have ended. The host waits for a GPU's answer, so it asks rarely."""
    return device.type == "cpu" or t % CHECK_EVERY == 0


def _drop_ended(ended: Tensor, tensors: Nested) -> Nested:
    """The rows of tensors (B, ...) whose image has a caption that has not ended: ended (B, C).

    Images end at different words. Without those that have ended a search takes two thirds of the time.
    """
    rows = (~ended).any(dim=1).nonzero().squeeze(1)
    return tensors if len(rows) == len(ended) else map_tensors(lambda x: x.index_select(0, rows), tensors)


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
    captions = torch.full((len(regions), num_captions, max_length), END, device=regions.device)
    images = torch.arange(len(regions), device=regions.device)  # those still decoded
    words = torch.full((len(regions), num_captions), START, device=regions.device)
    keys = decoder.keys(regions)
    state = map_tensors(lambda x: x.repeat_interleave(num_captions, dim=1), decoder.init_state(regions))  # (B, C, ...)
    for t in range(1, max_length + 1):
        logits, _, state = decoder.step(words, regions, keys, state)  # (B, C, V)
        logits = logits.float() / temperature
        for word_id in BANNED_IDS:
            logits[..., word_id] = -math.inf
        words = sample_categorical(logits.softmax(dim=-1)).masked_fill(words == END, END)
        captions[images, :, t - 1] = words
        if _checks_after(t, regions.device):
            images, regions, keys, words, state = _drop_ended(words == END, (images, regions, keys, words, state))
            if not len(images):
                break
    return captions[..., :t]


@torch.no_grad()
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
