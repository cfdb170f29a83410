"""Train named models under one budget on one data folder and compare them: python benchmarks/compare_models.py

Each model is one set of settings of train.py, trained with the same seeds for the same epochs on frozen features and
scored on the validation images by eval.py. Finished runs are not repeated and interrupted ones are resumed, so several
calls can share the work: run each with some --variants, then one with all of them for the table. That last call times
training steps and beam search, one model after another; keep the machine otherwise idle for it.
"""

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import eval as eval_script
import train
from common.files import atomic_write, read_json, write_json
from datasets import make_batches, make_loader, shuffled_indices
from decoding.settings import DecodingSettings
from evaluation.scoring import caption_dataset
from features.feature_cache import build_dataset
from models import load_captioner, load_checkpoint
from preparation.storage import read_metadata
from training.optim import make_optimizer
from utils import PRECISIONS, BaseSettings, InputError, choose_runtime, run_script, setting

TRANSFORMER_512 = {"decoder": "transformer", "dropout": 0.3}
TRANSFORMER_256 = {**TRANSFORMER_512, "hidden_dim": 256, "embed_dim": 256}
OBJECTS = {"regions": "objects", "box_features": True}
BOTH = {"regions": "both", "box_features": True}
VARIANTS = {
    "none-rnn": {"attention": "none", "cell": "rnn"},
    "none-gru": {"attention": "none", "cell": "gru"},
    "none-lstm": {"attention": "none"},
    "soft-lstm": {},
    "dot-lstm": {"attention": "dot"},
    "hard-lstm": {"attention": "hard"},
    "soft-gru": {"cell": "gru"},
    "adaptive-lstm": {"decoder": "adaptive"},
    "up_down": {"decoder": "up_down"},
    "sgrvinod": {"decoder": "sgrvinod"},
    "show-and-tell": {"attention": "none", "image_first": True},
    "soft-lstm-graph1": {"graph_layers": 1},
    "soft-lstm-graph2": {"graph_layers": 2},
    "soft-lstm-mobilenet_v2": {"encoder": "mobilenet_v2"},
    "soft-lstm-objects": OBJECTS,
    "soft-lstm-objects-gat": OBJECTS | {"graph_layers": 1, "graph_edges": "spatial"},
    "soft-lstm-objects-gcn": OBJECTS | {"graph_layers": 1, "graph_edges": "spatial", "graph_layer": "gcn"},
    "soft-lstm-both": BOTH,
    "up_down-objects": OBJECTS | {"decoder": "up_down"},
    "up_down-both": BOTH | {"decoder": "up_down"},
    "transformer-0+2-256": TRANSFORMER_256,
    "transformer-0+2-512": TRANSFORMER_512,
    "transformer-2+2-256": {**TRANSFORMER_256, "region_dim": 256, "encoder_layers": 2},
    "transformer-2+2-512": {**TRANSFORMER_512, "encoder_layers": 2},
    "transformer-2+2-512-objects": {**TRANSFORMER_512, **OBJECTS, "encoder_layers": 2},
    "transformer-2+2-512-objects-geometry": {**TRANSFORMER_512, **OBJECTS, "encoder_layers": 2, "geometry": True},
}
OF_OBJECTS = {name for name, changes in VARIANTS.items() if "regions" in changes}  # require objects in the data folder
BEAM_SIZES = (1, 5)
SCORES = {"bleu_4": "BLEU-4", "meteor": "METEOR", "rouge_l": "ROUGE-L", "cider": "CIDEr"}
ATTENTION_SCORES = ("pointing", "correctness", "entropy")  # if the folder has objects


@dataclass(frozen=True, kw_only=True)
class Settings(BaseSettings):
    """Train models under one budget and write their scores to table.md and table.json."""

    data_folder: str = "data/flickr8k"  # what create_input_files.py wrote
    output_folder: str = "runs/compare"  # where the runs and the table go
    variants: tuple[str, ...] = tuple(name for name in VARIANTS if name not in OF_OBJECTS)  # models to compare
    seeds: tuple[int, ...] = (0,)  # seeds of weights, order and dropout; each model is trained once per seed
    epochs: int = setting(3, minimum=1)  # passes over the training images
    hflip: bool = True  # as in train.py
    encoder: str = "resnet50"  # torchvision network of variants that name none
    weights_folder: str = ""  # folder of torchvision state dicts such as resnet50.pth; empty: download ImageNet weights
    precision: str = setting("auto", choices=PRECISIONS)  # bf16 mixed precision where the hardware has it
    device: str = "auto"  # auto, cpu or cuda


def training_settings(name: str, seed: int, settings: Settings) -> train.Settings:
    """Return the settings of train.py for one model and seed."""
    changes: dict[str, Any] = {"encoder": settings.encoder, **VARIANTS[name]}
    weights = Path(settings.weights_folder) / f"{changes['encoder']}.pth"
    return train.Settings(
        data_folder=settings.data_folder,
        run_folder=str(Path(settings.output_folder) / f"{name}_seed{seed}"),
        epochs=settings.epochs,
        hflip=settings.hflip,
        seed=seed,
        precision=settings.precision,
        device=settings.device,
        **{"encoder_weights": str(weights) if settings.weights_folder else "imagenet", **changes},
    )


def comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that two runs must share: all but paths and the device."""
    ignored = {"data_folder", "run_folder", "overwrite", "resume", "encoder_weights", "plot", "device"}
    return {name: value for name, value in settings.items() if name not in ignored}


def train_and_score(name: str, seed: int, settings: Settings) -> dict[str, Any]:
    """Train and score one model, unless already done, and return its row."""
    train_settings = training_settings(name, seed, settings)
    folder = Path(train_settings.run_folder)
    row_path, last = folder / "row.json", folder / "last.pt"
    for path, read in ((row_path, read_json), (last, load_checkpoint)):
        if path.is_file() and comparable(read(path)["settings"]) != comparable(asdict(train_settings)):
            raise InputError(f"{folder} was trained with other settings: delete it or choose another --output_folder")
    if row_path.is_file():
        return read_json(row_path)["row"]
    print(f"\n{name}, seed {seed}")
    train.main(replace(train_settings, resume=str(last)) if last.is_file() else train_settings)
    eval_settings = eval_script.Settings(
        checkpoint=(str(folder / "best.pt"),),
        data_folder=train_settings.data_folder,
        split="val",
        beam_sizes=BEAM_SIZES,
        precision=train_settings.precision,
        device=train_settings.device,
    )
    eval_script.main(eval_settings)
    scores = read_json(eval_script.output_path(eval_settings, "scores"))["scores"]
    row = {"variant": name, "seed": seed, "scores": scores}
    write_json(row_path, {"settings": asdict(train_settings), "row": row}, indent=1)
    return row


def size_and_speed(settings: train.Settings, steps: int = 20) -> dict[str, Any]:
    """Measure a trained model's parameters without the encoder's, captions/s of training and photos/s of search.

    Training steps use cached features; each beam size decodes the validation images.
    """
    runtime = choose_runtime(settings.device, settings.precision)
    captioner = load_captioner(Path(settings.run_folder) / "best.pt", runtime.device)
    training, validation = (
        build_dataset(settings.data_folder, split, captioner, runtime) for split in ("train", "val")
    )
    searches = []
    for beam_size in BEAM_SIZES:
        start = time.perf_counter()
        caption_dataset(captioner, [validation], DecodingSettings(beam_size=beam_size), runtime)
        searches.append(len(validation) / (time.perf_counter() - start))
    optimizer = make_optimizer(captioner, settings)
    captioner.train()
    items = shuffled_indices(len(training), settings.seed, epoch=0)[: (steps + 1) * settings.batch_size]
    speeds = []
    for batch in make_loader(training, make_batches(items, settings.batch_size)):
        start = time.perf_counter()
        train.train_step(captioner, optimizer, batch, settings, runtime)
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()
        speeds.append(batch.counts()[1] / (time.perf_counter() - start))
    parameters = sum(weight.numel() for group in optimizer.param_groups for weight in group["params"])
    return {
        "parameters": parameters,
        "captions_per_second": statistics.median(speeds[1:] or speeds),
        "photos_per_second": searches,
    }


def mean_and_deviation(values: list[float | None], digits: int) -> str:
    """Format one value, or the mean of several with their standard deviation; a dash if one could not be measured."""
    measured = [value for value in values if value is not None]
    if len(measured) < len(values):
        return "-"
    mean = f"{statistics.mean(measured):.{digits}f}"
    return mean if len(measured) == 1 else f"{mean} ± {statistics.stdev(measured):.{digits}f}"


def format_table(rows: list[dict[str, Any]]) -> str:
    """Format rows as a Markdown table with one line per model and beam size, averaged over the seeds."""
    names = {*SCORES} | {name for row in rows for scores in row["scores"] for name in scores}
    measured = [name for name in (*SCORES, *ATTENTION_SCORES) if name in names]
    titles = ["model", "seeds", "parameters", "captions/s", "beam", "photos/s"]
    titles += [SCORES.get(name, name) for name in measured]
    lines = ["| " + " | ".join(titles) + " |", "| --- |" + " ---: |" * (len(titles) - 1)]
    for name in dict.fromkeys(row["variant"] for row in rows):
        runs = [row for row in rows if row["variant"] == name]
        speed = f"{statistics.median(run['captions_per_second'] for run in runs):.0f}"
        for i, beam_size in enumerate(BEAM_SIZES):
            scores = [mean_and_deviation([run["scores"][i].get(name) for run in runs], 4) for name in measured]
            search = f"{statistics.median(run['photos_per_second'][i] for run in runs):.0f}"
            columns = [name, len(runs), f"{runs[0]['parameters'] / 1e6:.2f} M", speed, beam_size, search, *scores]
            lines.append("| " + " | ".join(map(str, columns)) + " |")
    return "\n".join(lines)


def main(settings: Settings) -> None:
    """Train and score every model, and print the table and one line of JSON."""
    unknown = [name for name in settings.variants if name not in VARIANTS]
    if unknown:
        raise InputError(f"--variants {unknown[0]}: choose from {' '.join(VARIANTS)}")
    read_metadata(settings.data_folder)
    runs = [(name, seed) for name in dict.fromkeys(settings.variants) for seed in dict.fromkeys(settings.seeds)]
    for name, seed in runs:  # fail before hours of training
        weights = training_settings(name, seed, settings).encoder_weights
        if settings.weights_folder and not Path(weights).is_file():
            raise InputError(f"--weights_folder {settings.weights_folder}: no such file: {weights}")
    rows = [train_and_score(name, seed, settings) for name, seed in runs]
    for row in tqdm(rows, desc="timing", unit="model"):
        row |= size_and_speed(training_settings(row["variant"], row["seed"], settings))
    table = format_table(rows)
    with atomic_write(Path(settings.output_folder) / "table.md") as temporary:
        temporary.write_text(table + "\n", encoding="utf-8")
    write_json(Path(settings.output_folder) / "table.json", rows, indent=1)
    print(table)
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    run_script(main, Settings)
