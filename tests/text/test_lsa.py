"""Latent semantic analysis against its definition, with plain loops."""

import math
from collections import Counter

import numpy as np
import torch

from text.lsa import embed_captions

CAPTIONS = [
    [["a", "dog", "runs"], ["a", "brown", "dog"]],
    [["a", "dog", "jumps"], ["the", "dog", "jumps", "high"]],
    [["a", "man", "rides", "a", "bike"], ["a", "man", "on", "a", "bike"]],
    [["a", "man", "runs"]],
    [["two", "girls", "play"], ["girls", "play", "ball"], ["two", "girls", "run"]],
    [["two", "girls", "jump", "high"]],
]


def ngrams(words):
    return [tuple(words[i : i + n]) for n in (1, 2) for i in range(len(words) - n + 1)]


def unit(vector):
    norm = math.sqrt(sum(x * x for x in vector.values()))
    return {key: x / norm for key, x in vector.items()} if norm else vector


def by_definition(captions):
    """The cosines' numerators: products of the images' TF-IDF vectors, less the mean of all images."""
    frequencies = Counter(ngram for image in captions for ngram in {n for words in image for n in ngrams(words)})
    vectors = []
    for image in captions:
        total = Counter()
        for words in image:
            counts = Counter(ngrams(words))
            idf = {n: math.log(len(captions) / frequencies[n]) if frequencies[n] >= 2 else 0.0 for n in counts}
            for ngram, x in unit({n: counts[n] * idf[n] for n in counts}).items():
                total[ngram] += x
        vectors.append(unit(total))
    names = sorted(frequencies)
    matrix = np.array([[vector.get(name, 0.0) for name in names] for vector in vectors])
    matrix -= matrix.mean(axis=0)
    return matrix @ matrix.T


def test_products_are_those_of_tfidf_vectors():
    embedded = embed_captions(CAPTIONS)
    assert embedded.dtype == torch.float32 and embedded.shape[0] == len(CAPTIONS)
    np.testing.assert_allclose((embedded @ embedded.T).numpy(), by_definition(CAPTIONS), atol=1e-5)
    word_ids = {word: i for i, word in enumerate({word for image in CAPTIONS for words in image for word in words})}
    ids = [[[word_ids[word] for word in words] for words in image] for image in CAPTIONS]
    torch.testing.assert_close(*(embed_captions(each) @ embed_captions(each).T for each in (ids, CAPTIONS)))


def test_fewer_dimensions_keep_the_most():
    embedded = embed_captions(CAPTIONS, dim=3)
    assert embedded.shape == (6, 3) and torch.equal(embedded, embed_captions(CAPTIONS, dim=3))
    state = torch.get_rng_state()
    embed_captions(CAPTIONS, dim=3)
    assert torch.equal(state, torch.get_rng_state())  # the caller's random numbers are left alone
    full = by_definition(CAPTIONS)
    assert np.linalg.norm((embedded @ embedded.T).numpy() - full) < 0.5 * np.linalg.norm(full)


def test_captions_that_share_nothing_or_all_are_zero():
    for captions in ([[["a"]], [["b"]]], [[["a", "b"]], [["a", "b"]]], [[["a", "dog"]]]):
        embedded = embed_captions(captions)
        assert len(embedded) == len(captions) and not embedded.any()
