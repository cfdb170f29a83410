"""The metrics of captions, and their table."""

import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nltk.translate.bleu_score import corpus_bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor import meteor as reference_meteor
from pycocoevalcap.rouge.rouge import Rouge

from scores.per_image import image_texts
from utils import InputError

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
ROW_KEYS = ("beam_size", "samples", "consensus")  # say how the captions of a row were decoded
FORMATS = {  # all others have four digits
    "model": "{}",
    "runs": "{}",
    "beam_size": "{}",
    "samples": "{}",
    "consensus": "{:g}",
    "images_per_second": "{:.1f}",
    "vocabulary": "{}",
    "mean_length": "{:.2f}",
}


class Meteor(reference_meteor.Meteor):
    """pycocoevalcap's METEOR, with its Java program in English.

    In another locale it writes a decimal comma (German), or changes words, as the dotless i (Turkish).
    """

    def __init__(self) -> None:
        english = ["-Duser.language=en", "-Duser.country=US"]
        options = ["-", "-", "-stdio", "-l", "en", "-norm"]
        self.meteor_cmd = ["java", *english, "-Xmx2G", "-jar", reference_meteor.METEOR_JAR, *options]
        folder, pipe = Path(reference_meteor.__file__).parent, subprocess.PIPE
        self.meteor_p = subprocess.Popen(
            self.meteor_cmd, cwd=folder, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL
        )
        self.lock = threading.RLock()  # a failed call holds it, and the destructor takes it again


def compute_meteor(references: dict[int, list[str]], predictions: dict[int, list[str]]) -> tuple[float, list[float]]:
    """METEOR of predicted captions, and of each of them, whose mean it is not.

    Raises InputError where its Java program fails, as for want of memory.
    """
    try:
        return Meteor().compute_score(references, predictions)
    except (OSError, ValueError):
        raise InputError("METEOR's Java program failed: does it get the 2 GB of memory that it asks for?") from None


def compute_metrics(references: list[list[list[str]]], predictions: list[list[str]]) -> dict[str, float]:
    """Score predicted captions against the reference captions of each image.

    BLEU-1 to 4 are nltk's corpus BLEU (Papineni et al., 2002); ROUGE-L and CIDEr are those of pycocoevalcap.
    CIDEr is between 0 and 10, all others between 0 and 1; BLEU-n is 0 where no n-gram is in a reference.

    Args:
        references: for each image its captions, each a list of words.
        predictions: for each image one caption, a list of words.
    """
    ngram_weights = [(1,), (1 / 2,) * 2, (1 / 3,) * 3, (1 / 4,) * 4]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of n-grams without a match, whose precision is then the smallest float
        bleu: Any = corpus_bleu(references, predictions, ngram_weights)
    no_match = sys.float_info.min ** (1 / 4)  # BLEU-4 at most, with such a precision; BLEU-2 and 3 are below
    texts = image_texts(references, predictions)
    return {
        **{f"bleu_{n}": float(score) if score > no_match else 0.0 for n, score in enumerate(bleu, start=1)},
        "rouge_l": float(Rouge().compute_score(*texts)[0]),
        "cider": float(Cider().compute_score(*texts)[0]),
    }


def table_cells(rows: list[dict[str, Any]], spreads: Sequence[dict[str, float]] = ()) -> list[list[str]]:
    """Rows of scores as the cells of a table, their titles first, a dash where a row lacks what another has.

    `spreads` are what stands behind the ± of each row's values, for those that have one.
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
    """What `table_cells` returns, in Markdown."""
    titles, *cells = (f"| {' | '.join(row)} |" for row in table_cells(rows, spreads))
    return "\n".join([titles, "| ---: " * (titles.count(" | ") + 1) + "|", *cells])


def has_java() -> bool:
    """Whether METEOR's Java program can run; on some systems `java` only prints where to get one."""
    java = shutil.which("java")
    return java is not None and subprocess.run([java, "-version"], capture_output=True).returncode == 0
