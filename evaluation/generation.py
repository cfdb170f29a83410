"""Captions of a batch of images, with what they were decoded from.

Shapes: T words of a caption, R regions, N neighbors of a region in the graph.
"""

import contextlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models import Captioner
from modules.beam_search import SearchSettings, beam_search
from modules.decoders import Decoder
from modules.force_decode import force_decode
from text.vocabulary import Vocabulary
from utils import Runtime, copy_to_device


@dataclass(frozen=True)
class DecodingSettings:
    """How captions are decoded."""

    beam_size: int = 1  # beams per image; 1 is greedy decoding
    max_length: int = 30  # maximum words of a caption, <end> included
    length_penalty: float = 0.5  # captions are ranked by log-probability / length ** length_penalty
    batch_size: int = 32  # images decoded at once


@dataclass(frozen=True)
class ImageCaption:
    """The caption of one image and what it was decoded from, on the CPU."""

    n_best: list[tuple[list[str], float]]  # captions as words, and their log-probabilities, best first
    alpha: Tensor  # (T, R) attention weights of the best; T = 0 where they were not asked for
    gates: list[float] | None  # T gates beta of the best; None where the attention has none
    neighbors: Tensor | None  # (R, N) of the graph; None without graph layers
    edge_weights: list[Tensor]  # (R, N) of each graph layer

    @property
    def words(self) -> list[str]:
        """The best caption."""
        return self.n_best[0][0]

    @property
    def log_prob(self) -> float:
        """The log-probability of the best caption."""
        return self.n_best[0][1]


@torch.no_grad()
def caption_images(
    captioner: Captioner,
    vocabulary: Vocabulary,
    inputs: Tensor,
    decoding: DecodingSettings,
    runtime: Runtime,
    *,
    is_features: bool = False,
    with_attention: bool = True,
) -> list[ImageCaption]:
    """Caption a batch of images with a captioner in eval mode.

    Args:
        inputs: images (B, 3, h, w) uint8 or, where `is_features`, cached features (B, R, F).
        with_attention: decode the best captions once more, for alpha and gates; T is that of the longest.
    """
    inputs = copy_to_device(inputs, runtime.device)
    with runtime.autocast():
        regions, neighbors, edge_weights = captioner.encode(inputs, is_features)
        search = SearchSettings(decoding.beam_size, decoding.max_length, decoding.length_penalty)
        captions, log_probs = beam_search(captioner.decoder, regions, search)
        words = [[vocabulary.decode(caption) for caption in beams] for beams in captions.tolist()]
        alpha, gates = regions.new_zeros(len(regions), 0, regions.shape[1]), None
        if with_attention:
            longest = max(len(beams[0]) for beams in words) + 1  # with <end>
            alpha, gates = attend(captioner.decoder, regions, captions[:, 0, :longest])
    # All moves to the CPU are of the whole batch: each waits for the device.
    log_probs, alpha = log_probs.tolist(), alpha.float().cpu()
    gates = None if gates is None else gates.tolist()
    neighbors = None if neighbors is None else neighbors.cpu()
    edge_weights = [weights.float().cpu() for weights in edge_weights]
    return [
        ImageCaption(
            n_best=[beam for beam in zip(words[b], log_probs[b], strict=True) if beam[1] != -math.inf],
            alpha=alpha[b],
            gates=None if gates is None else gates[b],
            neighbors=None if neighbors is None else neighbors[b],
            edge_weights=[weights[b] for weights in edge_weights],
        )
        for b in range(len(inputs))
    ]


def attend(decoder: Decoder, regions: Tensor, captions: Tensor) -> tuple[Tensor, Tensor | None]:
    """Attention weights (B, T, R) and gates beta (B, T) of captions (B, T); None for attention without a gate."""
    gates: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        if decoder.gate is not None:
            hook = decoder.gate.register_forward_hook(lambda *call: gates.append(call[-1].sigmoid()))
            stack.callback(hook.remove)
        alpha = force_decode(decoder, regions, captions.unsqueeze(1))[1].squeeze(1)
    return alpha, torch.cat(gates, dim=1).squeeze(-1) if gates else None
