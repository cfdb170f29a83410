"""Ensembles: several decoders, each with regions of its own, that choose every word together.

Shapes: B images, R regions, D their width, C captions of an image, V words of the vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from modules.decoders import Decoder, Nested
from text.vocabulary import Vocabulary
from utils import InputError


class EnsembleDecoder:
    """A `StepDecoder` that predicts the mean of its members' probabilities.

    Regions, masks, keys and state are tuples with an entry per member; the members may differ in all of their sizes.
    Captions have the word ids of the ensemble. alpha is that of the first member. The same decoder may be several
    members, with regions of several views of a photo.

    Args:
        members: in eval mode.
        word_maps: of each member, the id that it gives each word of the ensemble, (V,) on the decoder's device, as
            `map_words` returns it; None: the same ids.
    """

    def __init__(self, members: Sequence[Decoder], word_maps: Sequence[Tensor | None]) -> None:
        self.members = list(members)
        self.word_maps = list(word_maps)

    @property
    def has_attention(self) -> bool:
        """Whether the first member attends to the regions before each word."""
        return self.members[0].has_attention

    def choose_alpha(self, layer: int = 0, head: int = 0) -> None:
        """As `modules.decoders.Decoder.choose_alpha`, of the first member."""
        self.members[0].choose_alpha(layer, head)

    def keys(self, regions: tuple[Tensor, ...], mask: Nested = None) -> Nested:
        """The members' keys: regions, a tuple of (B, R, D), masks of (B, R) -> tuple of tensors (B, ...)."""
        return tuple(member.keys(r, m) for member, r, m in self._zip(regions, mask))

    def init_state(self, regions: tuple[Tensor, ...], mask: Nested = None) -> tuple[Nested, ...]:
        """The members' states before the first word: as `keys` -> tuple of tensors (B, 1, ...)."""
        return tuple(member.init_state(r, m) for member, r, m in self._zip(regions, mask))

    def _zip(self, regions: tuple[Tensor, ...], mask: Nested) -> Iterator[tuple[Decoder, Tensor, Tensor | None]]:
        """Each member with its regions and mask."""
        return zip(self.members, regions, mask or [None] * len(self.members), strict=True)

    def step(
        self, words: Tensor, regions: tuple[Tensor, ...], keys: Nested, state: tuple[Nested, ...]
    ) -> tuple[Tensor, Tensor, tuple[Nested, ...]]:
        """Predict the next word of each of an image's C captions.

        words (B, C), regions, keys and state as above
        -> logits (B, C, V), the logarithm of the members' mean probability, alpha (B, C, R) of the first, state.
        """
        total, alphas, states = None, [], []
        parts = zip(self.members, self.word_maps, regions, keys, state, strict=True)
        for member, word_map, member_regions, member_keys, member_state in parts:
            member_words = words if word_map is None else word_map[words]
            logits, alpha, new_state = member.step(member_words, member_regions, member_keys, member_state)
            if word_map is not None:
                logits = logits.index_select(-1, word_map)
            probabilities = logits.float().softmax(dim=-1)
            total = probabilities if total is None else total.add_(probabilities)
            alphas.append(alpha)
            states.append(new_state)
        assert total is not None
        smallest = torch.finfo(total.dtype).tiny  # improbable words are not impossible: their logarithm is finite
        return total.div_(len(self.members)).clamp_min_(smallest).log_(), alphas[0], tuple(states)


def map_words(vocabulary: Vocabulary, member: Vocabulary, flipped: bool = False) -> Tensor | None:
    """The ids that a member of an ensemble gives the words of a vocabulary: (V,) on the CPU, or None for the same ids.

    Args:
        vocabulary: of the ensemble.
        member: the same words in any order.
        flipped: the member sees the mirror images, so that left and right are exchanged in its captions.

    Raises InputError where the words differ.
    """
    different = set(vocabulary.idx2word) ^ set(member.idx2word)
    if different:
        raise InputError(
            f"an ensemble needs models with the same words: {len(different)} are known to only one of two models, such "
            f"as {min(different)!r}; train them on the same prepared folder"
        )
    ids = [member.word2idx[word] for word in vocabulary.idx2word]
    if flipped:
        ids = [member.flipped_ids.get(word_id, word_id) for word_id in ids]
    return None if ids == list(range(len(ids))) else torch.tensor(ids)
