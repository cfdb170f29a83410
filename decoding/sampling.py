"""Sampling of captions, and scoring of given captions, with any `StepDecoder`.

Shapes: B images (in the loop those still decoded), R regions, D their width, C captions of an image, T words of a
caption, V words of the vocabulary.
"""

import math

import torch
from torch import Tensor

from decoding.constraints import Constraints
from decoding.contract import StepDecoder, checks_after, drop_ended, expand
from decoding.settings import DecodingSettings
from modules.cpu import sample_categorical
from modules.decoders import Nested, first_tensor
from text.vocabulary import BANNED_IDS, END, START


@torch.no_grad()
def sample(
    decoder: StepDecoder,
    regions: Nested,
    settings: DecodingSettings,
    generator: torch.Generator | None = None,
    mask: Nested = None,
    constraints: Constraints | None = None,
) -> Tensor:
    """Sample captions of all images at once. `force_decode` gives their log-probabilities.

    Args:
        decoder: in eval mode.
        regions: (B, R, D), or a tuple of them for an ensemble.
        generator: on the device of the regions; the same seed and batch give the same captions. None: torch's own.
        mask, constraints: see `decoding.beam_search.beam_search`.

    Returns:
        Word ids (B, C, T), <end> repeated after a caption's end; <pad>, <start> and <unk> are excluded.
    """
    constraints = constraints or Constraints()
    C, device = settings.samples, first_tensor(regions).device
    images = torch.arange(len(first_tensor(regions)), device=device)  # those still decoded
    captions = torch.full((len(images), C, settings.max_length), END, device=device)
    words = torch.full((len(images), C), START, device=device)
    keys, state = decoder.keys(regions, mask), expand(decoder.init_state(regions, mask), C)
    for t in range(1, settings.max_length + 1):
        logits, state, *_ = decoder.step(words, regions, keys, state)  # (B, C, V)
        probabilities = _truncated_probabilities(logits.float(), captions[images, :, : t - 1], settings, constraints)
        words = sample_categorical(probabilities, generator).masked_fill(words == END, END)
        captions[images, :, t - 1] = words
        if checks_after(t, device):
            images, regions, keys, words, state = drop_ended(words == END, (images, regions, keys, words, state))
            if not len(images):
                break
    return captions[..., :t]


def _truncated_probabilities(
    logits: Tensor, captions: Tensor, settings: DecodingSettings, constraints: Constraints
) -> Tensor:
    """Compute unnormalized probabilities (B, C, V) of the next word: logits (B, C, V), captions so far (B, C, t)."""
    logits = logits - logits.amax(dim=-1, keepdim=True)  # or tiny temperatures would overflow
    for word_id in BANNED_IDS:
        logits[..., word_id] = -math.inf
    if constraints != Constraints():
        logits = constraints.mask(logits, captions, is_last=captions.shape[-1] + 1 == settings.max_length)
        none_left = (logits == -math.inf).all(dim=-1)
        logits[..., END].masked_fill_(none_left, 0.0)
    logits = logits / settings.temperature
    if 0 < settings.top_k < logits.shape[-1]:
        smallest = logits.topk(settings.top_k).values[..., -1:]
        logits.masked_fill_(logits < smallest, -math.inf)
    probabilities = logits.softmax(dim=-1)
    if settings.top_p < 1:
        # Keep a word unless the more probable words reach top_p without it (Holtzman et al., 2020, section 3.1).
        ordered, word_ids = probabilities.sort(dim=-1, descending=True)
        ordered.masked_fill_(ordered.cumsum(dim=-1) - ordered >= settings.top_p, 0)
        probabilities.scatter_(-1, word_ids, ordered)
    return probabilities


@torch.no_grad()
def force_decode(
    decoder: StepDecoder, regions: Nested, captions: Tensor, mask: Nested = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute the log-probabilities, attention weights and gates of given captions.

    The captions may come from another decoder with the same word ids.

    Args:
        decoder: in eval mode.
        regions, mask: see `decoding.beam_search.beam_search`.
        captions: (B, C, T) word ids as `beam_search` and `sample` return them, without <start>.

    Returns:
        Log-probabilities (B, C), alpha (B, C, T, R) and gates (B, C, T) from 0 to 1, or None for a decoder without
        them. Both are zero after a caption's <end>.
    """
    B, C, _ = captions.shape
    keys, state = decoder.keys(regions, mask), expand(decoder.init_state(regions, mask), C)
    words = torch.full((B, C), START, device=captions.device)
    log_probs = torch.zeros((B, C), device=first_tensor(regions).device)
    unfinished = torch.ones_like(log_probs)
    alphas, gates = [], []
    for target in captions.unbind(dim=-1):  # (B, C)
        logits, state, alpha, gate = decoder.step(words, regions, keys, state)
        word_log_probs = logits.float().log_softmax(dim=-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)  # (B, C)
        log_probs += unfinished * word_log_probs
        alphas.append(unfinished.unsqueeze(-1) * alpha)  # (B, C, R)
        if gate is not None:
            gates.append(unfinished * gate)
        unfinished = unfinished * (target != END)
        words = target
    return log_probs, torch.stack(alphas, dim=2), torch.stack(gates, dim=2) if gates else None
