"""The metrics of captions, and their table."""

import shutil
import subprocess
import warnings
from typing import Any

from nltk.translate.bleu_score import corpus_bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge

# The columns of the table, in their order.
TITLES = {
    "beam_size": "beam",
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "meteor": "METEOR",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
    "pointing": "pointing",
    "images_per_second": "images/s",
}
FORMATS = {"beam_size": "{}", "images_per_second": "{:.1f}"}  # all others have four digits


def compute_metrics(
    references: list[list[list[str]]], predictions: list[list[str]], meteor: bool = False
) -> dict[str, float | None]:
    """Score predicted captions against the reference captions of each image.

    BLEU-1 to 4 are nltk's corpus BLEU (Papineni et al., 2002); METEOR, ROUGE-L and CIDEr are those of pycocoevalcap.
    CIDEr is between 0 and 10, all others between 0 and 1.

    Args:
        references: for each image its captions, each a list of words.
        predictions: for each image one caption, a list of words.
        meteor: compute METEOR, which needs Java; it is None otherwise.
    """
    ngram_weights = [(1,), (1 / 2,) * 2, (1 / 3,) * 3, (1 / 4,) * 4]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without any common 4-gram BLEU-4 is about 0, which the table shows
        bleu: Any = corpus_bleu(references, predictions, ngram_weights)
    reference_texts = {i: [" ".join(words) for words in captions] for i, captions in enumerate(references)}
    predicted_texts = {i: [" ".join(words)] for i, words in enumerate(predictions)}
    return {
        **{f"bleu_{n}": float(score) for n, score in enumerate(bleu, start=1)},
        "meteor": float(Meteor().compute_score(reference_texts, predicted_texts)[0]) if meteor else None,
        "rouge_l": float(Rouge().compute_score(reference_texts, predicted_texts)[0]),
        "cider": float(Cider().compute_score(reference_texts, predicted_texts)[0]),
    }


def format_table(rows: list[dict[str, Any]]) -> str:
    """Rows of scores as a Markdown table, with the columns that the first row has."""
    columns = [name for name in TITLES if rows[0].get(name) is not None]
    lines = ["| " + " | ".join(TITLES[name] for name in columns) + " |", "| ---: " * len(columns) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(FORMATS.get(name, "{:.4f}").format(row[name]) for name in columns) + " |")
    return "\n".join(lines)


def has_java() -> bool:
    """Whether METEOR's Java program can run; on some systems `java` only prints where to get one."""
    java = shutil.which("java")
    return java is not None and subprocess.run([java, "-version"], capture_output=True).returncode == 0
