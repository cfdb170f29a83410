"""Forced decoding: what a decoder gives captions that are known.

Shapes: B images, R regions, C captions of an image, T words of a caption.
"""

import torch
from torch import Tensor

from decoding.contract import StepDecoder, expand
from modules.decoders import Nested, first_tensor
from text.vocabulary import END, START


@torch.no_grad()
def force_decode(decoder: StepDecoder, regions: Nested, captions: Tensor, mask: Nested = None) -> tuple[Tensor, Tensor]:
    """Log-probabilities and attention weights of given captions.

    The captions may be those of another decoder with the same word ids.

    Args:
        decoder: in eval mode.
        regions: (B, R, D), or a tuple of them for an ensemble.
        captions: (B, C, T) word ids as `beam_search` and `sample` return them, without <start>.
        mask: as in `decoding.beam_search.beam_search`.

    Returns:
        Log-probabilities (B, C) and alpha (B, C, T, R), zero after a caption's <end>.
    """
    B, C, _ = captions.shape
    keys, state = decoder.keys(regions, mask), expand(decoder.init_state(regions, mask), C)
    words = torch.full((B, C), START, device=captions.device)
    log_probs = torch.zeros((B, C), device=first_tensor(regions).device)
    unfinished = torch.ones_like(log_probs)
    alphas = []
    for target in captions.unbind(dim=-1):  # (B, C)
        logits, alpha, state = decoder.step(words, regions, keys, state)
        word_log_probs = logits.float().log_softmax(dim=-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)  # (B, C)
        log_probs += unfinished * word_log_probs
        alphas.append(unfinished.unsqueeze(-1) * alpha)  # (B, C, R)
        unfinished = unfinished * (target != END)
        words = target
    return log_probs, torch.stack(alphas, dim=2)
