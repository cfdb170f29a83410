"""Captions of a batch of images, with what they were decoded from.

Shapes: B images, C candidates of an image, T words of a caption, R regions, D features of a region as the decoder sees
it, F features of the encoder, N neighbors of a region in the graph, L layers, n heads.
"""

import contextlib
import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from decoding.beam_search import beam_search, length_normalized
from decoding.constraints import Constraints
from decoding.contract import reorder
from decoding.ensemble import EnsembleDecoder
from decoding.force_decode import force_decode
from decoding.sampling import sample
from decoding.settings import DecodingSettings
from modules.decoders import Decoder, Nested, first_tensor, map_tensors
from modules.graph import RegionGraph
from modules.regions import RegionSource, has_area
from text.vocabulary import END, START, Vocabulary
from utils import Runtime, copy_to_device


class Candidate(NamedTuple):
    """A caption that a search or sampling found."""

    words: list[str]
    log_prob: float
    score: float  # the log-probability normalized by the length, by which captions are ranked


class Encoded(NamedTuple):
    """What an encoder made of B images; of an ensemble, regions, masks and features are tuples of tensors."""

    regions: Nested  # (B, R, D) for the decoder
    mask: Nested  # (B, R), False where an image has no region; None: all have R
    boxes: Tensor  # (B, R, 4) of the regions, as `modules.regions.RegionSource` returns them
    features: Nested  # (B, R, F) of the grid
    neighbors: Tensor | None  # (B, R, N) of the graph, as `RegionGraph.forward` returns them
    edge_weights: list[Tensor]  # (B, R, N) of each graph layer


class CaptioningModel(Protocol):
    """A model that captions images: a `models.Captioner` or an `evaluation.ensemble.Ensemble`."""

    vocabulary: Vocabulary
    region_source: RegionSource
    graph: RegionGraph

    @property
    def decoder(self) -> Decoder | EnsembleDecoder:
        """What finds the words."""
        ...

    def encode(self, inputs: Any, boxes: Tensor | None) -> Encoded:
        """What the decoder sees of inputs as `caption_batch` takes them."""
        ...


class Rerank(Protocol):
    """A function that re-ranks the candidates of B images, such as `evaluation.consensus.Consensus.rerank`."""

    def __call__(self, candidates: list[list[Candidate]], features: Nested) -> list[list[Candidate]]:
        """Return each image's candidates, best first, given its features (B, R, F)."""
        ...


@dataclass(frozen=True)
class ImageCaption:
    """The caption of one image and what it was decoded from, on the CPU."""

    n_best: list[Candidate]  # best first
    before_consensus: list[str]  # the caption that is best without consensus re-ranking
    alpha: Tensor  # (T, R) attention weights of the best; T = 0 where they were not asked for
    boxes: Tensor  # (R, 4) of the regions, in fractions of the sides: left, top, right, bottom
    gates: list[float] | None  # T gates of the best (`Decoder.gate`), from 0 to 1; None where the decoder has none
    neighbors: Tensor | None  # (R, N) of the graph; None without graph layers
    edge_weights: list[Tensor]  # (R, N) of each graph layer
    heads: Tensor | None = None  # (L, n, T, R) attention weights of all layers and heads, where they were asked for

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
        inputs: images (B, 3, h, w) uint8 or cached features (B, R, F); of an ensemble also a
            tuple of them, as `evaluation.ensemble.Ensemble.encode` takes it.
        boxes: of objects in the images (B, N, 4), for a captioner that `uses_objects`; of region features (B, R, 4).
        with_attention: decode the best captions once more, for alpha and gates; T is that of the longest.
        with_heads: and of a transformer the attention weights of all layers and heads.
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
            best = encode_words([image[0].words for image in candidates], captioner.vocabulary)
            best = copy_to_device(best, regions.device)
            alpha, gates = caption_attention(captioner.decoder, encoded.regions, best, encoded.mask)
            if with_heads:
                heads = caption_heads(captioner.decoder, encoded.regions, best, encoded.mask)
    # All moves to the CPU are of the whole batch: each waits for the device.
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


def find_candidates(captioner: CaptioningModel, encoded: Encoded, decoding: DecodingSettings) -> list[list[Candidate]]:
    """The candidates of B images by beam search or sampling, each image's best first, without repetitions."""
    constraints = Constraints.of(decoding, captioner.vocabulary)
    captions, *numbers = decode(captioner.decoder, encoded, decoding, constraints)
    found = []
    for image_captions, image_numbers in zip(captions.tolist(), torch.stack(numbers, dim=2).tolist(), strict=True):
        unique: dict[str, Candidate] = {}
        for caption, (log_prob, score) in zip(image_captions, image_numbers, strict=True):
            words = captioner.vocabulary.decode(caption)
            if log_prob != -math.inf:
                unique.setdefault(" ".join(words), Candidate(words, log_prob, score))
        found.append(list(unique.values()))
    return found


def decode(
    decoder: Decoder | EnsembleDecoder, encoded: Encoded, settings: DecodingSettings, constraints: Constraints
) -> tuple[Tensor, Tensor, Tensor]:
    """Search or sample captions of B images.

    Returns word ids (B, C, T), log-probabilities (B, C) and the scores that captions are ranked by (B, C), best first.
    """
    regions, mask = encoded.regions, encoded.mask
    if not settings.samples:
        captions, log_probs = beam_search(decoder, regions, settings, mask, constraints)
        return captions, log_probs, length_normalized(captions, log_probs, settings)
    captions = sample(decoder, regions, settings, mask=mask, constraints=constraints)
    log_probs = force_decode(decoder, regions, captions, mask)[0]
    scores, order = length_normalized(captions, log_probs, settings).sort(dim=1, descending=True)
    return reorder(captions, order), log_probs.gather(1, order), scores


def encode_words(captions: list[list[str]], vocabulary: Vocabulary) -> Tensor:
    """Captions as word ids (B, T), <end> repeated after their end: T is that of the longest, with its <end>."""
    longest = max(map(len, captions)) + 1
    word2idx = vocabulary.word2idx
    return torch.tensor([[*map(word2idx.__getitem__, words), *[END] * (longest - len(words))] for words in captions])


def caption_attention(
    decoder: Decoder | EnsembleDecoder, regions: Nested, captions: Tensor, mask: Nested = None
) -> tuple[Tensor, Tensor | None]:
    """Attention weights (B, T, R) and gates (B, T), from 0 to 1, of captions (B, T); None for decoders without.

    Those of an ensemble are its first member's.
    """
    decoder, regions, captions, mask = _first_member(decoder, regions, captions, mask)
    gates: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        if decoder.gate is not None:
            hook = decoder.gate.register_forward_hook(lambda *call: gates.append(call[-1].sigmoid()))
            stack.callback(hook.remove)
        alpha = force_decode(decoder, regions, captions.unsqueeze(1), mask)[1].squeeze(1)
    return alpha, torch.cat(gates, dim=1).squeeze(-1) if gates else None


def caption_heads(
    decoder: Decoder | EnsembleDecoder, regions: Nested, captions: Tensor, mask: Nested = None
) -> Tensor | None:
    """Attention weights (B, L, n, T, R) of all layers and heads for captions (B, T); None for decoders without.

    Those of an ensemble are its first member's.
    """
    decoder, regions, captions, mask = _first_member(decoder, regions, captions, mask)
    inputs = functional.pad(captions[:, :-1], (1, 0), value=START)
    return decoder.all_alpha(regions, inputs, mask)


def _first_member(
    decoder: Decoder | EnsembleDecoder, regions: Nested, captions: Tensor, mask: Nested
) -> tuple[Decoder, Tensor, Tensor, Tensor | None]:
    """Of an ensemble the first member, with its regions, its word ids of captions (B, T), and its mask."""
    if not isinstance(decoder, EnsembleDecoder):
        return decoder, regions, captions, mask
    word_map = decoder.word_maps[0]
    captions = captions if word_map is None else word_map[captions]
    return decoder.members[0], regions[0], captions, mask[0] if mask else None
