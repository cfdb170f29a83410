"""The metrics of captions, of a split and of each image, and their table. N images."""

import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor import meteor as reference_meteor
from pycocoevalcap.rouge.rouge import Rouge

from utils import InputError

MAX_N = 4  # longest n-grams of BLEU
# The columns of the table, in their order.
TITLES = {
    "model": "model",
    "runs": "runs",
    "beam_size": "beam",
    "samples": "samples",
    "consensus": "consensus",
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "meteor": "METEOR",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
    "spice": "SPICE",
    "pointing": "pointing",
    "correctness": "correctness",
    "entropy": "entropy",
    "images_per_second": "images/s",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "vocabulary": "vocabulary",
    "mean_length": "mean length",
    "in_training": "in training",
}
ROW_KEYS = ("beam_size", "samples", "consensus")  # how the captions of a row were decoded
FORMATS = {  # four digits for all others
    "model": "{}",
    "runs": "{}",
    "beam_size": "{}",
    "samples": "{}",
    "consensus": "{:g}",
    "images_per_second": "{:.1f}",
    "vocabulary": "{}",
    "mean_length": "{:.2f}",
}


def compute_metrics(references: list[list[list[str]]], predictions: list[list[str]]) -> dict[str, float]:
    """Score predicted captions against the reference captions of each image.

    BLEU-1 to 4 are corpus BLEU (Papineni et al., 2002); ROUGE-L and CIDEr are those of pycocoevalcap. CIDEr is between
    0 and 10, all others between 0 and 1.

    Args:
        references: for each image its captions, each a list of words.
        predictions: for each image one caption, a list of words.
    """
    bleu = corpus_bleu(bleu_statistics(references, predictions).sum(axis=0)).tolist()
    texts = image_texts(references, predictions)
    return {
        **{f"bleu_{n}": score for n, score in enumerate(bleu, start=1)},
        "rouge_l": float(Rouge().compute_score(*texts)[0]),
        "cider": float(Cider().compute_score(*texts)[0]),
    }


def image_scores(references: list[list[list[str]]], predictions: list[list[str]]) -> dict[str, np.ndarray]:
    """Score each image's caption alone: "bleu_4", "rouge_l" and "cider", each (N,). Arguments as in `compute_metrics`.

    The means of ROUGE-L and CIDEr are the scores of the split; CIDEr's document frequencies come from all the images
    given. BLEU-4 is smoothed like pycocoevalcap's of one image: a caption without a common 4-gram scores near 0, not 0.
    The BLEU of the split is not the mean of its images'.
    """
    texts = image_texts(references, predictions)
    return {
        "bleu_4": _smoothed_bleu(bleu_statistics(references, predictions)),
        "rouge_l": np.asarray(Rouge().compute_score(*texts)[1]),
        "cider": np.asarray(Cider().compute_score(*texts)[1]),
    }


def image_texts(
    references: list[list[list[str]]], predictions: list[list[str]]
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Convert references and predictions to the form of pycocoevalcap: sentences by the index of their image."""
    reference_texts = {i: [" ".join(words) for words in captions] for i, captions in enumerate(references)}
    return reference_texts, {i: [" ".join(words)] for i, words in enumerate(predictions)}


def bleu_statistics(references: list[list[list[str]]], predictions: list[list[str]]) -> np.ndarray:
    """Count what BLEU needs for each image, (N, 10).

    The columns are, for n from 1 to 4, the n-grams that occur in a reference; the number of all n-grams, at least 1 as
    in nltk; the length of the caption; the length of the closest reference.
    """
    rows = []
    for captions, words in zip(references, predictions, strict=True):
        counts = Counter(_ngrams(words))
        most = Counter()  # largest count of each n-gram over the references
        for reference in captions:
            most |= Counter(ngram for ngram in _ngrams(reference) if ngram in counts)
        matches = [0] * MAX_N
        for ngram, count in most.items():
            matches[len(ngram) - 1] += min(count, counts[ngram])
        totals = [max(1, len(words) - n) for n in range(MAX_N)]
        closest = min((len(reference) for reference in captions), key=lambda length: (abs(length - len(words)), length))
        rows.append([*matches, *totals, len(words), closest])
    return np.array(rows, float)


def corpus_bleu(sums: np.ndarray) -> np.ndarray:
    """Compute BLEU-1 to 4 (..., 4) of a set of images from the sums (..., 10) of their `bleu_statistics`.

    Source: Papineni et al., 2002. Like nltk's corpus_bleu, but 0 if no n-gram occurs in a reference.
    """
    matches, totals, lengths, closest = np.split(sums, [MAX_N, 2 * MAX_N, 2 * MAX_N + 1], axis=-1)
    with np.errstate(divide="ignore"):
        log_precisions = np.log(matches / totals)  # -inf without a match
    brevity = np.minimum(0.0, 1 - closest / np.maximum(lengths, 1e-9))  # logarithm of the penalty
    return np.exp(brevity + log_precisions.cumsum(axis=-1) / np.arange(1, MAX_N + 1))


def _smoothed_bleu(statistics: np.ndarray) -> np.ndarray:
    """Compute BLEU-4 (N,) of each image, with the tiny numbers that pycocoevalcap's BleuScorer adds to the counts."""
    tiny, small = 1e-15, 1e-9
    matches, lengths, closest = statistics[:, :MAX_N], statistics[:, 8:9], statistics[:, 9]
    totals = np.maximum(0, lengths - np.arange(MAX_N))
    bleu = ((matches + tiny) / (totals + small)).prod(axis=1) ** (1 / MAX_N)
    ratio = (lengths[:, 0] + tiny) / (closest + small)
    return bleu * np.exp(np.minimum(0.0, 1 - 1 / ratio))


def _ngrams(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Iterate over the n-grams of a caption, n from 1 to 4."""
    for n in range(1, MAX_N + 1):
        yield from zip(*(words[start:] for start in range(n)), strict=False)


class Meteor(reference_meteor.Meteor):
    """pycocoevalcap's METEOR with its Java program in English.

    In other locales the program writes decimal commas (German) or changes letters (the dotless i of Turkish).
    """

    def __init__(self) -> None:
        english = ["-Duser.language=en", "-Duser.country=US"]
        options = ["-", "-", "-stdio", "-l", "en", "-norm"]
        self.meteor_cmd = ["java", *english, "-Xmx2G", "-jar", reference_meteor.METEOR_JAR, *options]
        folder, pipe = Path(reference_meteor.__file__).parent, subprocess.PIPE
        self.meteor_p = subprocess.Popen(
            self.meteor_cmd, cwd=folder, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL
        )
        self.lock = threading.RLock()  # reentrant: the destructor takes it again after a failed call


def compute_meteor(references: dict[int, list[str]], predictions: dict[int, list[str]]) -> tuple[float, list[float]]:
    """Compute METEOR of all captions together and of each one; the first is not the mean of the others.

    Raises InputError if its Java program fails, for example for lack of memory.
    """
    try:
        return Meteor().compute_score(references, predictions)
    except (OSError, ValueError):
        raise InputError("METEOR's Java program failed: it needs 2 GB of memory") from None


def table_cells(rows: list[dict[str, Any]], spreads: Sequence[dict[str, float]] = ()) -> list[list[str]]:
    """Format rows of scores as the cells of a table, titles first, with a dash for a score that a row lacks.

    `spreads` holds what follows the ± in each row, by the name of the score.
    """
    columns = [name for name in TITLES if any(row.get(name) is not None for row in rows)]
    table = [[TITLES[name] for name in columns]]
    for row, spread in zip(rows, spreads or [{}] * len(rows), strict=True):
        cells = []
        for name in columns:
            form = FORMATS.get(name, "{:.4f}")
            cells.append("-" if row.get(name) is None else form.format(row[name]))
            cells[-1] += f" ± {form.format(spread[name])}" if name in spread else ""
        table.append(cells)
    return table


def format_table(rows: list[dict[str, Any]], spreads: Sequence[dict[str, float]] = ()) -> str:
    """Format rows of scores as a Markdown table; arguments as in `table_cells`."""
    titles, *cells = (f"| {' | '.join(row)} |" for row in table_cells(rows, spreads))
    return "\n".join([titles, "| ---: " * (titles.count(" | ") + 1) + "|", *cells])


def has_java() -> bool:
    """Return True if Java runs; some systems ship a stub that only prints how to install it."""
    java = shutil.which("java")
    return java is not None and subprocess.run([java, "-version"], capture_output=True).returncode == 0
