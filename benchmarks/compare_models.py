"""Train named models under one budget on one data folder and compare them: python benchmarks/compare_models.py

Each model is one set of settings of train.py, trained from the same seeds for the same epochs on frozen features, and
scored on the validation images by eval.py. A run that is done is not repeated and one that was stopped goes on, so
several calls may share the work: each with its own --variants, then one with all of them for the table. Its captions/s
are timed by that last call, one model after the other, so nothing else should keep the machine busy then.
"""

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import eval as evaluation
import train
from datasets import epoch_order, make_loader, open_split, split_order
from models import load_captioner, load_checkpoint
from optimization import make_optimizer
from prepared import read_card
from utils import (
    InputError,
    choose_device,
    choose_dtype,
    read_json,
    require_at_least,
    run_script,
    write_json,
    written_whole,
)

VARIANTS = {
    "none-rnn": {"attention": "none", "cell": "rnn"},
    "none-gru": {"attention": "none", "cell": "gru"},
    "none-lstm": {"attention": "none"},
    "soft-lstm": {},
    "dot-lstm": {"attention": "dot"},
    "hard-lstm": {"attention": "hard"},
    "soft-gru": {"cell": "gru"},
    "soft-lstm-graph1": {"graph_layers": 1},
    "soft-lstm-graph2": {"graph_layers": 2},
    "soft-lstm-mobilenet_v2": {"encoder": "mobilenet_v2"},
}
BEAM_SIZES = (1, 5)
SCORES = {"bleu_4": "BLEU-4", "meteor": "METEOR", "rouge_l": "ROUGE-L", "cider": "CIDEr"}


@dataclass(frozen=True)
class Settings:
    """Train models under one budget and write a table of their scores, table.md and table.json."""

    data_folder: str = "data/flickr8k"  # what create_input_files.py wrote
    output: str = "runs/compare"  # folder of the runs and of the table
    variants: tuple[str, ...] = tuple(VARIANTS)  # models to compare
    seeds: tuple[int, ...] = (0,)  # of weights, order and dropout; each model is trained once for each
    epochs: int = 3  # passes over the training images
    mirror: bool = True  # as in train.py
    encoder: str = "resnet50"  # torchvision network of the models that name none
    weights_folder: str = ""  # of torchvision state dicts such as resnet50.pth; empty: downloaded ImageNet weights
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # bf16 mixed precision where the hardware has it
    device: str = "auto"  # auto, cpu or cuda


def training_settings(name, seed, settings):
    """The settings of train.py for one model."""
    changes = {"encoder": settings.encoder, **VARIANTS[name]}
    weights = Path(settings.weights_folder) / f"{changes['encoder']}.pth"
    return train.Settings(
        data_folder=settings.data_folder,
        run_folder=str(Path(settings.output) / f"{name}_seed{seed}"),
        epochs=settings.epochs,
        mirror=settings.mirror,
        seed=seed,
        precision=settings.precision,
        device=settings.device,
        **{"encoder_weights": str(weights) if settings.weights_folder else "imagenet", **changes},
    )


def comparable(settings):
    """What two runs must have in common: all settings but where files lie and on what they run."""
    places = {"data_folder", "run_folder", "overwrite", "resume", "encoder_weights", "look", "device"}
    return {name: value for name, value in settings.items() if name not in places}


def train_and_score(name, seed, settings):
    """Train and score one model unless that is done already; returns its row."""
    plan = training_settings(name, seed, settings)
    folder = Path(plan.run_folder)
    done, last = folder / "row.json", folder / "last.pt"
    for path, read in ((done, read_json), (last, load_checkpoint)):
        if path.is_file() and comparable(read(path)["settings"]) != comparable(asdict(plan)):
            raise InputError(f"{folder} was trained with other settings: delete it, or give another --output")
    if done.is_file():
        return read_json(done)["row"]
    print(f"\n{name}, seed {seed}")
    train.main(replace(plan, resume=str(last)) if last.is_file() else plan)
    best = folder / "best.pt"
    scoring = evaluation.Settings(
        checkpoint=str(best),
        data_folder=plan.data_folder,
        split="val",
        beam_sizes=BEAM_SIZES,
        precision=plan.precision,
        device=plan.device,
    )
    evaluation.main(scoring)
    row = {"variant": name, "seed": seed, "scores": read_json(folder / "scores.json")}
    write_json(done, {"settings": asdict(plan), "row": row}, indent=1)
    return row


def size_and_speed(plan, steps=20):
    """A trained model's number of parameters without the encoder's, and captions/s of its training steps."""
    device = choose_device(plan.device)
    dtype = choose_dtype(plan.precision, device)
    captioner, vocabulary, _ = load_captioner(Path(plan.run_folder) / "best.pt", device)
    training = open_split(plan.data_folder, "train", vocabulary, captioner, True, device, dtype)
    optimizer = make_optimizer(captioner, plan)
    captioner.train()
    order = epoch_order(len(training), plan.seed, epoch=0)[: (steps + 1) * plan.batch_size]
    speeds = []
    for batch in make_loader(training, split_order(order, plan.batch_size)):
        start = time.perf_counter()
        train.train_step(captioner, optimizer, batch, plan, device, dtype)
        if device.type == "cuda":
            torch.cuda.synchronize()
        speeds.append(batch.totals()[1] / (time.perf_counter() - start))
    parameters = sum(weight.numel() for group in optimizer.param_groups for weight in group["params"])
    return {"parameters": parameters, "captions_per_second": statistics.median(speeds[1:] or speeds)}


def spread(values, digits):
    """A number, or the mean of several with their standard deviation; a dash for what could not be measured."""
    if None in values:
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def format_table(rows):
    """Rows as a Markdown table, a line for each model and beam size; of several seeds mean and deviation."""
    titles = ["model", "seeds", "parameters", "captions/s", "beam", *SCORES.values()]
    lines = ["| " + " | ".join(titles) + " |", "| --- |" + " ---: |" * (len(titles) - 1)]
    for name in dict.fromkeys(row["variant"] for row in rows):
        runs = [row for row in rows if row["variant"] == name]
        speed = f"{statistics.median(run['captions_per_second'] for run in runs):.0f}"
        for place, beam_size in enumerate(BEAM_SIZES):
            scores = [spread([run["scores"][place][score] for run in runs], 4) for score in SCORES]
            cells = [name, len(runs), f"{runs[0]['parameters'] / 1e6:.2f} M", speed, beam_size, *scores]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(settings):
    """Train and score every model, print the table and one line of JSON."""
    require_at_least(settings, 1, "epochs")
    unknown = [name for name in settings.variants if name not in VARIANTS]
    if unknown:
        raise InputError(f"--variants {unknown[0]}: not one of {' '.join(VARIANTS)}")
    read_card(settings.data_folder)
    runs = [(name, seed) for name in dict.fromkeys(settings.variants) for seed in dict.fromkeys(settings.seeds)]
    for name, seed in runs:  # not after hours of training
        weights = training_settings(name, seed, settings).encoder_weights
        if settings.weights_folder and not Path(weights).is_file():
            raise InputError(f"--weights_folder {settings.weights_folder}: no such file: {weights}")
    rows = [train_and_score(name, seed, settings) for name, seed in runs]
    for row in tqdm(rows, desc="timing", unit="model"):
        row |= size_and_speed(training_settings(row["variant"], row["seed"], settings))
    table = format_table(rows)
    with written_whole(Path(settings.output) / "table.md") as temporary:
        temporary.write_text(table + "\n", encoding="utf-8")
    write_json(Path(settings.output) / "table.json", rows, indent=1)
    print(table)
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    run_script(main, Settings)
