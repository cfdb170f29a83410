"""The vocabulary of a model, words to word ids and back, and pretrained vectors of its words."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common.distributed import rank
from common.files import read_json
from utils import InputError

PAD, START, END, UNK = range(4)
SPECIAL_TOKENS = ["<pad>", "<start>", "<end>", "<unk>"]
BANNED_IDS = [PAD, START, UNK]  # never generated in a caption
FLIPPED_WORDS = {"left": "right", "right": "left"}  # what a mirror image exchanges


class Vocabulary:
    """The words that a model knows. The id of a word is its index in `idx2word`; the special tokens come first.

    Raises InputError if the words do not start with the special tokens.
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
        """Build a vocabulary of the words counted at least `min_word_freq` times, the most frequent first.

        Ties are in alphabetical order. At most `vocab_size` words are kept, special tokens not counted; 0: no limit.
        """
        kept = [word for word in counts if counts[word] >= min_word_freq and word not in SPECIAL_TOKENS]
        kept.sort(key=lambda word: (-counts[word], word))
        return cls(SPECIAL_TOKENS + kept[: vocab_size or None])

    @classmethod
    def load(cls, data_folder: str | Path) -> "Vocabulary":
        """Load the vocabulary of a prepared folder, its word_map.json. Raises InputError if that cannot be read."""
        path = Path(data_folder) / "word_map.json"
        try:
            word2idx = read_json(path)
            return cls(sorted(word2idx, key=word2idx.get))
        except (InputError, TypeError, AttributeError) as error:
            reason = error if isinstance(error, InputError) else f"{path} is not a word map"
            raise InputError(f"{reason}: run create_input_files.py again with --overwrite") from None

    def word_id(self, word: str) -> int:
        """Return the id of a word in a caption; unknown words and the spellings of special tokens are <unk>."""
        return max(self.word2idx.get(word, UNK), UNK)

    def decode(self, word_ids: Iterable[int]) -> list[str]:
        """Convert word ids to words, up to <end> and without <start> and padding."""
        word_ids = [int(word_id) for word_id in word_ids]
        if END in word_ids:
            word_ids = word_ids[: word_ids.index(END)]
        return [self.idx2word[word_id] for word_id in word_ids if word_id not in (PAD, START)]


def read_pretrained_embeddings(path: str | Path, vocabulary: Vocabulary, embed_dim: int) -> tuple[Tensor, Tensor]:
    """Read the vectors of a vocabulary's words from a text file of GloVe or word2vec, a word and its vector a line.

    Returns the ids (n,) of the words found, special tokens excluded, and their vectors (n, E), scaled to a root mean
    square of 1. Prints the share of words found and the number of malformed lines. A line of a word outside the
    vocabulary counts as malformed only if its length is wrong.

    Raises InputError if the file is missing, its vectors have another size, it holds none of the words, or its vectors
    cannot be scaled.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"--pretrained_embeddings {path}: no such file")
    size = _vector_size(path)
    if size < 2:
        raise InputError(
            f"--pretrained_embeddings {path}: not a text file of a word and its vector per line, separated by spaces"
        )
    if size != embed_dim:
        raise InputError(f"--pretrained_embeddings {path}: its vectors have size {size}, so give --embed_dim {size}")
    found, malformed = _read_vectors(path, vocabulary, embed_dim)
    num_words = len(vocabulary) - len(SPECIAL_TOKENS)
    if not found:
        raise InputError(f"--pretrained_embeddings {path}: holds none of the {num_words} words of the vocabulary")
    vectors = torch.tensor(list(found.values()))
    scale = vectors.square().mean().sqrt()
    if not 0 < scale < math.inf:
        raise InputError(f"--pretrained_embeddings {path}: the values of its vectors are all zero, or too large")
    print(
        f"{path} has vectors for {len(found)} of {num_words} words ({len(found) / num_words:.1%}), "
        f"{malformed} malformed lines skipped"
    )
    return torch.tensor(list(found)), vectors / scale


def _vector_size(path: Path) -> int:
    """Return the most frequent vector size in the first 100 lines of a file; 0 if it is empty."""
    with open(path, "rb") as file:
        sizes = Counter(line.rstrip().count(b" ") for line in islice(file, 100))
    return max(sizes, key=lambda size: (sizes[size], size), default=0)


def _read_vectors(path: Path, vocabulary: Vocabulary, embed_dim: int) -> tuple[dict[int, list[float]], int]:
    """Read the first valid vector of each known word, by word id, and count the malformed lines."""
    found, malformed = {}, 0
    with (
        open(path, "rb") as file,
        tqdm(total=path.stat().st_size, desc="word vectors", unit="B", unit_scale=True, disable=rank() > 0) as bar,
    ):
        for line_index, line in enumerate(file):
            bar.update(len(line))
            # Words of GloVe may contain spaces.
            word, *values = line.decode(errors="replace").rstrip().rsplit(" ", embed_dim)
            if line_index == 0 and len(values) == 1:
                continue  # word2vec's first line: number of words, vector size
            word_id = vocabulary.word2idx.get(word, PAD)
            if word_id in found:
                continue
            if len(values) == embed_dim and word_id < len(SPECIAL_TOKENS):
                continue  # a valid line of another word
            vector = _parse_floats(values) if len(values) == embed_dim else []
            if vector:
                found[word_id] = vector
            else:
                malformed += 1
    return found, malformed


def _parse_floats(values: list[str]) -> list[float]:
    """Parse strings as finite floats; returns an empty list if one of them is not."""
    try:
        floats = [float(value) for value in values]
    except ValueError:
        return []
    return floats if all(map(math.isfinite, floats)) else []
