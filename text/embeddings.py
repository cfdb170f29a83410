"""Pretrained word vectors (GloVe, word2vec) as initial word embeddings."""

import math
from collections import Counter
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common.distributed import rank
from text.vocabulary import PAD, SPECIAL_TOKENS, Vocabulary
from utils import InputError


def read_pretrained_embeddings(path: str | Path, vocabulary: Vocabulary, embed_dim: int) -> tuple[Tensor, Tensor]:
    """Vectors of a vocabulary's words from a text file of GloVe or word2vec, a word and its vector per line.

    Prints the share of words found and the number of malformed lines. Lines of words that the vocabulary lacks count
    as malformed only if their length is wrong. Returns the ids (n,) of the words found, special tokens excluded, and
    their vectors (n, E), scaled to a root mean square of 1. Raises InputError if the file is missing, its vectors have
    another size, it holds none of the words, or its vectors cannot be scaled.
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
    if not found:
        raise InputError(f"--pretrained_embeddings {path}: holds none of the {len(vocabulary)} words")
    vectors, num_words = torch.tensor(list(found.values())), len(vocabulary) - len(SPECIAL_TOKENS)
    scale = vectors.square().mean().sqrt()
    if not 0 < scale < math.inf:
        raise InputError(f"--pretrained_embeddings {path}: the values of its vectors are all zero, or too large")
    print(
        f"{path} has vectors for {len(found)} of {num_words} words ({len(found) / num_words:.1%}), "
        f"{malformed} malformed lines skipped"
    )
    return torch.tensor(list(found)), vectors / scale


def _vector_size(path: Path) -> int:
    """The most frequent vector size in the first 100 lines of a file; 0 where it is empty."""
    with open(path, "rb") as file:
        sizes = Counter(line.rstrip().count(b" ") for line in islice(file, 100))
    return max(sizes, key=lambda size: (sizes[size], size), default=0)


def _read_vectors(path: Path, vocabulary: Vocabulary, embed_dim: int) -> tuple[dict[int, list[float]], int]:
    """The first valid vector of each known word, by word id, and the number of malformed lines."""
    found, malformed = {}, 0
    with (
        open(path, "rb") as file,
        tqdm(total=path.stat().st_size, desc="word vectors", unit="B", unit_scale=True, disable=rank() > 0) as bar,
    ):
        for line_index, line in enumerate(file):
            bar.update(len(line))
            # Words of GloVe may contain spaces.
            word, *values = line.decode(errors="replace").rstrip().rsplit(" ", embed_dim)
            word_id = vocabulary.word2idx.get(word, PAD)
            if word_id in found:
                continue
            if len(values) == embed_dim and word_id < len(SPECIAL_TOKENS):
                continue
            vector = _parse_floats(values) if len(values) == embed_dim else []
            if vector:
                found[word_id] = vector
            else:
                malformed += line_index > 0 or len(values) != 1  # word2vec's first line: number of words, vector size
    return found, malformed


def _parse_floats(values: list[str]) -> list[float]:
    """Strings as finite floats; an empty list where one of them is none."""
    try:
        floats = [float(value) for value in values]
    except ValueError:
        return []
    return floats if all(map(math.isfinite, floats)) else []
