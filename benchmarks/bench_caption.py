"""Images/s of batched beam search against one image at a time: python benchmarks/bench_caption.py

Both sides search the same regions with the same decoder. Most tutorials caption one image at a time; here that side
uses the same search, so the ratio shows the gain from batching alone. The captions of a random decoder never end. With
--checkpoint, --data_folder and --max_length 30, the benchmark captions the val split, whose captions end at different
words.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from datasets import in_order, make_batches, make_loader
from decoding.beam_search import beam_search
from decoding.sampling import sample
from decoding.settings import DecodingSettings
from features.feature_cache import build_dataset
from models import ModelSettings, load_captioner
from modules.decoders import Decoder
from modules.show_attend_tell import ShowAttendTell
from utils import BaseSettings, InputError, Runtime, choose_runtime, run_script, setting


@dataclass(frozen=True, kw_only=True)
class Settings(BaseSettings):
    """Time batched beam search against one image at a time, after checking that both find the same captions."""

    checkpoint: str = ""  # captions the val split of data_folder; empty: a random decoder and random regions
    data_folder: str = ""  # prepared folder to caption, with --checkpoint
    images: int = 64  # images to caption
    batch_size: int = 64  # images decoded at once
    beam_sizes: tuple[int, ...] = (1, 3, 5)  # captions kept per image
    sampled_captions: int = 5  # captions sampled per image
    max_length: int = 14  # maximum words of a caption; a random decoder uses them all
    regions: int = 49  # random decoder: regions per image, 7x7
    region_dim: int = 512  # random decoder: width of a region, after the linear layer of train.py
    hidden_dim: int = 512  # random decoder: width of word embedding, attention and LSTM
    vocab_size: int = 2541  # random decoder: words in the vocabulary
    repeats: int = 3  # timed runs of each side
    precision: str = setting("both", choices=("both", "bf16", "fp32"))  # both: one row for each
    device: str = "auto"  # auto, cpu or cuda
    seed: int = 0  # seed of weights and regions


def random_decoder(settings: Settings, device: torch.device) -> tuple[Decoder, Tensor]:
    """Build a decoder with random weights, and random regions (B, R, D)."""
    torch.manual_seed(settings.seed)
    width = settings.hidden_dim
    model_settings = ModelSettings(embed_dim=width, attention_dim=width, hidden_dim=width, dropout=0.0)
    decoder = ShowAttendTell(model_settings, vocab_size=settings.vocab_size, region_dim=settings.region_dim)
    regions = torch.rand(settings.images, settings.regions, settings.region_dim)
    return decoder.to(device).eval(), regions.to(device)


def trained_decoder(settings: Settings, device: torch.device) -> tuple[Decoder, Tensor]:
    """Load the checkpoint's decoder and the regions (B, R, D) of the first images of the val split."""
    captioner = load_captioner(settings.checkpoint, device)
    if captioner.uses_objects:
        raise InputError(f"--checkpoint {settings.checkpoint}: the model looks at objects; choose a model of a grid")
    dataset = build_dataset(settings.data_folder, "val", captioner, choose_runtime(device, "auto"))
    items = in_order(min(settings.images, len(dataset)))
    with torch.no_grad():
        regions = [
            captioner.encode(batch.inputs.to(device)).regions
            for batch in make_loader(dataset, make_batches(items, settings.batch_size))
        ]
    return captioner.decoder, torch.cat(regions)


def median_seconds(functions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Return the median seconds of each function, called in turn after one untimed call."""
    times = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, seconds in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
    return [sorted(seconds[1:])[repeats // 2] for seconds in times]


class Row(NamedTuple):
    """A row of the table: images/s of both sides."""

    search: str
    precision: str
    one_at_a_time: float
    batched: float


def measure(decoder: Decoder, regions: Tensor, settings: Settings, runtime: Runtime) -> list[Row]:
    """Time both sides of each search. In fp32, where rounding cannot change a caption, also check that they agree."""
    regions = regions.to(runtime.dtype)
    precision = str(runtime.dtype).removeprefix("torch.")

    @torch.no_grad()
    def decode(batch_size: int, beam_size: int) -> Tensor:
        """Return the log-probabilities (B,) of the best captions; sample captions if `beam_size` is 0."""
        log_probs = []
        with runtime.autocast():
            for batch in regions.split(batch_size):
                if beam_size:
                    search = DecodingSettings(beam_size=beam_size, max_length=settings.max_length)
                    log_probs.append(beam_search(decoder, batch, search)[1][:, 0])
                else:
                    sampling = DecodingSettings(samples=settings.sampled_captions, max_length=settings.max_length)
                    sample(decoder, batch, sampling)
        return torch.cat(log_probs) if beam_size else regions[:0]

    rows = []
    for beam_size in (*settings.beam_sizes, 0):
        name = f"beam {beam_size}" if beam_size else f"{settings.sampled_captions} samples"
        sides = [partial(decode, batch_size, beam_size) for batch_size in (1, settings.batch_size)]
        if beam_size and runtime.dtype == torch.float32:
            gap = (sides[0]() - sides[1]()).abs().max().item()
            print(f"{name}: the log-probabilities of both sides agree within {gap:.1e}")
            assert gap < 1e-3, "the two sides do not agree"
        rows.append(Row(name, precision, *(len(regions) / s for s in median_seconds(sides, settings.repeats))))
    return rows


def main(settings: Settings) -> None:
    """Check that both sides agree, time them in turn, and print a table and one line of JSON."""
    if bool(settings.checkpoint) != bool(settings.data_folder):
        raise InputError("--checkpoint and --data_folder: give both, or neither for a random decoder")
    precisions = ("bf16", "fp32") if settings.precision == "both" else (settings.precision,)
    runtimes = [choose_runtime(settings.device, precision) for precision in precisions]
    device = runtimes[0].device
    decoder, regions = (trained_decoder if settings.checkpoint else random_decoder)(settings, device)
    rows = [row for runtime in runtimes for row in measure(decoder, regions, settings, runtime)]
    print(f"{len(regions)} images, at most {settings.max_length} words, {device}, {torch.get_num_threads()} threads")
    print(f"| search | precision | one image at a time, images/s | {settings.batch_size} at once, images/s |")
    print("| --- | --- | ---: | ---: |")
    for row in rows:
        print(f"| {row.search} | {row.precision} | {row.one_at_a_time:.1f} | {row.batched:.1f} |")
    last_beam = rows[-2]  # the last row has samples
    print(json.dumps({"ratio": last_beam.batched / last_beam.one_at_a_time, "rows": [row._asdict() for row in rows]}))


if __name__ == "__main__":
    run_script(main, Settings)
