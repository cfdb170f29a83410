"""Score a checkpoint on a prepared folder: python eval.py --checkpoint runs/shapes/best.pt --data_folder data/shapes"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common.files import require_writable, write_json
from evaluation.generation import DecodingSettings, evaluate
from evaluation.metrics import format_table, has_java
from models import load_captioner
from training.feature_cache import build_dataset
from utils import choose_runtime, require_at_least, run_script


@dataclass(frozen=True)
class Settings:
    """Score a checkpoint: BLEU-1 to 4, METEOR, ROUGE-L and CIDEr by beam size. Edit a value or pass it as a flag."""

    # group: paths
    checkpoint: str = "runs/shapes/best.pt"  # what train.py wrote
    data_folder: str = "data/shapes"  # what create_input_files.py wrote
    split: Literal["train", "val", "test"] = "test"  # which images to caption
    output_folder: str = ""  # folder of scores.json and results.json; empty: the checkpoint's folder

    # group: decoding
    beam_sizes: tuple[int, ...] = (1, 3, 5)  # beams per image; 1 is greedy decoding
    length_penalty: float = 0.5  # rank by log-probability / length ** this; 0 favors short captions
    max_length: int = 30  # maximum words of a caption
    batch_size: int = 32  # images decoded at once

    # group: run
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # bf16 mixed precision where the hardware has it
    device: str = "auto"  # auto, cpu or cuda


def main(settings: Settings) -> None:
    """Evaluate a checkpoint at each beam size; write scores.json and, of the last beam size, results.json."""
    require_at_least(settings, 1, "beam_sizes", "max_length", "batch_size")
    require_at_least(settings, 0, "length_penalty")
    runtime = choose_runtime(settings.device, settings.precision)
    output_folder = Path(settings.output_folder or Path(settings.checkpoint).parent)
    require_writable(output_folder)
    captioner, vocabulary = load_captioner(settings.checkpoint, runtime.device)
    dataset = build_dataset(settings.data_folder, settings.split, vocabulary, captioner, runtime)
    output_folder.mkdir(parents=True, exist_ok=True)
    meteor = has_java()
    if not meteor:
        print("METEOR is left out, it needs Java: install a Java runtime (such as openjdk)", file=sys.stderr)
    rows, captions = [], []
    for beam_size in settings.beam_sizes:
        decoding = DecodingSettings(beam_size, settings.max_length, settings.length_penalty, settings.batch_size)
        row, captions = evaluate(captioner, vocabulary, dataset, decoding, runtime, meteor)
        rows.append(row)
    write_json(output_folder / "scores.json", rows, indent=1)
    results = [
        {"image_id": entry["image_id"], "caption": " ".join(words)}
        for entry, words in zip(dataset.entries, captions, strict=True)
    ]
    write_json(output_folder / "results.json", results)
    print(format_table(rows))
    print(
        f"{output_folder}/scores.json holds the table, {output_folder}/results.json the captions of beam "
        f"{settings.beam_sizes[-1]}"
    )


if __name__ == "__main__":
    run_script(main, Settings)
