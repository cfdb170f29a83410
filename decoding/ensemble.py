"""Ensembles: several decoders, each with regions of its own, that choose every word together.

Shapes: B images, R regions, D their width, C captions of an image, V words of the vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from modules.decoders import Decoder, Nested, StepOutput
from text.vocabulary import Vocabulary
from utils import InputError


class EnsembleDecoder:
    """A `StepDecoder` that predicts the mean of its members' probabilities.

    Regions, masks, keys and state are tuples with an entry per member, so members may differ in all of their sizes.
    Captions have the word ids of the ensemble. alpha and gate are those of the first member. The same decoder may be
    several members, with regions of several views of a photo.

    Args:
        members: in eval mode.
        word_maps: for each member the ids that it gives the ensemble's words, (V,) on the decoder's device, as
            `map_words` returns them; None: the same ids.
    """

    def __init__(self, members: Sequence[Decoder], word_maps: Sequence[Tensor | None]) -> None:
        self.members = list(members)
        self.word_maps = list(word_maps)

    @property
    def has_attention(self) -> bool:
        """True if the first member attends to the regions before each word."""
        return self.members[0].has_attention

    def choose_alpha(self, layer: int = 0, head: int = 0) -> None:
        """Choose the layer and head of the first member whose attention weights are returned."""
        self.members[0].choose_alpha(layer, head)

    def keys(self, regions: tuple[Tensor, ...], mask: Nested = None) -> Nested:
        """Compute the members' keys: regions, a tuple of (B, R, D), mask, a tuple of (B, R) or None."""
        return tuple(member.keys(r, m) for member, r, m in self._zip(regions, mask))

    def init_state(self, regions: tuple[Tensor, ...], mask: Nested = None) -> tuple[Nested, ...]:
        """Compute the members' states before the first word; arguments as in `keys`."""
        return tuple(member.init_state(r, m) for member, r, m in self._zip(regions, mask))

    def _zip(self, regions: tuple[Tensor, ...], mask: Nested) -> Iterator[tuple[Decoder, Tensor, Tensor | None]]:
        """Pair the members with their regions and masks."""
        return zip(self.members, regions, mask or [None] * len(self.members), strict=True)

    def step(self, words: Tensor, regions: tuple[Tensor, ...], keys: Nested, state: tuple[Nested, ...]) -> StepOutput:
        """Predict the next words (B, C); the logits are the logarithm of the members' mean probability."""
        parts = zip(self.members, self.word_maps, regions, keys, state, strict=True)
        outputs, total = [], torch.zeros((), device=words.device)
        for member, word_map, member_regions, member_keys, member_state in parts:
            member_words = words if word_map is None else word_map[words]
            output = member.step(member_words, member_regions, member_keys, member_state)
            logits = output.logits if word_map is None else output.logits.index_select(-1, word_map)
            total = total + logits.float().softmax(dim=-1)
            outputs.append(output)
        smallest = torch.finfo(total.dtype).tiny  # improbable words are not impossible: their logarithm is finite
        mean_log_probs = total.div_(len(outputs)).clamp_min_(smallest).log_()
        return outputs[0]._replace(logits=mean_log_probs, state=tuple(output.state for output in outputs))


def map_words(vocabulary: Vocabulary, member: Vocabulary, flipped: bool = False) -> Tensor | None:
    """Return the ids (V,) that a member of an ensemble gives a vocabulary's words, on the CPU; None for the same ids.

    Args:
        vocabulary: of the ensemble.
        member: the same words in any order.
        flipped: the member sees mirror images, so left and right are exchanged in its captions.

    Raises InputError if the words differ.
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
