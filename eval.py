"""Score checkpoints on a prepared folder: python eval.py --checkpoint runs/shapes/best.pt --data_folder data/shapes

Or score captions that are there already (--results FILE), or average the scores of several runs (--runs runs/a runs/b).
"""

import datetime
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from common.files import path_text, read_json, require_writable, write_json
from decoding.settings import DecodingSettings
from evaluation.consensus import CaptionIndex, Consensus, make_consensus
from evaluation.ensemble import Ensemble, combine, load_models
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
from utils import InputError, Runtime, choose_runtime, replace_settings, require_at_least, run_script
from visualization.report import require_report
from visualization.split_report import SplitCaptions, report_split

# Of the settings, beside DecodingSettings.
OTHER_DECODING = ("views", "consensus_index", "consensus_weight", "similar_photos")
# The flags that go with --results, and with --runs, which decode nothing; those of --runs name the files of scores.
OF_SCORES = {
    "data_folder",
    "split",
    "output_folder",
    "photos",
    "tokenizer",
    "compare",
    "spice",
    "report",
    "report_photos",
}
OF_RUNS = {"runs", "data_folder", "split", "tokenizer", "views", "samples", "consensus_index"}


@dataclass(frozen=True)
class Settings:
    """Score a checkpoint, an ensemble or captions: BLEU, METEOR, ROUGE-L, CIDEr. Edit a value or pass it as a flag."""

    # group: paths
    checkpoint: tuple[str, ...] = ("runs/shapes/best.pt",)  # what train.py wrote; several are one ensemble
    results: str = ""  # captions in COCO's results format, scored in place of a checkpoint's
    runs: tuple[str, ...] = ()  # run folders whose best.pt is scored already: mean and deviation of these scores
    data_folder: str = "data/shapes"  # what create_input_files.py wrote
    split: Literal["train", "val", "test"] = "test"  # which images to caption
    output_folder: str = ""  # folder of the scores and captions; empty: the checkpoint's folder
    features_folder: str = ""  # where the features of a frozen encoder are cached; empty: in the data folder

    # group: scores
    photos: str = ""  # of --results, score only those of the photos that this text file names, one a line
    tokenizer: Literal["plain", "ptb"] = "plain"  # ptb: words of the original sentences as in COCO's scores, needs Java
    compare: str = ""  # a results file, or a checkpoint: test whether the last row's scores differ from its scores
    spice: bool = False  # SPICE too; needs Java and parts that are not installed with the rest
    report: bool = False  # write a page to look through the photos with their captions, references and attention
    report_photos: int = 0  # photos of the report, the first ones of the split; 0: all

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
    for mode, flags in (("runs", OF_RUNS), ("results", OF_SCORES | {"results"})):
        unused = sorted(getattr(settings, "given", frozenset()) - flags) if getattr(settings, mode) else ()
        for name in unused:
            raise InputError(f"--{name} does not go with --{mode}, which decodes nothing: leave it out")
    folders = [str(Path(run).resolve()) for run in settings.runs]
    if settings.runs and len(set(folders)) < max(2, len(folders)):
        raise InputError(f"--runs {' '.join(settings.runs)}: give two run folders or more, each once")
    if settings.photos and (settings.report or not settings.results):
        raise InputError(f"--photos {settings.photos}: goes with --results, without --report")
    if settings.results and is_checkpoint(settings.compare):
        raise InputError(f"--compare {settings.compare}: --results decodes nothing, give that model's results file")
    require_at_least(settings, 1, "beam_sizes", "similar_photos")
    require_at_least(settings, 0, "consensus_weight", "report_photos")
    if settings.report_photos and not settings.report:
        raise InputError(f"--report_photos {settings.report_photos}: needs --report")
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
    loaded = load_models(settings.checkpoint, settings.views, runtime.device)
    models = {name: combine({name: model}, settings.views) for name, model in loaded.items()}
    if len(models) > 1:
        models["ensemble"] = combine(loaded, settings.views)
    compared = {}
    if is_checkpoint(settings.compare):
        compared = load_models([settings.compare], settings.views, runtime.device)
        compared = {name: combine({name: model}, settings.views) for name, model in compared.items()}
    metadata = read_metadata(settings.data_folder)
    for captioner in [*models.values(), *compared.values()]:  # an error is one before all work
        decoding_of_rows(settings)[0].constraints(captioner.vocabulary)
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
    last = replace_settings(settings, beam_sizes=settings.beam_sizes[-1:])
    for name, captioner in compared.items():
        found.append(evaluate_model(last, name, captioner, runtime, scorer.quick(), consensus_of(captioner))[1])
    decoded = {
        "decoding": asdict(decoding_of_rows(settings)[-1]) | {name: getattr(settings, name) for name in OTHER_DECODING},
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
        of_runs = (replace_settings(settings, checkpoint=(f"{run}/best.pt",)) for run in settings.runs)
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
