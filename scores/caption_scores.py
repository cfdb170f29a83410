"""Score sets of captions of one split: all metrics, their intervals, each image's scores, and paired tests."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.files import path_text
from preparation.storage import read_captions, read_metadata
from scores.bootstrap import confidence_intervals, image_statistics, paired_test, scores_of_sums
from scores.diversity import diversity, training_captions
from scores.metrics import ROW_KEYS, TITLES, compute_meteor, format_table, image_scores, image_texts
from scores.results_files import read_results
from scores.spice import compute_spice, require_spice
from scores.tokenization import ptb_references, ptb_tokenize
from text.tokenizer import tokenize
from utils import InputError


@dataclass(frozen=True)
class ScoredCaptions:
    """The scores of one caption for each of N images."""

    row: dict[str, Any]  # of the table, with "intervals" and "diversity"
    results: list[dict[str, Any]]  # the captions in COCO's results format, with the photos' file names
    per_image: list[dict[str, Any]]  # the same with their scores
    statistics: np.ndarray  # (N, 12), from `image_statistics`
    words: list[list[str]]  # of the captions, from the repository's tokenizer or as a model generated them


class CaptionScorer:
    """Scores captions of one split of a prepared folder.

    Args:
        tokenizer: "plain" or "ptb", which needs Java.
        photos: a text file that names the photos to score, one a line; "": all.
        java: compute METEOR, which needs Java.
        spice: compute SPICE, which needs Java and jars that are installed separately.

    Raises InputError if the split cannot be read, or if a requested score lacks its programs.
    """

    def __init__(
        self, data_folder: str | Path, split: str, tokenizer: str, *, photos: str = "", java: bool, spice: bool
    ) -> None:
        if tokenizer == "ptb" and not java:
            raise InputError("--tokenizer ptb needs Java: install a Java runtime (such as openjdk)")
        if spice:
            require_spice(java)
        metadata = read_metadata(data_folder)
        self.where = f"the {split} split of {data_folder}"
        self.is_ptb, self.meteor, self.spice = tokenizer == "ptb", java, spice
        self.all_entries, captions, _ = read_captions(data_folder, split, metadata)
        references = ptb_references(data_folder, split) if self.is_ptb else captions.decode()
        self.indices = self._named(photos) if photos else range(len(references))
        self.entries = [self.all_entries[i] for i in self.indices]
        self.references = [references[i] for i in self.indices]
        self.training = training_captions(data_folder, metadata)

    def read(self, path: str) -> list[str]:
        """Read the captions of a results file, in the split's order.

        Raises InputError unless the file has one caption for each image of the split, even if only some are scored.
        """
        captions = read_results(path, self.all_entries, self.where)
        return [captions[i] for i in self.indices]

    def _named(self, path: str) -> list[int]:
        """Return the indices of the images that a text file names. Raises InputError for an unknown image or none."""
        if not Path(path).is_file():
            raise InputError(f"--photos {path}: no such file")
        lines = Path(path).read_text(encoding="utf-8-sig", errors="replace").splitlines()
        names = {line.strip() for line in lines} - {""}
        if not names:
            raise InputError(f"--photos {path} names no photo: it is a text file with the name of a photo on each line")
        if unknown := sorted(names - {entry["image"] for entry in self.all_entries}):
            raise InputError(f"--photos {path}: {unknown[0]} is not in {self.where}: give its --split")
        return [i for i, entry in enumerate(self.all_entries) if entry["image"] in names]

    def quick(self) -> "CaptionScorer":
        """Return a scorer without METEOR and SPICE, which are slow, for captions that others are compared with."""
        other = copy.copy(self)
        other.meteor = other.spice = False
        return other

    def score(self, sentences: list[str], words: list[list[str]] | None = None) -> ScoredCaptions:
        """Score one caption for each image, in the split's order.

        `words` are the words that a model generated; without them the repository's tokenizer splits the sentences.
        """
        if words is None:
            words = [tokenize(sentence) for sentence in sentences]
        predictions = ptb_tokenize(sentences) if self.is_ptb else words
        scores = image_scores(self.references, predictions)
        statistics = image_statistics(self.references, predictions, scores)
        split_scores = scores_of_sums(statistics.sum(axis=0), len(words))
        row: dict[str, Any] = {name: float(score) for name, score in split_scores.items()}
        row["meteor"] = None
        texts = image_texts(self.references, predictions)
        if self.meteor:
            row["meteor"], image_meteor = compute_meteor(*texts)
            scores["meteor"] = np.array(image_meteor)
        if self.spice:
            scores["spice"] = compute_spice(*texts)
            row["spice"] = float(scores["spice"].mean())
        row["intervals"] = confidence_intervals(statistics)
        row["diversity"] = diversity(words, self.training)
        results, per_image = [], []
        for i, entry in enumerate(self.entries):
            results.append({"image_id": entry["image_id"], "image": entry["image"], "caption": sentences[i]})
            per_image.append(results[i] | {name: float(values[i]) for name, values in scores.items()})
        return ScoredCaptions(row, results, per_image, statistics, words)


def compare_captions(scored: ScoredCaptions, other: ScoredCaptions, path: str) -> dict[str, Any]:
    """Run the paired test of scored captions against those of a file; return the `comparison` of the scores file."""
    return {"file": path_text(path), "tests": paired_test(scored.statistics, other.statistics)}


def half_intervals(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Return half the width of each row's intervals, by the name of the score."""
    intervals = [row.get("intervals", {}) for row in rows]
    return [{name: (high - low) / 2 for name, (low, high) in each.items()} for each in intervals]


def format_scores(rows: list[dict[str, Any]]) -> str:
    """Format the table of scores, ± half the width of their intervals, and the table of the captions' diversity."""
    diverse = []
    for row in rows:
        if "diversity" in row:
            identity = {name: row[name] for name in ("model", *ROW_KEYS) if name in row}
            diverse.append(identity | row["diversity"])
    return f"{format_table(rows, half_intervals(rows))}\n\n{format_table(diverse)}"


def format_tests(tests: dict[str, dict[str, float]], path: str) -> str:
    """Format the paired test against the captions of a file, a line for each score."""
    lines = [f"these captions minus {path} ± standard error:"]
    for name, test in tests.items():
        difference = f"{test['difference']:.4f} ± {test['standard_error']:.4f}"
        lines.append(f"{TITLES[name]}: {difference}, p = {test['p']:.3f}")
    return "\n".join(lines)
