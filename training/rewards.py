"""CIDEr-D as the reward of self-critical training; the scores of eval.py come from pycocoevalcap."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence


class CiderReward:
    """CIDEr-D of captions, with the document frequencies of the training captions.

    Source: "CIDEr" (Vedantam et al., 2015), equations 1 to 5; weights, lengths and clipping as in its section 5.

    Args:
        captions: for each image its captions, each a sequence of words or word ids.
    """

    MAX_N = 4  # longest n-grams
    SIGMA = 6.0  # of the Gaussian length penalty, in words

    def __init__(self, captions: Iterable[Sequence[Sequence]]) -> None:
        self.document_frequencies: Counter[tuple] = Counter()
        num_images = 0
        for image_captions in captions:
            self.document_frequencies.update({gram for c in image_captions for gram in self._ngram_counts(c)})
            num_images += 1
        self.log_images = math.log(num_images)

    def __call__(self, references: Sequence[Sequence], candidates: Sequence[Sequence]) -> list[float]:
        """Scores between 0 and 10 of candidates for one image, given its references."""
        vectors = [(len(words), *self._tfidf(words)) for words in references]
        scores = []
        for words in candidates:
            weights, norms = self._tfidf(words)
            total = 0.0
            for length, reference_weights, reference_norms in vectors:
                products = [0.0] * self.MAX_N
                for gram, weight in weights.items():
                    if reference := reference_weights.get(gram):
                        products[len(gram) - 1] += min(weight, reference) * reference
                penalty = math.exp(-((len(words) - length) ** 2) / (2 * self.SIGMA**2))
                total += penalty * sum(
                    product / (norm * reference_norm)
                    for product, norm, reference_norm in zip(products, norms, reference_norms, strict=True)
                    if product
                )
            scores.append(10 * total / self.MAX_N / len(references))
        return scores

    def _ngram_counts(self, caption: Sequence) -> Counter[tuple]:
        """How often each n-gram of a caption occurs in it."""
        words = tuple(caption)
        return Counter(words[i : i + n] for n in range(1, self.MAX_N + 1) for i in range(len(words) - n + 1))

    def _tfidf(self, words: Sequence) -> tuple[dict[tuple, float], list[float]]:
        """TF-IDF weights of a caption's n-grams, and their norm for each n."""
        weights = {
            gram: count * (self.log_images - math.log(max(1, self.document_frequencies[gram])))
            for gram, count in self._ngram_counts(words).items()
        }
        squares = [0.0] * self.MAX_N
        for gram, weight in weights.items():
            squares[len(gram) - 1] += weight**2
        return weights, [math.sqrt(square) for square in squares]
