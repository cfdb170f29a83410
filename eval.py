"""Score checkpoints on a prepared folder: python eval.py --checkpoint runs/shapes/best.pt --data_folder data/shapes

Or score existing captions (--results FILE), or average the scores of several runs (--runs runs/a runs/b).
"""

import datetime
import platform
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch

from common.files import path_text, read_json, require_writable, write_json
from datasets import CaptionDataset
from decoding.constraints import Constraints
from evaluation.consensus import CaptionIndex, Consensus
from evaluation.ensemble import Ensemble, EnsembleSettings, combine, load_models, summarize_decoding
from evaluation.scoring import caption_split
from features.feature_cache import build_dataset, require_fitting_images
from models import Captioner
from preparation.storage import read_metadata
from scores import caption_scores
from scores.bootstrap import CONFIDENCE, RESAMPLES, SEED
from scores.caption_scores import CaptionScorer, ScoredCaptions
from scores.metrics import ROW_KEYS, has_java, table_cells
from scores.runs import summarize_runs
from training.state import git_revision
from utils import InputError, Runtime, choose_runtime, require_needs, run_script, setting
from visualization.report import require_report
from visualization.split_report import SplitCaptions, report_split

MODEL = "not results; not runs"  # `needs` of settings that only models have
NOT_DECODING = ("checkpoint", "precision", "device")  # inherited settings that do not tell how captions were decoded


@dataclass(frozen=True, kw_only=True)
class Settings(EnsembleSettings):
    """Score a checkpoint, an ensemble or captions: BLEU, METEOR, ROUGE-L, CIDEr. Edit a value or pass it as a flag."""

    # group: paths
    results: str = setting("", needs="not runs")  # captions to score, in COCO's results format; needs no checkpoint
    runs: tuple[str, ...] = ()  # run folders with scores of their best.pt: print their mean and standard deviation
    data_folder: str = "data/shapes"  # folder that create_input_files.py wrote
    split: str = setting("test", choices=("train", "val", "test"))  # images to caption
    output_folder: str = setting("", needs="not runs")  # folder of scores and captions; empty: the checkpoint's
    features_folder: str = setting("", needs=MODEL)  # cache of a frozen encoder's features; empty: in the data folder

    # group: scores
    photos: str = setting("", needs="results; not report")  # text file of photos to score, one name a line
    tokenizer: str = setting("plain", choices=("plain", "ptb"))  # ptb: COCO's, for original sentences; needs Java
    compare: str = setting("", needs="not runs")  # results file or checkpoint: test whether its scores differ
    spice: bool = setting(False, needs="not runs")  # also compute SPICE; needs Java and parts that are not installed
    report: bool = setting(False, needs="not runs")  # write a page of photos, captions, references and attention
    report_photos: int = setting(0, minimum=0, needs="report")  # first photos of the split in the report; 0: all

    # group: beam search
    beam_sizes: tuple[int, ...] = setting((1, 3, 5), minimum=1, needs=f"{MODEL}; not samples")  # a row for each

    NOT_FLAGS: ClassVar = ("beam_size",)  # the last of beam_sizes
    # Inherited settings need a model. --runs takes those that are part of the name of the files that it reads.
    INHERITED_NEEDS: ClassVar = {"": MODEL} | dict.fromkeys(("views", "samples", "consensus_index"), "not results")

    def __post_init__(self) -> None:
        object.__setattr__(self, "beam_size", max(1, self.beam_sizes[-1]))  # bypasses frozen=True
        super().__post_init__()


def output_path(settings: Settings, kind: str) -> Path:
    """Return the path of scores or results: scores_best_flickr8k_test.json beside the checkpoint best.pt.

    The scores of an ensemble lie beside its first checkpoint, scores_ensemble4_flickr8k_test.json. Views, sampling,
    consensus and another tokenizer have names of their own, scores_best_consensus_flickr8k_test.json. The scores of a
    results file lie beside it, named after it and the list of --photos.
    """
    source, data_folder = Path(settings.results or settings.checkpoint[0]), Path(settings.data_folder).resolve()
    parts = [kind, source.stem, *settings.views[1:]]
    if len(settings.checkpoint) > 1 and not settings.results:
        parts[1] = f"ensemble{len(settings.checkpoint)}"
    if settings.samples:
        parts.append("samples")
    if settings.consensus_index:
        parts.append("consensus")
    if settings.tokenizer == "ptb":
        parts.append("ptb")
    if settings.photos:
        parts.append(Path(settings.photos).stem)
    parts += [data_folder.name, f"{settings.split}.json"]
    return Path(settings.output_folder or source.parent) / "_".join(parts)


def describe(settings: Settings) -> dict[str, Any]:
    """Return the provenance of the scores: checkpoint, data, tokenizer and versions."""
    metadata = read_metadata(settings.data_folder)
    checkpoints = () if settings.results else settings.checkpoint
    return {
        "checkpoint": [path_text(path) for path in checkpoints],
        "results": path_text(settings.results) if settings.results else "",
        "dataset": metadata.get("dataset"),
        "data_folder": path_text(settings.data_folder),
        "split": settings.split,
        "photos": path_text(settings.photos) if settings.photos else "",
        "digest": metadata["digest"],
        "tokenizer": settings.tokenizer,
        "bootstrap": {"resamples": RESAMPLES, "confidence": CONFIDENCE, "seed": SEED},
        "git": git_revision(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def describe_decoding(settings: Settings, runtime: Runtime, index: CaptionIndex | None) -> dict[str, Any]:
    """Return how the captions of the last row were decoded."""
    names = [field.name for field in fields(EnsembleSettings) if field.name not in NOT_DECODING]
    return {
        "decoding": {name: getattr(settings, name) for name in names},
        "consensus_digest": index.data_digest if index else None,  # of the data that the index was made from
        "dtype": str(runtime.dtype).removeprefix("torch."),
    }


def require_same_source(path: Path, described: dict[str, Any]) -> None:
    """Raise InputError if a file has scores of another checkpoint, results file, list of photos or data set.

    A run folder that moved with its scores is the same, and so is a data folder that moved.
    """
    if not path.exists():
        return
    old = read_json(path)
    if not isinstance(old, dict) or not isinstance(old.get("checkpoint"), list):
        raise InputError(f"{path} was not written by eval.py: choose another --output_folder")
    before, now = (each["checkpoint"] or [str(each.get("results"))] for each in (old, described))
    same_kind = bool(old["checkpoint"]) == bool(described["checkpoint"])  # a results file may be called best.json
    moved = same_kind and len(now) == 1 and path.resolve().parent == Path(now[0]).parent
    if before != now and not moved:
        raise InputError(f"{path} has the scores of {' '.join(map(str, before))}: choose another --output_folder")
    if old.get("photos", "") != described["photos"]:
        photos = f"of the photos of {old['photos']}" if old.get("photos") else "of the whole split"
        raise InputError(f"{path} has the scores {photos}: choose another --output_folder")
    if all(old.get(name) != described[name] for name in ("data_folder", "digest")):
        raise InputError(f"{path} has the scores on {old.get('data_folder')}: choose another --output_folder")


def validate_settings(settings: Settings) -> None:
    """Raise InputError if settings do not go together."""
    require_needs(settings)
    folders = [str(Path(run).resolve()) for run in settings.runs]
    if settings.runs and len(set(folders)) < max(2, len(folders)):
        raise InputError(f"--runs {' '.join(settings.runs)}: give two run folders or more, each once")
    if settings.results and is_checkpoint(settings.compare):
        raise InputError(f"--compare {settings.compare}: --results loads no model: give that model's results file")
    if settings.consensus_index and settings.split == "train":
        raise InputError(
            "--consensus_index cannot be combined with --split train: the index holds these photos' own captions"
        )
    decoding_of_rows(settings)


def is_checkpoint(path: str) -> bool:
    """Return True if --compare names a checkpoint, False if a results file."""
    return path.endswith(".pt")


def decoding_of_rows(settings: Settings) -> list[Settings]:
    """Return the settings of each row of scores: one for each beam size, or a single one for samples."""
    if settings.samples:
        return [settings]
    return [settings.replace(beam_sizes=(beam_size,)) for beam_size in settings.beam_sizes]


# ------------------------------------------------------------------------------------------------- load, decode


def load_captioners(settings: Settings, runtime: Runtime) -> dict[str, Captioner | Ensemble]:
    """Load the captioner of each checkpoint and, if there are several, their ensemble; by the names of their rows.

    Raises InputError if one cannot caption the data folder.
    """
    loaded = load_models(settings.checkpoint, runtime.device)
    captioners = {name: combine({name: captioner}, settings.views) for name, captioner in loaded.items()}
    if len(loaded) > 1:
        captioners["ensemble"] = combine(loaded, settings.views)
    metadata = read_metadata(settings.data_folder)
    for captioner in captioners.values():
        Constraints.of(settings, captioner.vocabulary)
        require_fitting_images(captioner, metadata, settings.data_folder)
    return captioners


def load_split(settings: Settings, captioner: Captioner | Ensemble, runtime: Runtime) -> list[CaptionDataset]:
    """Open the split once per encoder, with the inputs that this encoder expects."""
    is_cached = settings.views == ("original",)
    folders = settings.data_folder, settings.split
    datasets = [
        build_dataset(*folders, source, runtime, features_folder=settings.features_folder, cached=is_cached)
        for source in captioner.sources
    ]
    if captioner.uses_objects:  # perhaps not the first source of an ensemble
        datasets[0].use_objects()
    return datasets


def decode(
    settings: Settings,
    name: str,
    captioner: Captioner | Ensemble,
    runtime: Runtime,
    scorer: CaptionScorer,
    index: CaptionIndex | None,
) -> tuple[list[dict[str, Any]], SplitCaptions]:
    """Caption the split with one captioner; return its rows of scores, and the scored captions of the last row."""
    consensus = None
    if index and index.encoder in captioner.fingerprints:  # some of several models may have other encoders
        consensus = Consensus(index, captioner, settings, runtime.device)
    datasets = load_split(settings, captioner, runtime)
    rows, decodings = [], decoding_of_rows(settings)
    for decoding in decodings:
        torch.manual_seed(decoding.seed)
        num_shown = 0
        if settings.report and decoding is decodings[-1]:
            num_shown = settings.report_photos or len(datasets[0])
        rerank = consensus.rerank if consensus else None
        images, row = caption_split(captioner, datasets, decoding, runtime, rerank, num_shown=num_shown)
        if consensus:
            before = score_words(scorer, [image.before_consensus for image in images])
            rows.append({name: row[name] for name in ROW_KEYS if name in row} | {"consensus": 0.0} | before.row)
            row["consensus"] = consensus.weight
        scored = score_words(scorer, [image.words for image in images])
        rows.append(row | scored.row)
    return rows, SplitCaptions(name, scored, captioner, images)


def score_words(scorer: CaptionScorer, captions: list[list[str]]) -> ScoredCaptions:
    """Score captions that a model wrote, given as lists of words."""
    return scorer.score([" ".join(words) for words in captions], captions)


def evaluate_checkpoints(
    settings: Settings, scorer: CaptionScorer
) -> tuple[list[dict[str, Any]], list[SplitCaptions], dict[str, Any]]:
    """Load all models, then caption the split with each.

    Returns the rows of all checkpoints and their ensemble, the captions of the last row, and how these were decoded. If
    --compare names a checkpoint, its captions follow.
    """
    runtime = choose_runtime(settings.device, settings.precision)
    captioners = load_captioners(settings, runtime)
    other = settings.replace(checkpoint=(settings.compare,), beam_sizes=settings.beam_sizes[-1:])
    compared = load_captioners(other, runtime) if is_checkpoint(settings.compare) else {}
    index = None
    if settings.consensus_index:
        index = CaptionIndex.load(settings.consensus_index)
        index.find_encoder(list(captioners.values())[-1])
        index.require_data(read_metadata(settings.data_folder)["digest"], settings.data_folder)

    rows, captions = [], []
    for name, captioner in captioners.items():
        new_rows, last = decode(settings, name, captioner, runtime, scorer, index)
        captions = [last]
        rows += [{"model": name} | row for row in new_rows] if len(captioners) > 1 else new_rows
    for name, captioner in compared.items():
        captions.append(decode(other, name, captioner, runtime, scorer.quick(), index)[1])
    return rows, captions, describe_decoding(settings, runtime, index)


# ------------------------------------------------------------------------------------------------- compare, write


def main(settings: Settings) -> None:
    """Score the captions of checkpoints or of a results file, compare them if asked, and write scores and captions."""
    validate_settings(settings)
    if settings.runs:
        of_runs = (settings.replace(checkpoint=(f"{run}/best.pt",)) for run in settings.runs)
        digest = read_metadata(settings.data_folder)["digest"]
        print(summarize_runs([output_path(each, "scores") for each in of_runs], digest))
        return
    paths = {kind: output_path(settings, kind) for kind in ("scores", "results", "scores_per_image")}
    report_path = output_path(settings, "report").with_suffix(".html")
    require_writable(paths["scores"].parent)
    described = describe(settings)
    require_same_source(paths["scores"], described)
    if settings.report:
        require_report(report_path)
    java = has_java()
    scorer = CaptionScorer(
        settings.data_folder,
        settings.split,
        settings.tokenizer,
        photos=settings.photos,
        java=java,
        spice=settings.spice,
    )
    others = scorer.read(settings.compare) if settings.compare and not is_checkpoint(settings.compare) else None
    if settings.results:
        captions = [SplitCaptions(settings.results, scorer.score(scorer.read(settings.results)))]
        rows = [captions[0].scored.row]
    else:
        rows, captions, decoded = evaluate_checkpoints(settings, scorer)
        described |= decoded
    if others:
        captions.append(SplitCaptions(settings.compare, scorer.quick().score(others)))
    comparison = None
    if settings.compare:
        comparison = caption_scores.compare_captions(captions[0].scored, captions[1].scored, settings.compare)

    write_json(paths["scores"], described | {"comparison": comparison, "scores": rows}, indent=1)
    if not settings.results:
        write_json(paths["results"], captions[0].scored.results)
    write_json(paths["scores_per_image"], captions[0].scored.per_image)
    if not java:
        print("METEOR is left out: it needs a Java runtime, such as openjdk", file=sys.stderr)
    print(caption_scores.format_scores(rows))
    if comparison:
        print(f"\n{caption_scores.format_tests(comparison['tests'], settings.compare)}")
    print(f"{paths['scores']} holds the tables, {paths['scores_per_image']} the last row's captions and their scores")
    if settings.report:
        table = table_cells(rows, caption_scores.half_intervals(rows))
        decoding = summarize_decoding(described["decoding"]) if "decoding" in described else ""
        report_split(described, decoding, table, captions, settings.report_photos).write(report_path)
        print(f"{report_path} shows them: open it in a browser")


if __name__ == "__main__":
    run_script(main, Settings)
