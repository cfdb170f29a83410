"""Score a checkpoint on a prepared folder: python eval.py --checkpoint runs/shapes/best.pt --data_folder data/shapes"""

import datetime
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from common.files import read_json, require_writable, write_json
from evaluation.generation import DecodingSettings
from evaluation.metrics import format_table, has_java
from evaluation.scoring import evaluate
from models import load_captioner
from preparation.storage import read_metadata
from training.feature_cache import build_dataset
from training.state import git_revision
from utils import InputError, choose_runtime, require_at_least, run_script


@dataclass(frozen=True)
class Settings:
    """Score a checkpoint: BLEU-1 to 4, METEOR, ROUGE-L and CIDEr by beam size. Edit a value or pass it as a flag."""

    # group: paths
    checkpoint: str = "runs/shapes/best.pt"  # what train.py wrote
    data_folder: str = "data/shapes"  # what create_input_files.py wrote
    split: Literal["train", "val", "test"] = "test"  # which images to caption
    output_folder: str = ""  # folder of the scores and captions; empty: the checkpoint's folder
    features_folder: str = ""  # where the features of a frozen encoder are cached; empty: in the data folder

    # group: decoding
    beam_sizes: tuple[int, ...] = (1, 3, 5)  # beams per image; 1 is greedy decoding
    length_penalty: float = 0.5  # rank by log-probability / length ** this; 0 favors short captions
    max_length: int = 30  # maximum words of a caption
    batch_size: int = 32  # images decoded at once

    # group: run
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 mixed precision where it is faster
    device: str = "auto"  # auto, cpu or cuda


def output_path(settings: Settings, kind: str) -> Path:
    """Where the scores or results go: a name of checkpoint, data folder and split, scores_best_flickr8k_test.json."""
    checkpoint, data_folder = Path(settings.checkpoint), Path(settings.data_folder).resolve()
    folder = Path(settings.output_folder or checkpoint.parent)
    return folder / f"{kind}_{checkpoint.stem}_{data_folder.name}_{settings.split}.json"


def describe(settings: Settings, dtype: torch.dtype) -> dict[str, Any]:
    """What the scores are of and how they were made."""
    metadata = read_metadata(settings.data_folder)
    return {
        "checkpoint": str(Path(settings.checkpoint).resolve()),
        "dataset": metadata.get("dataset"),
        "data_folder": str(Path(settings.data_folder).resolve()),
        "split": settings.split,
        "digest": metadata["digest"],
        "decoding": {name: getattr(settings, name) for name in ("length_penalty", "max_length", "batch_size")},
        "dtype": str(dtype).removeprefix("torch."),
        "git": git_revision(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def require_same_source(path: Path, described: dict[str, Any]) -> None:
    """Raise InputError where the scores in a file are those of another checkpoint or data set of the same name.

    A run folder that moved with its scores and a data folder that moved are still the same.
    """
    if not path.exists():
        return
    old = read_json(path)
    checkpoint = Path(described["checkpoint"])
    if not isinstance(old, dict):
        raise InputError(f"{path} was not written by eval.py: choose another --output_folder")
    if old.get("checkpoint") != str(checkpoint) and path.resolve().parent != checkpoint.parent:
        raise InputError(f"{path} has the scores of {old.get('checkpoint')}: choose another --output_folder")
    if all(old.get(name) != described[name] for name in ("data_folder", "digest")):
        raise InputError(f"{path} has the scores on {old.get('data_folder')}: choose another --output_folder")


def main(settings: Settings) -> None:
    """Evaluate a checkpoint at each beam size; write the scores and, of the last beam size, the captions."""
    require_at_least(settings, 1, "beam_sizes", "max_length", "batch_size")
    require_at_least(settings, 0, "length_penalty")
    runtime = choose_runtime(settings.device, settings.precision)
    scores_path, results_path = output_path(settings, "scores"), output_path(settings, "results")
    require_writable(scores_path.parent)
    captioner, vocabulary = load_captioner(settings.checkpoint, runtime.device)
    described = describe(settings, runtime.dtype)
    require_same_source(scores_path, described)
    dataset = build_dataset(
        settings.data_folder,
        settings.split,
        vocabulary,
        captioner,
        runtime,
        features_folder=settings.features_folder,
    )
    meteor = has_java()
    if not meteor:
        print("METEOR is left out, it needs Java: install a Java runtime (such as openjdk)", file=sys.stderr)
    rows, captions = [], []
    for beam_size in settings.beam_sizes:
        decoding = DecodingSettings(beam_size, settings.max_length, settings.length_penalty, settings.batch_size)
        row, captions = evaluate(captioner, vocabulary, dataset, decoding, runtime, meteor)
        rows.append(row)
    write_json(scores_path, described | {"scores": rows}, indent=1)
    results = [
        {"image_id": entry["image_id"], "image": entry["image"], "caption": " ".join(words)}
        for entry, words in zip(dataset.entries, captions, strict=True)
    ]
    write_json(results_path, results)
    print(format_table(rows))
    print(f"{scores_path} holds the table, {results_path} the captions of beam {settings.beam_sizes[-1]}")


if __name__ == "__main__":
    run_script(main, Settings)
