"""The mean and the standard deviation of scores over runs, from the files that eval.py wrote."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.files import read_json
from scores.metrics import ROW_KEYS, TITLES, format_table
from utils import InputError


def summarize_runs(paths: Sequence[Path], digest: str) -> str:
    """Format a table of means ± sample standard deviations over files of scores, row by row.

    `digest` identifies the data that the scores must come from. Raises InputError if a file is missing, comes from
    other data, or has other rows or decoding settings than the first.
    """
    files = [_read_scores(path) for path in paths]
    for path, scores in zip(paths, files, strict=True):
        if scores.get("digest") != digest:
            raise InputError(f"{path} has the scores of other data than this folder's: score that run again")
        if _decoding(scores) != _decoding(files[0]):
            raise InputError(f"{path} has other rows or decoding settings than {paths[0]}: score both with the same")
    means, deviations = [], []
    for rows in zip(*(scores["scores"] for scores in files), strict=True):
        values = {name: [row.get(name) for row in rows] for name in TITLES if name not in ROW_KEYS}
        measured = {name: each for name, each in values.items() if all(isinstance(value, float) for value in each)}
        identity = {name: rows[0][name] for name in ROW_KEYS if name in rows[0]}
        means.append(identity | {"runs": len(rows)} | {name: statistics.mean(each) for name, each in measured.items()})
        deviations.append({name: statistics.stdev(each) for name, each in measured.items()})
    return format_table(means, deviations)


def _read_scores(path: Path) -> dict[str, Any]:
    """Read a file of scores that eval.py wrote."""
    if not path.is_file():
        raise InputError(f"no such file: {path}: score this run first, or give its --data_folder and --split")
    scores = read_json(path)
    rows = scores.get("scores") if isinstance(scores, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in [*rows, scores.get("decoding")]):
        raise InputError(f"{path} was not written by eval.py: score this run again")
    return scores


def _decoding(scores: dict[str, Any]) -> tuple[Any, ...]:
    """Return how the rows of a file were decoded."""
    rows = [[row.get(name) for name in ROW_KEYS] for row in scores["scores"]]
    return scores["decoding"], scores.get("dtype"), scores.get("consensus_digest"), rows
