"""Score a checkpoint on a prepared folder: python eval.py --checkpoint runs/shapes/best.pt --data_folder data/shapes"""

import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from nltk.translate.bleu_score import corpus_bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from tqdm import tqdm

from datasets import make_loader, open_split, split_order
from models import load_captioner
from search import attend, beam_search
from utils import (
    autocast,
    choose_device,
    choose_dtype,
    gather,
    rank,
    require_at_least,
    require_writable,
    run_script,
    world_size,
    write_json,
)


@dataclass(frozen=True)
class Settings:
    """Score a checkpoint: BLEU-1 to 4, METEOR, ROUGE-L and CIDEr by beam size. Edit a value here or give it as flag."""

    checkpoint: str = "runs/shapes/best.pt"  # what train.py wrote
    data_folder: str = "data/shapes"  # what create_input_files.py wrote
    split: Literal["train", "val", "test"] = "test"  # which images to caption
    beam_sizes: tuple[int, ...] = (1, 3, 5)  # captions kept an image while searching; 1 is greedy decoding
    length_penalty: float = 0.5  # rank by log-probability / length ** this; 0 favours short captions
    max_length: int = 30  # words of a caption at most
    batch_size: int = 32  # images decoded at once
    output: str = ""  # folder of scores.json and results.json; empty: the checkpoint's folder
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # bf16 mixed precision where the hardware has it
    device: str = "auto"  # auto, cpu or cuda


def generate(captioner, vocabulary, dataset, settings, beam_size, device, dtype):
    """Caption every image of a dataset, each once and freely.

    `settings` gives batch_size, max_length and length_penalty. Returns, in the dataset's order, the captions as lists
    of words and, where the dataset knows its objects' boxes, where the decoder looked at each word: (T, R) an image,
    otherwise None.
    """
    captioner.eval()
    captions, looks = [None] * len(dataset), [None] * len(dataset)
    found_here = []
    batches = split_order(list(range(len(dataset))), settings.batch_size)
    bar = tqdm(total=len(dataset), desc=f"beam {beam_size}", unit="image", leave=False, disable=rank() > 0)
    with torch.inference_mode(), bar:
        for batch in make_loader(dataset, batches):
            with autocast(device, dtype):
                regions = captioner.regions(batch.images.to(device, non_blocking=True))
                found, _ = beam_search(
                    captioner.decoder, regions, beam_size, settings.max_length, settings.length_penalty
                )
                weights = attend(captioner.decoder, regions, found[:, 0])[1] if dataset.has_boxes else None
            for place, index in enumerate(batch.indices):
                look = None if weights is None else weights[place].float().cpu()
                found_here.append((index, vocabulary.decode(found[place, 0]), look))
            bar.update(len(batch.indices) * world_size())
    for index, caption, look in gather(found_here):
        captions[index], looks[index] = caption, look
    return captions, looks


def measure(references, captions, meteor=False):
    """The metrics of captions, each a list of words, against several references an image.

    BLEU-1 to 4 are nltk's corpus BLEU (Papineni et al., 2002), METEOR, ROUGE-L and CIDEr those of pycocoevalcap.
    All between 0 and 1, CIDEr between 0 and 10; METEOR, which needs Java, is None unless asked for.
    """
    weights = [(1,), (1 / 2,) * 2, (1 / 3,) * 3, (1 / 4,) * 4]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no common 4-gram at all: a BLEU-4 of about 0, which the table shows
        bleu = corpus_bleu(references, captions, weights)
    truth = {i: [" ".join(words) for words in one_image] for i, one_image in enumerate(references)}
    found = {i: [" ".join(words)] for i, words in enumerate(captions)}
    return {
        **{f"bleu_{n}": float(score) for n, score in enumerate(bleu, start=1)},
        "meteor": float(Meteor().compute_score(truth, found)[0]) if meteor else None,
        "rouge_l": float(Rouge().compute_score(truth, found)[0]),
        "cider": float(Cider().compute_score(truth, found)[0]),
    }


def pointing_score(entries, captions, looks):
    """How often the attention's maximum at a noun lies in the box of the object named (Zhang et al., 2016).

    Where several objects share the noun, the word before it tells them apart; a noun for no object is a miss.
    """
    nouns = {thing["words"][-1] for entry in entries for thing in entry["objects"]}
    hits = total = 0
    for entry, words, weights in zip(entries, captions, looks, strict=True):
        side = round(weights.shape[1] ** 0.5)
        for t, word in enumerate(words):
            if word in nouns:
                named = [thing for thing in entry["objects"] if thing["words"][-1] == word]
                exactly = [thing for thing in named if t and thing["words"][-2] == words[t - 1]]
                row, column = divmod(int(weights[t].argmax()), side)
                x, y = (column + 0.5) / side, (row + 0.5) / side
                boxes = [thing["box"] for thing in exactly or named]
                hits += any(left <= x <= right and top <= y <= bottom for left, top, right, bottom in boxes)
                total += 1
    return hits / total if total else 0.0


def evaluate(captioner, vocabulary, dataset, settings, beam_size, device, dtype, meteor=False):
    """Caption a dataset and score it: a row of scores.json and the captions as lists of words."""
    start = time.perf_counter()
    captions, looks = generate(captioner, vocabulary, dataset, settings, beam_size, device, dtype)
    seconds = time.perf_counter() - start
    row = {"beam_size": beam_size, **measure(dataset.references.strings(), captions, meteor)}
    row["images_per_second"] = len(dataset) / seconds
    if dataset.has_boxes and captioner.decoder.looks:
        row["pointing"] = pointing_score(dataset.entries, captions, looks)
    return row, captions


def format_table(rows):
    """Rows of scores as a Markdown table."""
    titles = {
        "beam_size": "beam",
        **{f"bleu_{n}": f"BLEU-{n}" for n in range(1, 5)},
        "meteor": "METEOR",
        "rouge_l": "ROUGE-L",
        "cider": "CIDEr",
        "pointing": "pointing",
        "images_per_second": "images/s",
    }
    columns = [name for name in titles if rows[0].get(name) is not None]
    formats = {"beam_size": "{}", "images_per_second": "{:.1f}"}
    lines = ["| " + " | ".join(titles[name] for name in columns) + " |", "| ---: " * len(columns) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(formats.get(name, "{:.4f}").format(row[name]) for name in columns) + " |")
    return "\n".join(lines)


def has_java():
    """Whether METEOR's Java program can run; some systems have a `java` that only says where to get one."""
    java = shutil.which("java")
    return java is not None and subprocess.run([java, "-version"], capture_output=True).returncode == 0


def main(settings):
    """Evaluate one checkpoint at each beam size; write scores.json and results.json (of the last beam size)."""
    require_at_least(settings, 1, "beam_sizes", "max_length", "batch_size")
    require_at_least(settings, 0, "length_penalty")
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.precision, device)
    output = Path(settings.output or Path(settings.checkpoint).parent)
    require_writable(output)
    captioner, vocabulary, trained = load_captioner(settings.checkpoint, device)
    cached = not trained["fine_tune_encoder"]
    dataset = open_split(settings.data_folder, settings.split, vocabulary, captioner, cached, device, dtype)
    output.mkdir(parents=True, exist_ok=True)
    meteor = has_java()
    if not meteor:
        print("METEOR is left out, it needs Java: install a Java runtime (such as openjdk)", file=sys.stderr)
    rows = []
    for beam_size in settings.beam_sizes:
        row, captions = evaluate(captioner, vocabulary, dataset, settings, beam_size, device, dtype, meteor)
        rows.append(row)
    write_json(output / "scores.json", rows, indent=1)
    results = [
        {"image_id": entry["image_id"], "caption": " ".join(words)}
        for entry, words in zip(dataset.entries, captions, strict=True)
    ]
    write_json(output / "results.json", results)
    print(format_table(rows))
    print(f"{output}/scores.json holds the table, {output}/results.json the captions of beam {settings.beam_sizes[-1]}")


if __name__ == "__main__":
    run_script(main, Settings)
