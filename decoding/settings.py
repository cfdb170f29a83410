"""How captions are found: the settings of beam search and of sampling.

Shapes: B images, C captions of an image, T words of a caption, R regions, D their width.
"""

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from torch import Tensor

from decoding.beam_search import SearchSettings, beam_search, length_normalized
from decoding.constraints import Constraints
from decoding.contract import reorder
from decoding.ensemble import EnsembleDecoder
from decoding.force_decode import force_decode
from decoding.sampling import SamplingSettings, sample
from modules.decoders import Decoder, Nested
from text.vocabulary import Vocabulary
from utils import InputError, require_at_least


class Candidate(NamedTuple):
    """A caption that a search or sampling found."""

    words: list[str]
    log_prob: float
    score: float  # what captions are ranked by: the log-probability, normalized by the length


@dataclass(frozen=True)
class DecodingSettings:
    """How captions are decoded. Raises InputError for a value out of range."""

    beam_size: int = 1  # beams per image; 1 is greedy decoding
    max_length: int = 30  # maximum words of a caption, <end> included
    length_penalty: float = 0.5  # captions are ranked by log-probability / length ** length_penalty
    no_repeat_ngram: int = 0  # no sequence of this many words occurs twice in a caption; 0: any may
    min_length: int = 0  # minimum words of a caption
    banned_endings: tuple[str, ...] = ()  # words that no caption may end with
    num_beam_groups: int = 1  # groups that share the beams, each unlike those before it
    diversity_penalty: float = 0.5  # what a word costs for each beam of earlier groups that chose it
    samples: int = 0  # captions sampled per image in place of beams; 0: beam search
    temperature: float = 1.0  # of the samples: below 1 they favor probable words
    top_k: int = 0  # samples take only the k most probable words; 0: all
    top_p: float = 1.0  # samples take only the most probable words that together reach this probability
    seed: int = 0  # of the random numbers of samples
    batch_size: int = 32  # images decoded at once

    def __post_init__(self) -> None:
        require_at_least(self, 1, "beam_size", "max_length", "num_beam_groups", "batch_size")
        require_at_least(self, 0, "length_penalty", "no_repeat_ngram", "min_length", "diversity_penalty")
        require_at_least(self, 0, "samples", "top_k")
        if self.min_length >= self.max_length:
            raise InputError(f"--min_length {self.min_length}: must be below --max_length {self.max_length}")
        self._search_settings(Constraints())
        self._sampling_settings(Constraints())

    @classmethod
    def from_settings(cls, settings: Any, **changes: Any) -> "DecodingSettings":
        """Those of a script's settings that have the same names, with changes to them.

        Raises InputError for flags that are given and have no effect.
        """
        given = getattr(settings, "given", frozenset())
        for name in sorted(given & {"temperature", "top_k", "top_p", "seed"}):
            if not settings.samples:
                raise InputError(f"--{name} needs --samples: without, captions are searched")
        for name in sorted(given & {"beam_size", "beam_sizes", "num_beam_groups", "diversity_penalty"}):
            if settings.samples:
                raise InputError(f"--{name} does not go with --samples, which searches nothing: leave it out")
        if "diversity_penalty" in given and settings.num_beam_groups == 1:
            raise InputError("--diversity_penalty needs --num_beam_groups")
        names = [field.name for field in fields(cls)]
        return cls(**{name: getattr(settings, name) for name in names if hasattr(settings, name)} | changes)

    def constraints(self, vocabulary: Vocabulary) -> Constraints:
        """What captions must obey. Raises InputError for a banned ending that the vocabulary lacks."""
        for word in self.banned_endings:
            if word not in vocabulary.word2idx:
                raise InputError(f"--banned_endings {word}: the model does not know this word")
        endings = tuple(vocabulary.word2idx[word] for word in self.banned_endings)
        return Constraints(self.no_repeat_ngram, self.min_length, endings)

    def _search_settings(self, constraints: Constraints) -> SearchSettings:
        return SearchSettings(
            beam_size=self.beam_size,
            max_length=self.max_length,
            length_penalty=self.length_penalty,
            constraints=constraints,
            num_beam_groups=self.num_beam_groups,
            diversity_penalty=self.diversity_penalty,
        )

    def _sampling_settings(self, constraints: Constraints) -> SamplingSettings:
        return SamplingSettings(
            num_captions=self.samples,
            max_length=self.max_length,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            constraints=constraints,
        )

    def find(
        self, decoder: Decoder | EnsembleDecoder, regions: Nested, mask: Nested, vocabulary: Vocabulary
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Search or sample captions: regions (B, R, D), mask (B, R) or None, or tuples of them for an ensemble.

        Returns word ids (B, C, T), log-probabilities (B, C) and what the captions are ranked by (B, C), best first.
        """
        constraints = self.constraints(vocabulary)
        search_settings = self._search_settings(constraints)
        if not self.samples:
            captions, log_probs = beam_search(decoder, regions, search_settings, mask)
            return captions, log_probs, length_normalized(captions, log_probs, search_settings)
        captions = sample(decoder, regions, self._sampling_settings(constraints), mask=mask)
        log_probs = force_decode(decoder, regions, captions, mask)[0]
        scores, order = length_normalized(captions, log_probs, search_settings).sort(dim=1, descending=True)
        return reorder(captions, order), log_probs.gather(1, order), scores
