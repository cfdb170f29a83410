"""Words: the vocabulary of a model, and vectors that its words can start from.

Shapes: V words of the vocabulary, E units of a word's embedding.
"""

from pathlib import Path

from common.files import read_json
from utils import InputError

PAD, START, END, UNK = range(4)
SPECIAL_TOKENS = ["<pad>", "<start>", "<end>", "<unk>"]
BANNED_IDS = [PAD, START, UNK]  # the words that no caption of a model holds


class Vocabulary:
    """The words that a model knows; a word's number is its place in the list, the four special words first."""

    def __init__(self, words):
        if list(words[: len(SPECIAL_TOKENS)]) != SPECIAL_TOKENS:
            raise InputError(f"a word map starts with {' '.join(SPECIAL_TOKENS)}, not with {' '.join(words[:4])}")
        self.idx2word = list(words)
        self.word2idx = {word: number for number, word in enumerate(self.idx2word)}

    def __len__(self):
        return len(self.idx2word)

    @classmethod
    def from_counts(cls, counts, min_word_freq, vocab_size=0):
        """The words counted at least min_word_freq times, most frequent first, ties in alphabetical order.

        Where vocab_size is not 0, no more than these many, the special words not counted.
        """
        kept = [word for word in counts if counts[word] >= min_word_freq and word not in SPECIAL_TOKENS]
        kept.sort(key=lambda word: (-counts[word], word))
        return cls(SPECIAL_TOKENS + kept[: vocab_size or None])

    @classmethod
    def load(cls, data_folder):
        """The vocabulary of a prepared folder's word_map.json."""
        numbers = read_json(Path(data_folder) / "word_map.json")
        return cls(sorted(numbers, key=numbers.get))

    def word_id(self, word):
        """A word's number in a caption: that of <unk> where it is not known, or is one of the other special words."""
        return max(self.word2idx.get(word, UNK), UNK)

    def decode(self, numbers):
        """Numbers to words, up to <end> and without <start> and padding."""
        numbers = [int(number) for number in numbers]
        if END in numbers:
            numbers = numbers[: numbers.index(END)]
        return [self.idx2word[number] for number in numbers if number not in (PAD, START)]
