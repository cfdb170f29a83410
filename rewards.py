"""CIDEr-D as the reward of a caption while it trains; eval.py's table comes from pycocoevalcap."""

import math
from collections import Counter


class CiderReward:
    """CIDEr-D of captions, with the document frequencies of the training captions.

    Source: "CIDEr" (Vedantam et al., 2015), equations 1 to 5; weights, lengths and clipping as in its section 5.

    Args:
        captions: for each image its captions, each a sequence of words or numbers.
    """

    LONGEST = 4  # words of an n-gram
    SIGMA = 6.0  # words: how much another length costs

    def __init__(self, captions):
        self.frequencies = Counter()
        for one_image in captions:
            self.frequencies.update({gram for caption in one_image for gram in self._count(caption)})
        self.log_images = math.log(len(captions))

    def __call__(self, references, candidates):
        """Scores between 0 and 10 of candidates for one image, given its true captions."""
        references = [(len(words), *self._weigh(words)) for words in references]
        scores = []
        for words in candidates:
            weights, norms = self._weigh(words)
            total = 0.0
            for length, true_weights, true_norms in references:
                products = [0.0] * self.LONGEST
                for gram, weight in weights.items():
                    if true := true_weights.get(gram):
                        products[len(gram) - 1] += min(weight, true) * true
                penalty = math.exp(-((len(words) - length) ** 2) / (2 * self.SIGMA**2))
                total += penalty * sum(
                    product / (norm * true_norm)
                    for product, norm, true_norm in zip(products, norms, true_norms, strict=True)
                    if product
                )
            scores.append(10 * total / self.LONGEST / len(references))
        return scores

    def _count(self, words):
        """How often each n-gram of a caption occurs in it."""
        words = tuple(words)
        return Counter(words[i : i + n] for n in range(1, self.LONGEST + 1) for i in range(len(words) - n + 1))

    def _weigh(self, words):
        """TF-IDF of a caption's n-grams, and its norm for each n."""
        weights = {
            gram: count * (self.log_images - math.log(max(1, self.frequencies[gram])))
            for gram, count in self._count(words).items()
        }
        squares = [0.0] * self.LONGEST
        for gram, weight in weights.items():
            squares[len(gram) - 1] += weight**2
        return weights, [math.sqrt(square) for square in squares]
