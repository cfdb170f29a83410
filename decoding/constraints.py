"""Rules that decoded captions must obey.

Shapes: B images, C captions of an image, t words so far, V words of the vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from decoding.settings import DecodingSettings
from text.vocabulary import END, PAD, Vocabulary
from utils import InputError, copy_to_device


@dataclass(frozen=True)
class Constraints:
    """Rules on the next word of a caption; by default there are none."""

    no_repeat_ngram: int = 0  # length of the word sequences that may not repeat; 0: all may
    min_length: int = 0  # minimum words of a caption, without <end>
    banned_endings: tuple[int, ...] = ()  # ids of words that no caption may end with

    @classmethod
    def of(cls, settings: DecodingSettings, vocabulary: Vocabulary) -> "Constraints":
        """Return the constraints of settings. Raises InputError for a banned ending that the vocabulary lacks."""
        for word in settings.banned_endings:
            if word not in vocabulary.word2idx:
                raise InputError(f"--banned_endings {word}: the model does not know this word")
        endings = tuple(vocabulary.word2idx[word] for word in settings.banned_endings)
        return cls(settings.no_repeat_ngram, settings.min_length, endings)

    def mask(self, log_probs: Tensor, captions: Tensor, is_last: bool) -> Tensor:
        """Set the log-probabilities of words that may not come next to -inf, in place.

        Args:
            log_probs: (B, C, V) of the next word.
            captions: (B, C, t) word ids so far, without <start>. The result for finished captions is not used.
            is_last: the next word is the last one and must be a fit ending.

        Returns:
            log_probs (B, C, V).
        """
        t = captions.shape[-1]
        if 0 < self.no_repeat_ngram <= t:
            self._ban_repeated_ngrams(log_probs, captions)
        if t < self.min_length:
            log_probs[..., END] = -math.inf
        if self.banned_endings:
            # All at once: one by one is a kernel per word, and a list as an index makes the host wait for a GPU.
            word_ids = copy_to_device(torch.tensor(self.banned_endings), log_probs.device)
            if t:
                ends_badly = (captions[..., -1:] == word_ids).any(dim=-1)  # (B, C)
                log_probs[..., END].masked_fill_(ends_badly, -math.inf)
            if is_last:
                log_probs.index_fill_(-1, word_ids, -math.inf)
        return log_probs

    def _ban_repeated_ngrams(self, log_probs: Tensor, captions: Tensor) -> None:
        """Ban each word that followed an earlier occurrence of a caption's last n - 1 words."""
        n = self.no_repeat_ngram
        ngrams = captions.unfold(-1, n, 1)  # (B, C, t - n + 1, n)
        prefix = captions[..., captions.shape[-1] - n + 1 :].unsqueeze(2)  # (B, C, 1, n - 1)
        repeats = (ngrams[..., :-1] == prefix).all(dim=-1)  # (B, C, t - n + 1)
        # Without a repetition this bans <pad>, which is never generated anyway.
        log_probs.scatter_(-1, ngrams[..., -1].where(repeats, PAD), -math.inf)
