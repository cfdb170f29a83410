"""Settings of beam search and sampling, shared by every script and the Python interface."""

from dataclasses import dataclass
from typing import Any

from utils import BaseSettings, InputError, setting


@dataclass(frozen=True, kw_only=True)
class DecodingSettings(BaseSettings):
    """Options of beam search and sampling."""

    # group: beam search
    beam_size: int = setting(5, minimum=1, needs="not samples")  # beams per image; 1 is greedy decoding
    length_penalty: float = setting(0.5, minimum=0)  # rank by log-probability / length ** this; 0 favors short captions
    max_length: int = setting(30, minimum=1)  # maximum words of a caption
    min_length: int = setting(0, minimum=0)  # minimum words of a caption
    no_repeat_ngram: int = setting(0, minimum=0)  # never repeat an n-gram of this length; 0: off
    banned_endings: tuple[str, ...] = ()  # words that no caption may end with, such as: a with of
    num_beam_groups: int = setting(1, minimum=1, needs="not samples")  # groups of beams of diverse beam search
    diversity_penalty: float = setting(0.5, minimum=0, needs="num_beam_groups>1")  # cost of a word in earlier groups
    batch_size: int = setting(32, minimum=1)  # images decoded at once

    # group: sampling
    samples: int = setting(0, minimum=0)  # captions to sample per image, the best is kept; 0: beam search
    temperature: float = setting(1.0, above=0, needs="samples")  # below 1 favors probable words
    top_k: int = setting(0, minimum=0, needs="samples")  # sample from the k most probable words; 0: from all
    top_p: float = setting(1.0, above=0, maximum=1, needs="samples")  # sample from the fewest words that reach this
    seed: int = setting(0, needs="samples")  # random seed of samples, which depend on --batch_size, too

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_length >= self.max_length:
            raise InputError(f"--min_length {self.min_length}: must be below --max_length {self.max_length}")
        if not self.samples and self.beam_size % self.num_beam_groups:
            raise InputError(
                f"--num_beam_groups {self.num_beam_groups}: does not divide the beam size {self.beam_size}: use a "
                f"multiple of {self.num_beam_groups}"
            )


def training_decoding(**changes: Any) -> DecodingSettings:
    """Return settings for training, which edited defaults do not reach: greedy, unconstrained, nothing truncated."""
    plain = {"beam_size": 1, "num_beam_groups": 1, "samples": 0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    unconstrained = {"min_length": 0, "no_repeat_ngram": 0, "banned_endings": ()}
    return DecodingSettings(**plain | unconstrained | changes)
