"""Captions of a batch of images, with their attention weights, gates and graph.

Shapes: B images, C candidates of an image, T words of a caption, R regions, F features of the encoder, N neighbors of a
region in the graph, L layers, n heads.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from decoding.beam_search import beam_search, length_normalized
from decoding.constraints import Constraints
from decoding.contract import reorder
from decoding.ensemble import EnsembleDecoder
from decoding.sampling import force_decode, sample
from decoding.settings import DecodingSettings
from modules.decoders import Decoder, Encoded, Nested, first_tensor, map_tensors
from modules.graph import RegionGraph
from modules.regions import RegionSource, has_area
from text.vocabulary import END, START, Vocabulary
from utils import Runtime, copy_to_device


class Candidate(NamedTuple):
    """A caption found by search or sampling."""

    words: list[str]
    log_prob: float
    score: float  # the log-probability normalized by the length, by which captions are ranked


class CaptioningModel(Protocol):
    """A model that captions images: a `models.Captioner` or an `evaluation.ensemble.Ensemble`."""

    vocabulary: Vocabulary
    region_source: RegionSource
    graph: RegionGraph

    @property
    def decoder(self) -> Decoder | EnsembleDecoder: ...

    def encode(self, inputs: Nested, boxes: Tensor | None) -> Encoded: ...


class Rerank(Protocol):
    """A function that re-ranks the candidates of B images, such as `evaluation.consensus.Consensus.rerank`."""

    def __call__(self, candidates: list[list[Candidate]], features: Nested) -> list[list[Candidate]]:
        """Return each image's candidates, best first, given its features (B, R, F)."""
        ...


@dataclass(frozen=True)
class ImageCaption:
    """The caption of one image with its attention weights, gates and graph, on the CPU."""

    n_best: list[Candidate]  # best first
    before_consensus: list[str]  # the caption that is best without consensus re-ranking
    alpha: Tensor  # (T, R) attention weights of the best; T = 0 if not requested
    boxes: Tensor  # (R, 4) of the regions, in fractions of the sides: left, top, right, bottom
    gates: list[float] | None  # T weights of the image (`StepOutput.gate`) of the best; None without gates
    neighbors: Tensor | None  # (R, N) of the graph; None without graph layers
    edge_weights: list[Tensor]  # (R, N) of each graph layer
    heads: Tensor | None = None  # (L, n, T, R) attention weights of all layers and heads, if they were asked for

    @property
    def words(self) -> list[str]:
        """The words of the best caption."""
        return self.n_best[0].words

    @property
    def caption(self) -> str:
        """The best caption."""
        return " ".join(self.words)

    @property
    def log_prob(self) -> float:
        """The log-probability of the best caption."""
        return self.n_best[0].log_prob


@torch.no_grad()
def caption_batch(
    captioner: CaptioningModel,
    inputs: Nested,
    decoding: DecodingSettings,
    runtime: Runtime,
    *,
    boxes: Tensor | None = None,
    with_attention: bool = True,
    with_heads: bool = False,
    rerank: Rerank | None = None,
) -> list[ImageCaption]:
    """Caption a batch of images with a captioner in eval mode, or with an ensemble.

    Args:
        inputs: images (B, 3, h, w) uint8 or features (B, R, F); for an ensemble also a tuple of them, see
            `evaluation.ensemble.Ensemble.encode`.
        boxes: (B, N, 4) of objects in the images, for a captioner that `uses_objects`; (B, R, 4) of region features.
        with_attention: decode the best captions once more, for alpha and gates; T is that of the longest.
        with_heads: also return a transformer's attention weights of all layers and heads.
        rerank: re-ranks the candidates of each image by its features.
    """
    inputs, boxes = map_tensors(lambda x: copy_to_device(x, runtime.device), (inputs, boxes))
    with runtime.autocast():
        encoded = captioner.encode(inputs, boxes)
        searched = candidates = find_candidates(captioner, encoded, decoding)
        if rerank:
            candidates = rerank(candidates, encoded.features)
        regions = first_tensor(encoded.regions)
        alpha, gates, heads = regions.new_zeros(len(regions), 0, regions.shape[1]), None, None
        if with_attention:
            best = encode_words([n_best[0].words for n_best in candidates], captioner.vocabulary)
            best = copy_to_device(best, regions.device)
            decoder, regions, mask, best = first_member(captioner.decoder, encoded, best)
            _, alpha, gates = map_tensors(
                lambda x: x.squeeze(1), force_decode(decoder, regions, best.unsqueeze(1), mask)
            )
            if with_heads:
                heads = decoder.all_alpha(regions, functional.pad(best[:, :-1], (1, 0), value=START), mask)
    # Copy whole batches to the CPU, since each copy waits for the device.
    alpha, region_boxes = alpha.float().cpu(), encoded.boxes.cpu()
    is_region = has_area(region_boxes)  # (B, R)
    gates = None if gates is None else gates.tolist()
    heads = None if heads is None else heads.float().cpu()
    neighbors = None if encoded.neighbors is None else encoded.neighbors.cpu()
    edge_weights = [weights.float().cpu() for weights in encoded.edge_weights]
    return [
        ImageCaption(
            n_best=candidates[b],
            before_consensus=searched[b][0].words,
            alpha=alpha[b][:, is_region[b]],
            boxes=region_boxes[b][is_region[b]],
            gates=None if gates is None else gates[b],
            neighbors=None if neighbors is None else neighbors[b][is_region[b]],
            edge_weights=[weights[b][is_region[b]] for weights in edge_weights],
            heads=None if heads is None else heads[b][..., is_region[b]],
        )
        for b in range(len(candidates))
    ]


def find_candidates(captioner: CaptioningModel, encoded: Encoded, settings: DecodingSettings) -> list[list[Candidate]]:
    """Search or sample captions of B images; returns each image's candidates, best first, without repetitions."""
    constraints = Constraints.of(settings, captioner.vocabulary)
    decoder, regions, mask = captioner.decoder, encoded.regions, encoded.mask
    if settings.samples:
        captions = sample(decoder, regions, settings, mask=mask, constraints=constraints)
        log_probs = force_decode(decoder, regions, captions, mask)[0]
        scores, order = length_normalized(captions, log_probs, settings).sort(dim=1, descending=True)
        captions, log_probs = reorder(captions, order), log_probs.gather(1, order)
    else:
        captions, log_probs = beam_search(decoder, regions, settings, mask, constraints)
        scores = length_normalized(captions, log_probs, settings)
    numbers = torch.stack([log_probs, scores], dim=2).tolist()
    found = []
    for image_captions, image_numbers in zip(captions.tolist(), numbers, strict=True):
        unique: dict[str, Candidate] = {}
        for caption, (log_prob, score) in zip(image_captions, image_numbers, strict=True):
            words = captioner.vocabulary.decode(caption)
            if log_prob != -math.inf:
                unique.setdefault(" ".join(words), Candidate(words, log_prob, score))
        found.append(list(unique.values()))
    return found


def encode_words(captions: list[list[str]], vocabulary: Vocabulary) -> Tensor:
    """Convert captions to word ids (B, T), <end> repeated after their end; T includes the <end> of the longest."""
    longest = max(map(len, captions)) + 1
    word2idx = vocabulary.word2idx
    return torch.tensor([[*map(word2idx.__getitem__, words), *[END] * (longest - len(words))] for words in captions])


def first_member(
    decoder: Decoder | EnsembleDecoder, encoded: Encoded, captions: Tensor
) -> tuple[Decoder, Tensor, Tensor | None, Tensor]:
    """Return the decoder whose attention is shown, its regions, its mask, and its word ids of captions (B, T)."""
    if not isinstance(decoder, EnsembleDecoder):
        return decoder, encoded.regions, encoded.mask, captions
    word_map = decoder.word_maps[0]
    return decoder.members[0], encoded.regions[0], encoded.mask[0], captions if word_map is None else word_map[captions]
