"""Score checkpoints on a prepared folder: python eval.py --checkpoint runs/shapes/best.pt --data_folder data/shapes

Or score captions that are there already (--results FILE), or average the scores of several runs (--runs runs/a runs/b).
"""

import datetime
import platform
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch

from common.files import path_text, read_json, require_writable, write_json
from decoding.constraints import Constraints
from decoding.settings import DecodingSettings
from evaluation.consensus import CaptionIndex, Consensus, make_consensus
from evaluation.ensemble import Ensemble, EnsembleSettings, combine, load_models
from evaluation.scoring import caption_split
from features.feature_cache import build_dataset, require_fitting_images
from models import Captioner
from preparation.storage import read_metadata
from scores.bootstrap import CONFIDENCE, RESAMPLES, SEED
from scores.caption_scores import (
    CaptionScorer,
    ScoredCaptions,
    compare_captions,
    format_scores,
    format_tests,
    half_intervals,
)
from scores.metrics import ROW_KEYS, has_java, table_cells
from scores.runs import summarize_runs
from training.state import git_revision
from utils import InputError, Runtime, choose_runtime, require_needs, run_script, setting
from visualization.report import require_report
from visualization.split_report import SplitCaptions, report_split

# Conditions of settings, as in `utils.setting`.
MODEL = "not results; not runs"


@dataclass(frozen=True, kw_only=True)
class Settings(EnsembleSettings):
    """Score a checkpoint, an ensemble or captions: BLEU, METEOR, ROUGE-L, CIDEr. Edit a value or pass it as a flag."""

    # group: paths
    results: str = setting("", needs="not runs")  # captions to score in COCO's results format, not a checkpoint's
    runs: tuple[str, ...] = ()  # run folders whose best.pt is scored already: mean and deviation of these scores
    data_folder: str = "data/shapes"  # folder that create_input_files.py wrote
    split: str = setting("test", choices=("train", "val", "test"))  # images to caption
    output_folder: str = setting("", needs="not runs")  # folder of scores and captions; empty: the checkpoint's
    features_folder: str = setting("", needs=MODEL)  # cache of a frozen encoder's features; empty: in the data folder

    # group: scores
    photos: str = setting("", needs="results; not report")  # text file of photos to score, one name a line
    tokenizer: str = setting("plain", choices=("plain", "ptb"))  # ptb: COCO's tokenizer of original sentences, Java
    compare: str = setting("", needs="not runs")  # results file or checkpoint: test whether its scores differ
    spice: bool = setting(False, needs="not runs")  # SPICE, too; needs Java and parts that are not installed
    report: bool = setting(False, needs="not runs")  # write a page of photos, captions, references and attention
    report_photos: int = setting(0, minimum=0, needs="report")  # first photos of the split in the report; 0: all

    # group: beam search
    beam_sizes: tuple[int, ...] = setting((1, 3, 5), minimum=1, needs=f"{MODEL}; not samples")  # a row for each

    NOT_FLAGS: ClassVar = ("beam_size",)  # of each row, from beam_sizes
    # --runs needs what names the file of scores.
    INHERITED_NEEDS: ClassVar = {"": MODEL} | dict.fromkeys(("views", "samples", "consensus_index"), "not results")


def output_path(settings: Settings, kind: str) -> Path:
    """Where the scores or results go: a name of checkpoint, data folder and split, scores_best_flickr8k_test.json.

    Those of an ensemble lie beside its first checkpoint, scores_ensemble4_flickr8k_test.json. Views, sampling,
    consensus and another tokenizer have names of their own, scores_best_consensus_flickr8k_test.json. The scores of a
    results file lie beside it and have its name in place of the checkpoint's, and that of the list of --photos.
    """
    source, data_folder = Path(settings.results or settings.checkpoint[0]), Path(settings.data_folder).resolve()
    folder = Path(settings.output_folder or source.parent)
    is_ensemble = len(settings.checkpoint) > 1 and not settings.results
    name = f"ensemble{len(settings.checkpoint)}" if is_ensemble else source.stem
    parts = list(settings.views[1:])
    parts += ["samples"] * bool(settings.samples) + ["consensus"] * bool(settings.consensus_index)
    parts += ["ptb"] * (settings.tokenizer == "ptb") + [Path(settings.photos).stem] * bool(settings.photos)
    return folder / "_".join([kind, name, *parts, data_folder.name, f"{settings.split}.json"])


def describe(settings: Settings) -> dict[str, Any]:
    """What the scores are of and how they were made, but for the decoding."""
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


def require_same_source(path: Path, described: dict[str, Any]) -> None:
    """Raise InputError where the scores in a file are of another checkpoint, results file, list of photos or data set.

    A run folder that moved with its scores and a data folder that moved are still the same.
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
    """Raise InputError where settings are out of range or do not go together."""
    require_needs(settings)
    folders = [str(Path(run).resolve()) for run in settings.runs]
    if settings.runs and len(set(folders)) < max(2, len(folders)):
        raise InputError(f"--runs {' '.join(settings.runs)}: give two run folders or more, each once")
    if settings.results and is_checkpoint(settings.compare):
        raise InputError(f"--compare {settings.compare}: --results decodes nothing, give that model's results file")
    if settings.consensus_index and settings.split == "train":
        raise InputError("--consensus_index does not go with --split train: the index holds these photos' own captions")
    decoding_of_rows(settings)


def decoding_of_rows(settings: Settings) -> list[DecodingSettings]:
    """How the rows of a model are decoded: by beam size, or one by sampling. Raises InputError for wrong values."""
    if settings.samples:
        return [settings]
    return [settings.replace(beam_size=beam_size) for beam_size in settings.beam_sizes]


def evaluate_model(
    settings: Settings,
    name: str,
    captioner: Captioner | Ensemble,
    runtime: Runtime,
    scorer: CaptionScorer,
    consensus: Consensus | None = None,
) -> tuple[list[dict[str, Any]], SplitCaptions]:
    """The rows of a model, and the captions of the last."""
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
    rows, found = [], []
    decodings = decoding_of_rows(settings)
    shown = (settings.report_photos or len(datasets[0])) if settings.report else 0
    for decoding in decodings:
        torch.manual_seed(decoding.seed)
        num_shown = shown if decoding is decodings[-1] else 0  # of the last row
        images, row = caption_split(captioner, datasets, decoding, runtime, consensus, num_shown=num_shown)
        if consensus:
            before = score_words(scorer, [image.before_consensus for image in images])
            rows.append({name: row[name] for name in ROW_KEYS if name in row} | {"consensus": 0.0} | before.row)
            row["consensus"] = consensus.weight
        found = [SplitCaptions(name, score_words(scorer, [image.words for image in images]), captioner, images)]
        rows.append(row | found[0].scored.row)
    return rows, found[0]


def score_words(scorer: CaptionScorer, captions: list[list[str]]) -> ScoredCaptions:
    """The scores of captions, lists of words, that a model wrote."""
    return scorer.score([" ".join(words) for words in captions], captions)


def evaluate_checkpoints(
    settings: Settings, scorer: CaptionScorer
) -> tuple[list[dict[str, Any]], list[SplitCaptions], dict[str, Any]]:
    """The rows of all checkpoints and of their ensemble, the last captions, and how captions were decoded.

    Where --compare names a checkpoint, its captions come after the last ones.
    """
    runtime = choose_runtime(settings.device, settings.precision)
    index = CaptionIndex.load(settings.consensus_index) if settings.consensus_index else None
    loaded = load_models(settings.checkpoint, runtime.device)
    models = {name: combine({name: model}, settings.views) for name, model in loaded.items()}
    if len(models) > 1:
        models["ensemble"] = combine(loaded, settings.views)
    compared = {}
    if is_checkpoint(settings.compare):
        compared = load_models([settings.compare], runtime.device)
        compared = {name: combine({name: model}, settings.views) for name, model in compared.items()}
    metadata = read_metadata(settings.data_folder)
    for captioner in [*models.values(), *compared.values()]:  # an error is one before all work
        Constraints.of(settings, captioner.vocabulary)
        require_fitting_images(captioner, metadata, settings.data_folder)
    if index:
        index.find_encoder(list(models.values())[-1])
        index.require_data(metadata["digest"], settings.data_folder)

    def consensus_of(captioner: Captioner | Ensemble) -> Consensus | None:
        # Of several models some may have other encoders than the index.
        fits = index and index.encoder in captioner.fingerprints
        return make_consensus(index, captioner, settings, runtime) if index and fits else None

    rows, found = [], []
    for name, captioner in models.items():
        new_rows, captions = evaluate_model(settings, name, captioner, runtime, scorer, consensus_of(captioner))
        found = [captions]
        rows += [{"model": name} | row for row in new_rows] if len(models) > 1 else new_rows
    last = settings.replace(beam_sizes=settings.beam_sizes[-1:])
    for name, captioner in compared.items():
        found.append(evaluate_model(last, name, captioner, runtime, scorer.quick(), consensus_of(captioner))[1])
    decoded = {
        "decoding": {field.name: getattr(last, field.name) for field in fields(EnsembleSettings)},
        "consensus_digest": index.data_digest if index else None,  # of the data that the index is of
        "dtype": str(runtime.dtype).removeprefix("torch."),
    }
    return rows, found, decoded


def is_checkpoint(path: str) -> bool:
    """Whether --compare names a checkpoint, and not a results file."""
    return path.endswith(".pt")


def main(settings: Settings) -> None:
    """Score captions, those of checkpoints in all ways that are asked for; write scores and captions."""
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
        comparison = compare_captions(captions[0].scored, captions[1].scored, settings.compare)
    write_json(paths["scores"], described | {"comparison": comparison, "scores": rows}, indent=1)
    if not settings.results:
        write_json(paths["results"], captions[0].scored.results)
    write_json(paths["scores_per_image"], captions[0].scored.per_image)
    if not java:
        print("METEOR is left out, it needs Java: install a Java runtime (such as openjdk)", file=sys.stderr)
    print(format_scores(rows))
    if comparison:
        print(f"\n{format_tests(comparison['tests'], settings.compare)}")
    print(f"{paths['scores']} holds the tables, {paths['scores_per_image']} the last row's captions and their scores")
    if settings.report:
        described |= {"table": table_cells(rows, half_intervals(rows))}
        report_split(described, captions, settings.report_photos).write(report_path)
        print(f"{report_path} shows them: open it in a browser")


if __name__ == "__main__":
    run_script(main, Settings)
