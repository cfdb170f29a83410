"""Photos/s of batched beam search against one photo at a time: python benchmarks/bench_caption.py

Both sides search the same regions with the same random decoder. One photo at a time is the way of most tutorials;
here it uses the same search, so the ratio shows what the batch alone gives.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from decoders import Decoder
from search import beam_search
from utils import choose_device, run_script


@dataclass(frozen=True)
class Settings:
    """Time batched beam search against one photo at a time, after checking that both find the same captions."""

    images: int = 64  # photos to caption, and the size of the batch
    beam_size: int = 5  # captions kept an image
    max_length: int = 14  # words of each caption; a random decoder uses them all
    regions: int = 49  # of a photo, 7x7
    region_size: int = 512  # features of a region, after the dense layer of train.py
    hidden_size: int = 512  # units of word, attention and LSTM
    vocabulary: int = 2541  # words
    repeats: int = 3  # counted runs of each side
    device: str = "auto"  # auto, cpu or cuda
    seed: int = 0  # of weights and regions


def main(settings):
    """Check that both sides agree, time them in turn, print a table and one line of JSON."""
    device = choose_device(settings.device)
    torch.manual_seed(settings.seed)
    size = settings.hidden_size
    sizes = (settings.vocabulary, settings.region_size, size, size, size)
    decoder = Decoder(*sizes, dropout=0.0, cell="lstm", attention="soft").to(device).eval()
    regions = torch.rand(settings.images, settings.regions, settings.region_size).to(device)

    def batched():
        return beam_search(decoder, regions, settings.beam_size, settings.max_length)[1][:, 0]

    def one_by_one():
        found = [beam_search(decoder, one, settings.beam_size, settings.max_length)[1] for one in regions.split(1)]
        return torch.cat(found)[:, 0]

    gap = (batched() - one_by_one()).abs().max().item()
    print(f"both sides find captions of the same log-probability within {gap:.1e}")
    assert gap < 1e-3, "the two sides do not agree"
    seconds = {batched: [], one_by_one: []}
    for _ in range(settings.repeats):
        for side in seconds:
            start = time.perf_counter()
            side()
            seconds[side].append(time.perf_counter() - start)
    fast, slow = (sorted(times)[len(times) // 2] for times in seconds.values())
    print(f"beam {settings.beam_size}, {settings.max_length} words, {device}, {torch.get_num_threads()} threads")
    print("| side | photos/s |\n| --- | ---: |")
    print(f"| one photo at a time | {settings.images / slow:.1f} |")
    print(f"| {settings.images} photos at once | {settings.images / fast:.1f} |")
    print(json.dumps({"ratio": slow / fast, "photos_per_second": settings.images / fast}))


if __name__ == "__main__":
    run_script(main, Settings)
