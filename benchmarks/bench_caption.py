"""Images/s of batched beam search against one image at a time: python benchmarks/bench_caption.py

Both sides search the same regions with the same random decoder. Most tutorials caption one image at a time; here that
side uses the same search, so the ratio is what batching alone brings.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from modules.beam_search import beam_search
from modules.decoders import Decoder
from utils import choose_device, run_script


@dataclass(frozen=True)
class Settings:
    """Time batched beam search against one image at a time, after checking that both find the same captions."""

    images: int = 64  # images to caption, and the size of the batch
    beam_size: int = 5  # captions kept per image
    max_length: int = 14  # words of each caption; a random decoder uses them all
    regions: int = 49  # per image, 7x7
    region_dim: int = 512  # width of a region, after the linear layer of train.py
    hidden_dim: int = 512  # of word embedding, attention and LSTM
    vocab_size: int = 2541  # words
    repeats: int = 3  # timed runs of each side
    device: str = "auto"  # auto, cpu or cuda
    seed: int = 0  # of weights and regions


def main(settings: Settings) -> None:
    """Check that both sides agree, time them in turn, print a table and one line of JSON."""
    device = choose_device(settings.device)
    torch.manual_seed(settings.seed)
    decoder = Decoder(
        vocab_size=settings.vocab_size,
        region_dim=settings.region_dim,
        embed_dim=settings.hidden_dim,
        attention_dim=settings.hidden_dim,
        hidden_dim=settings.hidden_dim,
        dropout=0.0,
        cell="lstm",
        attention="soft",
    )
    decoder.to(device).eval()
    regions = torch.rand(settings.images, settings.regions, settings.region_dim).to(device)

    def batched() -> Tensor:
        return beam_search(decoder, regions, settings.beam_size, settings.max_length)[1][:, 0]

    def one_at_a_time() -> Tensor:
        results = [beam_search(decoder, image, settings.beam_size, settings.max_length) for image in regions.split(1)]
        return torch.cat([log_probs[:, 0] for _, log_probs in results])

    gap = (batched() - one_at_a_time()).abs().max().item()
    print(f"log-probabilities of both sides' captions agree within {gap:.1e}")
    assert gap < 1e-3, "the two sides do not agree"
    seconds = {batched: [], one_at_a_time: []}
    for _ in range(settings.repeats):
        for side, times in seconds.items():
            start = time.perf_counter()
            side()
            times.append(time.perf_counter() - start)
    fast, slow = (sorted(times)[len(times) // 2] for times in seconds.values())
    print(f"beam {settings.beam_size}, {settings.max_length} words, {device}, {torch.get_num_threads()} threads")
    print("| side | images/s |\n| --- | ---: |")
    print(f"| one image at a time | {settings.images / slow:.1f} |")
    print(f"| {settings.images} images at once | {settings.images / fast:.1f} |")
    print(json.dumps({"ratio": slow / fast, "images_per_second": settings.images / fast}))


if __name__ == "__main__":
    run_script(main, Settings)
