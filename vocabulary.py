"""Words: the vocabulary of a model, and vectors that its words can start from.

Shapes: V words of the vocabulary, E units of a word's embedding.
"""

import math
from collections import Counter
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from utils import InputError, rank, read_json

PAD, START, END, UNKNOWN = range(4)
SPECIAL_WORDS = ["<pad>", "<start>", "<end>", "<unk>"]
NEVER_WRITTEN = [PAD, START, UNKNOWN]  # the words that no caption of a model holds


class Vocabulary:
    """The words that a model knows; a word's number is its place in the list, the four special words first."""

    def __init__(self, words):
        if list(words[: len(SPECIAL_WORDS)]) != SPECIAL_WORDS:
            raise InputError(f"a word map starts with {' '.join(SPECIAL_WORDS)}, not with {' '.join(words[:4])}")
        self.words = list(words)
        self.numbers = {word: number for number, word in enumerate(self.words)}

    def __len__(self):
        return len(self.words)

    @classmethod
    def from_counts(cls, counts, min_word_freq, max_words=0):
        """The words counted at least min_word_freq times, most frequent first, ties in alphabetical order.

        Where max_words is not 0, no more than these many, the special words not counted.
        """
        kept = [word for word in counts if counts[word] >= min_word_freq and word not in SPECIAL_WORDS]
        kept.sort(key=lambda word: (-counts[word], word))
        return cls(SPECIAL_WORDS + kept[: max_words or None])

    @classmethod
    def load(cls, data_folder):
        """The vocabulary of a prepared folder's word_map.json."""
        numbers = read_json(Path(data_folder) / "word_map.json")
        return cls(sorted(numbers, key=numbers.get))

    def number(self, word):
        """A word's number in a caption: that of <unk> where it is not known, or is one of the other special words."""
        return max(self.numbers.get(word, UNKNOWN), UNKNOWN)

    def decode(self, numbers):
        """Numbers to words, up to <end> and without <start> and padding."""
        numbers = [int(number) for number in numbers]
        if END in numbers:
            numbers = numbers[: numbers.index(END)]
        return [self.words[number] for number in numbers if number not in (PAD, START)]


def read_word_vectors(path, vocabulary, size):
    """Vectors for a vocabulary's words from a text file of GloVe or word2vec: a word and its numbers a line.

    Prints the share of words found, and how many lines were skipped for not being that; of the words that the
    vocabulary does not hold only how many numbers they have is looked at. Returns the numbers (n,) of the words found,
    special ones never, and their vectors (n, E), scaled to a root mean square of 1. Raises InputError where the file's
    vectors are not of `size` numbers, hold none of the words or cannot be scaled.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"--word_vectors {path}: no such file")
    with open(path, "rb") as file:
        widths = Counter(line.count(b" ") for line in (line.rstrip() for line in islice(file, 100)))
    width = max(widths, key=lambda width: (widths[width], width), default=0)
    if width < 2:
        raise InputError(
            f"--word_vectors {path}: not a text file of a word and its numbers a line, with spaces between"
        )
    if width != size:
        raise InputError(f"--word_vectors {path}: it has {width} numbers a line, so give --embedding_size {width}")
    found, malformed = {}, 0
    with (
        open(path, "rb") as file,
        tqdm(total=path.stat().st_size, desc="word vectors", unit="B", unit_scale=True, disable=rank() > 0) as bar,
    ):
        for place, line in enumerate(file):
            bar.update(len(line))
            word, *values = line.decode(errors="replace").rstrip().rsplit(" ", size)  # a word of GloVe may hold spaces
            word = vocabulary.numbers.get(word, PAD)
            if word in found:
                continue
            try:
                if len(values) != size:
                    raise ValueError
                if word >= len(SPECIAL_WORDS):
                    found[word] = [float(value) for value in values]
                    if not all(map(math.isfinite, found[word])):
                        raise ValueError
            except ValueError:
                found.pop(word, None)
                malformed += place > 0 or len(values) != 1  # word2vec's first line counts words and numbers
    if not found:
        raise InputError(f"--word_vectors {path}: holds none of the {len(vocabulary)} words")
    vectors, words = torch.tensor(list(found.values())), len(vocabulary) - len(SPECIAL_WORDS)
    scale = vectors.square().mean().sqrt()
    if not 0 < scale < math.inf:
        raise InputError(f"--word_vectors {path}: the numbers of its vectors are all zero, or too large")
    print(
        f"{path} has vectors for {len(found)} of {words} words ({len(found) / words:.1%}), "
        f"{malformed} malformed lines skipped"
    )
    return torch.tensor(list(found)), vectors / scale
