"""The vocabulary of a model: words to word ids and back."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from common.files import read_json
from utils import InputError

PAD, START, END, UNK = range(4)
SPECIAL_TOKENS = ["<pad>", "<start>", "<end>", "<unk>"]
BANNED_IDS = [PAD, START, UNK]  # never generated in a caption
FLIPPED_WORDS = {"left": "right", "right": "left"}  # what a mirror image exchanges


class Vocabulary:
    """The words that a model knows; a word's id is its index in `idx2word`, which the four special tokens start.

    Raises InputError where the words start with something else.
    """

    def __init__(self, words: Sequence[str]) -> None:
        if list(words[: len(SPECIAL_TOKENS)]) != SPECIAL_TOKENS:
            raise InputError(f"a word map starts with {' '.join(SPECIAL_TOKENS)}, not with {' '.join(words[:4])}")
        self.idx2word = list(words)
        self.word2idx = {word: index for index, word in enumerate(self.idx2word)}
        # What word ids become in the caption of a flipped image; a word without its opposite becomes <unk>.
        self.flipped_ids = {
            self.word2idx[word]: self.word_id(opposite)
            for word, opposite in FLIPPED_WORDS.items()
            if word in self.word2idx
        }

    def __len__(self) -> int:
        return len(self.idx2word)

    @classmethod
    def from_counts(cls, counts: Mapping[str, int], min_word_freq: int, vocab_size: int = 0) -> "Vocabulary":
        """The words counted at least min_word_freq times, by decreasing frequency; ties are in alphabetical order.

        At most vocab_size words, special tokens not counted; 0: no limit.
        """
        kept = [word for word in counts if counts[word] >= min_word_freq and word not in SPECIAL_TOKENS]
        kept.sort(key=lambda word: (-counts[word], word))
        return cls(SPECIAL_TOKENS + kept[: vocab_size or None])

    @classmethod
    def load(cls, data_folder: str | Path) -> "Vocabulary":
        """The vocabulary of a prepared folder's word_map.json. Raises InputError where that cannot be read."""
        path = Path(data_folder) / "word_map.json"
        try:
            word2idx = read_json(path)
            return cls(sorted(word2idx, key=word2idx.get))
        except (InputError, TypeError, AttributeError) as error:
            reason = error if isinstance(error, InputError) else f"{path} is not a word map"
            raise InputError(f"{reason}: run create_input_files.py again with --overwrite") from None

    def word_id(self, word: str) -> int:
        """The id of a caption's word: that of <unk> where it is unknown, or spelled as another special token."""
        return max(self.word2idx.get(word, UNK), UNK)

    def decode(self, word_ids: Iterable[int]) -> list[str]:
        """Word ids to words, up to <end> and without <start> and padding."""
        word_ids = [int(word_id) for word_id in word_ids]
        if END in word_ids:
            word_ids = word_ids[: word_ids.index(END)]
        return [self.idx2word[word_id] for word_id in word_ids if word_id not in (PAD, START)]
