"""Score checkpoints on a prepared folder: python eval.py --checkpoint runs/shapes/best.pt --data_folder data/shapes"""

import datetime
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from common.files import read_json, require_writable, write_json
from evaluation.consensus import CaptionIndex, Consensus, make_consensus
from evaluation.ensemble import Ensemble, combine, load_models
from evaluation.metrics import format_table, has_java
from evaluation.scoring import evaluate
from models import Captioner
from modules.decoding import DecodingSettings
from preparation.storage import read_metadata
from training.feature_cache import build_dataset
from training.state import git_revision
from utils import InputError, Runtime, choose_runtime, require_at_least, run_script

# Of the settings, beside DecodingSettings.
OTHER_DECODING = ("views", "consensus_index", "consensus_weight", "similar_photos")


@dataclass(frozen=True)
class Settings:
    """Score a checkpoint, or an ensemble: BLEU-1 to 4, METEOR, ROUGE-L and CIDEr. Edit a value or pass it as a flag."""

    # group: paths
    checkpoint: tuple[str, ...] = ("runs/shapes/best.pt",)  # what train.py wrote; several are one ensemble
    data_folder: str = "data/shapes"  # what create_input_files.py wrote
    split: Literal["train", "val", "test"] = "test"  # which images to caption
    output_folder: str = ""  # folder of the scores and captions; empty: the checkpoint's folder
    features_folder: str = ""  # where the features of a frozen encoder are cached; empty: in the data folder

    # group: beam search
    beam_sizes: tuple[int, ...] = (1, 3, 5)  # beams per image; 1 is greedy decoding
    length_penalty: float = 0.5  # rank by log-probability / length ** this; 0 favors short captions
    max_length: int = 30  # maximum words of a caption
    min_length: int = 0  # minimum words of a caption
    no_repeat_ngram: int = 0  # no sequence of this many words occurs twice in a caption; 0: any may
    banned_endings: tuple[str, ...] = ()  # words that no caption may end with, such as: a with of
    num_beam_groups: int = 1  # diverse beam search: groups that share the beams, each unlike those before it
    diversity_penalty: float = 0.5  # what a word costs for each beam of earlier groups that chose it
    batch_size: int = 32  # images decoded at once

    # group: sampling
    samples: int = 0  # captions sampled per image in place of beams, of which the best is scored; 0: beam search
    temperature: float = 1.0  # below 1 samples favor probable words
    top_k: int = 0  # samples take only the k most probable words; 0: all
    top_p: float = 1.0  # samples take only the most probable words that together reach this probability
    seed: int = 0  # of the random numbers of samples, which depend on --batch_size as well

    # group: ensemble and consensus
    views: tuple[str, ...] = ("original",)  # views of a photo that caption together: original hflip crop
    consensus_index: str = ""  # index of tools/index_captions.py: prefer captions like those of similar photos
    consensus_weight: float = 10.0  # weight of the mean CIDEr-D (0 to 10) against the captions of similar photos
    similar_photos: int = 50  # similar photos whose captions count for the consensus

    # group: run
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 mixed precision where it is faster
    device: str = "auto"  # auto, cpu or cuda


def output_path(settings: Settings, kind: str) -> Path:
    """Where the scores or results go: a name of checkpoint, data folder and split, scores_best_flickr8k_test.json.

    Those of an ensemble lie beside its first checkpoint, scores_ensemble4_flickr8k_test.json. Views, sampling and
    consensus have names of their own, scores_best_consensus_flickr8k_test.json.
    """
    checkpoint, data_folder = Path(settings.checkpoint[0]), Path(settings.data_folder).resolve()
    folder = Path(settings.output_folder or checkpoint.parent)
    name = checkpoint.stem if len(settings.checkpoint) == 1 else f"ensemble{len(settings.checkpoint)}"
    ways = list(settings.views[1:])
    ways += ["samples"] * bool(settings.samples) + ["consensus"] * bool(settings.consensus_index)
    return folder / "_".join([kind, name, *ways, data_folder.name, f"{settings.split}.json"])


def describe(settings: Settings, dtype: torch.dtype, index: CaptionIndex | None) -> dict[str, Any]:
    """What the scores are of and how they were made."""
    metadata = read_metadata(settings.data_folder)
    return {
        "checkpoint": [str(Path(path).resolve()) for path in settings.checkpoint],
        "dataset": metadata.get("dataset"),
        "data_folder": str(Path(settings.data_folder).resolve()),
        "split": settings.split,
        "digest": metadata["digest"],
        "decoding": asdict(decoding_of_rows(settings)[-1]) | {name: getattr(settings, name) for name in OTHER_DECODING},
        "consensus_digest": index.data_digest if index else None,  # of the data that the index is of
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
    checkpoints = described["checkpoint"]
    if not isinstance(old, dict) or not isinstance(old.get("checkpoint"), list):
        raise InputError(f"{path} was not written by eval.py: choose another --output_folder")
    moved = len(checkpoints) == 1 and path.resolve().parent == Path(checkpoints[0]).parent
    if old["checkpoint"] != checkpoints and not moved:
        raise InputError(
            f"{path} has the scores of {' '.join(map(str, old['checkpoint']))}: choose another --output_folder"
        )
    if all(old.get(name) != described[name] for name in ("data_folder", "digest")):
        raise InputError(f"{path} has the scores on {old.get('data_folder')}: choose another --output_folder")


def validate_settings(settings: Settings) -> None:
    """Raise InputError where settings are out of range or do not go together."""
    require_at_least(settings, 1, "beam_sizes", "similar_photos")
    require_at_least(settings, 0, "consensus_weight")
    if settings.consensus_index and settings.split == "train":
        raise InputError("--consensus_index does not go with --split train: the index holds these photos' own captions")
    decoding_of_rows(settings)


def decoding_of_rows(settings: Settings) -> list[DecodingSettings]:
    """How the rows of a model are decoded: by beam size, or one by sampling. Raises InputError for wrong values."""
    if settings.samples:
        return [DecodingSettings.from_settings(settings)]
    return [DecodingSettings.from_settings(settings, beam_size=beam_size) for beam_size in settings.beam_sizes]


def evaluate_model(
    settings: Settings,
    captioner: Captioner | Ensemble,
    runtime: Runtime,
    *,
    meteor: bool,
    consensus: Consensus | None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of a model, and the captions of the last in COCO's results format."""
    datasets = [
        build_dataset(
            settings.data_folder,
            settings.split,
            source,
            runtime,
            features_folder=settings.features_folder,
            cached=settings.views == ("original",),
        )
        for source in captioner.sources
    ]
    if captioner.uses_objects:  # maybe not the first of an ensemble's sources
        datasets[0].use_objects()
    rows, captions = [], []
    for decoding in decoding_of_rows(settings):
        torch.manual_seed(decoding.seed)
        new_rows, captions = evaluate(captioner, datasets, decoding, runtime, meteor=meteor, consensus=consensus)
        rows += new_rows
    results = [
        {"image_id": entry["image_id"], "image": entry["image"], "caption": " ".join(words)}
        for entry, words in zip(datasets[0].entries, captions, strict=True)
    ]
    return rows, results


def main(settings: Settings) -> None:
    """Evaluate checkpoints, and the ensemble of several, in all ways that are asked for; write scores and captions."""
    validate_settings(settings)
    runtime = choose_runtime(settings.device, settings.precision)
    scores_path, results_path = output_path(settings, "scores"), output_path(settings, "results")
    require_writable(scores_path.parent)
    index = CaptionIndex.load(settings.consensus_index) if settings.consensus_index else None
    loaded = load_models(settings.checkpoint, settings.views, runtime.device)
    whole = combine(loaded, settings.views)
    decoding_of_rows(settings)[0].constraints(whole.vocabulary)  # an unknown word is an error before all work
    models = {name: combine({name: model}, settings.views) for name, model in loaded.items()}
    if len(models) > 1:
        models["ensemble"] = whole
    described = describe(settings, runtime.dtype, index)
    require_same_source(scores_path, described)
    if index:
        index.find_encoder(whole)  # another encoder is an error before all work, as are other data
        index.require_data(described["digest"], settings.data_folder)
    meteor = has_java()
    if not meteor:
        print("METEOR is left out, it needs Java: install a Java runtime (such as openjdk)", file=sys.stderr)
    rows, results = [], []
    for name, captioner in models.items():
        # Of several models some may have other encoders than the index.
        fits = index and index.encoder in captioner.fingerprints
        consensus = make_consensus(index, captioner, settings, runtime) if index and fits else None
        new_rows, results = evaluate_model(settings, captioner, runtime, meteor=meteor, consensus=consensus)
        rows += [{"model": name} | row for row in new_rows] if len(models) > 1 else new_rows
    write_json(scores_path, described | {"scores": rows}, indent=1)
    write_json(results_path, results)
    print(format_table(rows))
    print(f"{scores_path} holds the table, {results_path} the captions of its last row")


if __name__ == "__main__":
    run_script(main, Settings)
