"""Sampling of captions, over any `StepDecoder`.

Shapes: B images (in the loop those still decoded), R regions, D their width, C captions of an image, T words of a
caption, V words of the vocabulary.
"""

import math

import torch
from torch import Tensor

from decoding.constraints import Constraints
from decoding.contract import StepDecoder, checks_after, drop_ended, expand
from decoding.settings import DecodingSettings
from modules.decoders import Nested, first_tensor
from modules.layers import sample_categorical
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
    """Sample captions of all images at once.

    `decoding.force_decode.force_decode` gives their log-probabilities, to rank them.

    Args:
        decoder: in eval mode.
        regions: (B, R, D), or a tuple of them for an ensemble.
        generator: on the device of the regions; the same seed and batch give the same captions. None: torch's own.
        mask, constraints: as in `decoding.beam_search.beam_search`.

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
        logits, _, state = decoder.step(words, regions, keys, state)  # (B, C, V)
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
    """Probabilities (B, C, V) to sample from, up to a factor: logits (B, C, V), captions so far (B, C, t)."""
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
        # A word is kept where those more probable do not reach top_p without it (section 3.1); the first always is.
        ordered, word_ids = probabilities.sort(dim=-1, descending=True)
        ordered.masked_fill_(ordered.cumsum(dim=-1) - ordered >= settings.top_p, 0)
        probabilities.scatter_(-1, word_ids, ordered)
    return probabilities
