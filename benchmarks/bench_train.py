"""Captions/s of a training step against a straightforward loop and the machine's limit: benchmarks/bench_train.py

Both sides train the decoder on the regions of a frozen encoder, with the same images, weights, words and optimizer.
The straightforward loop is that of most tutorials: it runs the encoder in every step, once per caption, projects the
attention's keys again at each word and computes logits word by word, all in fp32. Images and captions are random, with
caption lengths distributed as in Flickr8k. The limit assumes that the operations torch counts in a step run at the rate
of a large matmul.

Shapes: B images, C captions of an image, N = B C captions in total, n of them unfinished, T words, R regions; widths D
of a region, A of the attention, E of a word embedding, H of the hidden state.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from datasets import Batch, Example, collate
from models import Captioner
from modules.attention import SoftAttention
from modules.show_attend_tell import ShowAttendTell
from text.vocabulary import END, SPECIAL_TOKENS, START, Vocabulary
from training.losses import captioning_loss
from training.optim import make_optimizer
from utils import PRECISIONS, BaseSettings, Runtime, choose_runtime, run_script, setting


@dataclass(frozen=True, kw_only=True)
class Settings(BaseSettings):
    """Time a training step against a straightforward loop, after checking that both compute the same."""

    encoder: str = "resnet101"  # torchvision network, with random weights
    image_size: int = 256  # side of the images in pixels
    batch_size: int = 32  # images per step
    captions_per_image: int = 5  # captions per image
    vocab_size: int = 2541  # words in the vocabulary; Flickr8k's with min_word_freq 5
    steps: int = 10  # timed steps of the cached side
    fine_tune_steps: int = 1  # timed steps that also train the encoder; 0: skip
    reference_steps: int = 1  # timed steps of the straightforward loop
    precision: str = setting("auto", choices=PRECISIONS)  # precision of the cached side
    device: str = "auto"  # auto, cpu or cuda
    seed: int = 0  # seed of weights, images and captions


# --------------------------------------------------------------------------------------- the straightforward loop


class CaptionRows(NamedTuple):
    """A batch for the straightforward loop: one row per caption."""

    images: Tensor  # (N, 3, h, w) uint8, each image once per caption
    words: Tensor  # (N, T + 1)
    lengths: Tensor  # (N,)


def straightforward_loss(captioner: Captioner, rows: CaptionRows, settings: train.Settings) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy and the loss of train.py as most tutorials do."""
    decoder = captioner.decoder
    assert isinstance(decoder, ShowAttendTell)
    attention, cell_layer = decoder.attention, decoder.cell
    assert isinstance(attention, SoftAttention) and attention.gate is not None
    with torch.no_grad():
        features = captioner.encoder(rows.images)
    regions = captioner.region_layer(features)  # (N, R, D)
    lengths, order = rows.lengths.sort(descending=True)
    regions, words = regions[order], rows.words[order]
    hidden, cell = (part.squeeze(1) for part in decoder.init_state(regions))  # (N, H)
    embedded = decoder.dropout(decoder.embedding(words))  # (N, T + 1, E)
    with torch.device("meta"):  # torch's cell, called with our weights
        lstm_cell = nn.LSTMCell(
            cell_layer.words.in_features + cell_layer.context.in_features, cell_layer.hidden.in_features
        )
    cell_weights = {
        "weight_ih": torch.cat([cell_layer.words.weight, cell_layer.context.weight], dim=1),
        "weight_hh": cell_layer.hidden.weight,
        "bias_ih": cell_layer.words.bias,
        "bias_hh": torch.zeros_like(cell_layer.words.bias),
    }
    steps = int(lengths[0])
    predictions = regions.new_zeros(len(words), steps, decoder.output.out_features)
    alphas = regions.new_zeros(len(words), steps, regions.shape[1])
    for t in range(steps):
        n = int((lengths > t).sum())
        hidden, cell = hidden[:n], cell[:n]
        keys = attention.keys(regions[:n])  # (n, R, A)
        energy = keys + attention.query(hidden).unsqueeze(1)
        alpha = attention.score(energy.tanh()).squeeze(2).softmax(dim=1)  # (n, R)
        context = (alpha.unsqueeze(2) * regions[:n]).sum(dim=1)  # (n, D)
        context = attention.gate(hidden).sigmoid() * context
        word = embedded[:n, t]
        inputs = torch.cat([word, context], dim=1)
        hidden, cell = functional_call(lstm_cell, cell_weights, (inputs, (hidden, cell)))
        output = word + decoder.hidden_proj(hidden) + decoder.context_proj(context)
        predictions[:n, t] = decoder.output(decoder.dropout(output.tanh()))
        alphas[:n, t] = alpha
    mask = torch.arange(steps, device=lengths.device) < lengths.unsqueeze(1)
    cross_entropy = functional.cross_entropy(predictions[mask], words[:, 1 : steps + 1][mask])
    coverage_penalty = (1 - alphas.sum(dim=1)).square().mean()
    return cross_entropy, cross_entropy + settings.doubly_stochastic * coverage_penalty


def straightforward_step(
    captioner: Captioner, optimizer: torch.optim.Optimizer, rows: CaptionRows, settings: train.Settings
) -> float:
    """Run one training step of the straightforward loop and return its cross-entropy."""
    cross_entropy, loss = straightforward_loss(captioner, rows, settings)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    clip_grad_norm_(captioner.parameters(), settings.grad_clip)
    optimizer.step()
    return cross_entropy.item()


# -------------------------------------------------------------------------------------------------- inputs


def random_captions(settings: Settings, generator: torch.Generator) -> list[list[list[int]]]:
    """Generate captions of random words for each image, with lengths of mean 11.8 and deviation 3.9 as in Flickr8k."""
    captions = []
    for _ in range(settings.batch_size):
        lengths = torch.randn(settings.captions_per_image, generator=generator) * 3.9 + 11.8
        image_captions = []
        for length in lengths.round().clamp(3, 36).int().tolist():
            words = torch.randint(len(SPECIAL_TOKENS), settings.vocab_size, (length,), generator=generator)
            image_captions.append([START, *words.tolist(), END])
        captions.append(image_captions)
    return captions


def make_captioner(
    settings: Settings, train_settings: train.Settings, images: Tensor, device: torch.device
) -> Captioner:
    """Build a captioner with random weights and matching BatchNorm statistics.

    Without one pass in training mode, a hundred random layers would overflow.
    """
    captioner = Captioner(
        train_settings,
        Vocabulary([*SPECIAL_TOKENS, *map(str, range(settings.vocab_size - len(SPECIAL_TOKENS)))]),
        image_size=settings.image_size,
        resize="squash",
    )
    captioner.to(device).train()
    for module in captioner.encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        captioner.encoder(images[:4].to(device))
    return captioner


def extract_features(captioner: Captioner, images: Tensor, device: torch.device) -> Tensor:
    """Return the cached features (B, R, F) float16 of images (B, 3, h, w)."""
    with torch.no_grad():
        return captioner.encoder(images.to(device)).half().cpu()


def caption_rows(batch: Batch, device: torch.device) -> CaptionRows:
    """Return the rows of a batch in which every image has C captions."""
    images = batch.inputs.repeat_interleave(batch.words.shape[1], dim=0).to(device)
    return CaptionRows(images, batch.words.flatten(0, 1).to(device), batch.lengths.flatten().to(device))


# ---------------------------------------------------------------------------------------------- measurements


def seconds_per_call(function: Callable[[], object], count: int, device: torch.device) -> float:
    """Return the median seconds of `count` calls after an untimed one; NaN if `count` is 0."""
    times = []
    for _ in range(count + 1):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[count // 2] if count else math.nan


def matmul_flops(runtime: Runtime, side: int = 4096) -> float:
    """Return the floating-point operations per second of a large matmul, the upper limit of a step."""
    a, b = torch.randn(2, side, side, device=runtime.device, dtype=runtime.dtype)
    return 2 * side**3 / seconds_per_call(lambda: a @ b, 5, runtime.device)


def copy_bandwidth(device: torch.device, size: int = 2**28) -> float:
    """Return the bytes per second of a large copy, counting reads and writes."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_per_call(lambda: target.copy_(source), 5, device)


def count_flops(function: Callable[[], object]) -> int:
    """Count the floating-point operations of a call's matmuls and convolutions, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def check_agreement(
    captioner: Captioner, batch: Batch, rows: CaptionRows, settings: train.Settings, device: torch.device
) -> None:
    """Assert that both sides compute the same loss and gradient."""

    def decoder_gradient(loss: Tensor) -> Tensor:
        captioner.zero_grad()
        loss.backward()
        gradients = [param.grad.flatten() for param in captioner.decoder.parameters() if param.grad is not None]
        return torch.cat(gradients).double()

    output = captioner(batch.inputs.to(device), batch.words, batch.lengths)
    loss, _ = captioning_loss(output, batch.lengths, settings, *batch.counts())
    _, reference_loss = straightforward_loss(captioner, rows, settings)
    difference = abs(loss.item() - reference_loss.item())
    gradient, reference_gradient = decoder_gradient(loss), decoder_gradient(reference_loss)
    cosine = functional.cosine_similarity(gradient, reference_gradient, dim=0).item()
    print(f"losses agree within {difference:.1e} (cached features are float16), cosine of the gradients {cosine:.6f}")
    assert difference < 1e-2 and cosine > 0.999, "the two sides do not agree"


class Timing(NamedTuple):
    """A row of the table."""

    side: str
    dtype: torch.dtype
    seconds: float  # per step
    flops: int = 0  # per step; 0: not counted


def print_table(timings: list[Timing], images: int, captions: int, limit: float) -> None:
    """Print the timings of steps of `images` images and `captions` captions; `limit` is in operations per second."""
    print("| side | precision | s/step | captions/s | images/s | GFLOP/step | of the limit |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for side, dtype, seconds, flops in timings:
        share = f"{flops / 1e9:.0f} | {flops / seconds / limit:.0%}" if flops else "- | -"
        rates = f"{seconds:.3f} | {captions / seconds:.1f} | {images / seconds:.1f}"
        print(f"| {side} | {str(dtype).removeprefix('torch.')} | {rates} | {share} |")


def main(settings: Settings) -> None:
    """Check that both sides agree, time them, and print a table and one line of JSON."""
    runtime = choose_runtime(settings.device, settings.precision)
    device = runtime.device
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    frozen = train.Settings(encoder=settings.encoder, encoder_weights="", dropout=0.0, label_smoothing=0.0)
    shape = (settings.batch_size, 3, settings.image_size, settings.image_size)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    captioner = make_captioner(settings, frozen, images, device)
    optimizer = make_optimizer(captioner, frozen)
    captioner.train()  # from here on the encoder is frozen
    captions = random_captions(settings, generator)
    start = time.perf_counter()
    features = extract_features(captioner, images, device)
    images_per_second = len(images) / (time.perf_counter() - start)
    cached = collate([Example(i, features[i], captions[i]) for i in range(len(images))])
    uncached = collate([Example(i, images[i], captions[i]) for i in range(len(images))])
    rows = caption_rows(uncached, device)
    check_agreement(captioner, cached, rows, frozen, device)

    limit = matmul_flops(runtime)
    step = partial(train.train_step, captioner, optimizer, cached, frozen, runtime)
    flops = count_flops(step)
    seconds = seconds_per_call(step, settings.steps, device)
    reference_step = partial(straightforward_step, captioner, optimizer, rows, frozen)
    reference_seconds = seconds_per_call(reference_step, settings.reference_steps, device)
    timings = [
        Timing("straightforward loop", torch.float32, reference_seconds),
        Timing("train.py, cached features", runtime.dtype, seconds, flops),
    ]
    count = rows.lengths.numel()
    result = {
        "ratio": reference_seconds / seconds,
        "captions_per_second": count / seconds,
        "reference_captions_per_second": count / reference_seconds,
        "share_of_limit": flops / seconds / limit,
    }
    if settings.fine_tune_steps:
        fine_tuned = replace(frozen, fine_tune_encoder=True)
        optimizer = make_optimizer(captioner, fine_tuned)
        step = partial(train.train_step, captioner, optimizer, uncached, fine_tuned, runtime)
        flops = count_flops(step)
        seconds = seconds_per_call(step, settings.fine_tune_steps, device)
        timings.append(Timing("train.py --fine_tune_encoder", runtime.dtype, seconds, flops))
        result["fine_tuned_images_per_second"] = len(images) / seconds
        result["fine_tuned_share_of_limit"] = flops / seconds / limit

    print(f"{settings.encoder} at {settings.image_size} pixels, {features.shape[1]} regions, {count} captions a step,")
    print(
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"features extracted once at {images_per_second:.1f} images/s"
    )
    print(f"limit: {limit / 1e9:.0f} GFLOP/s in a matmul, {copy_bandwidth(device) / 1e9:.1f} GB/s in a copy")
    print_table(timings, len(images), count, limit)
    print(json.dumps(result))


if __name__ == "__main__":
    run_script(main, Settings)
