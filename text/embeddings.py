"""Pretrained word vectors (GloVe, word2vec) as initial word embeddings."""

import math
from collections import Counter
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from common.distributed import rank
from text.vocabulary import PAD, SPECIAL_TOKENS
from utils import InputError


def read_pretrained_embeddings(path, vocabulary, size):
    """Vectors for a vocabulary's words from a text file of GloVe or word2vec: a word and its numbers a line.

    Prints the share of words found, and how many lines were skipped for not being that; of the words that the
    vocabulary does not hold only how many numbers they have is looked at. Returns the numbers (n,) of the words found,
    special ones never, and their vectors (n, E), scaled to a root mean square of 1. Raises InputError where the file's
    vectors are not of `size` numbers, hold none of the words or cannot be scaled.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"--pretrained_embeddings {path}: no such file")
    with open(path, "rb") as file:
        widths = Counter(line.count(b" ") for line in (line.rstrip() for line in islice(file, 100)))
    width = max(widths, key=lambda width: (widths[width], width), default=0)
    if width < 2:
        raise InputError(
            f"--pretrained_embeddings {path}: not a text file of a word and its numbers a line, with spaces between"
        )
    if width != size:
        raise InputError(f"--pretrained_embeddings {path}: it has {width} numbers a line, so give --embed_dim {width}")
    found, malformed = {}, 0
    with (
        open(path, "rb") as file,
        tqdm(total=path.stat().st_size, desc="word vectors", unit="B", unit_scale=True, disable=rank() > 0) as bar,
    ):
        for place, line in enumerate(file):
            bar.update(len(line))
            word, *values = line.decode(errors="replace").rstrip().rsplit(" ", size)  # a word of GloVe may hold spaces
            word = vocabulary.word2idx.get(word, PAD)
            if word in found:
                continue
            try:
                if len(values) != size:
                    raise ValueError
                if word >= len(SPECIAL_TOKENS):
                    found[word] = [float(value) for value in values]
                    if not all(map(math.isfinite, found[word])):
                        raise ValueError
            except ValueError:
                found.pop(word, None)
                malformed += place > 0 or len(values) != 1  # word2vec's first line counts words and numbers
    if not found:
        raise InputError(f"--pretrained_embeddings {path}: holds none of the {len(vocabulary)} words")
    vectors, words = torch.tensor(list(found.values())), len(vocabulary) - len(SPECIAL_TOKENS)
    scale = vectors.square().mean().sqrt()
    if not 0 < scale < math.inf:
        raise InputError(f"--pretrained_embeddings {path}: the numbers of its vectors are all zero, or too large")
    print(
        f"{path} has vectors for {len(found)} of {words} words ({len(found) / words:.1%}), "
        f"{malformed} malformed lines skipped"
    )
    return torch.tensor(list(found)), vectors / scale
