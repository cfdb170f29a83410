"""Captions/s of a training step against the straightforward loop and the machine's limit: benchmarks/bench_train.py

Both sides train the decoder on the frozen encoder's regions of the same photos, with the same weights, words and
optimizer. The straightforward loop is that of most tutorials: the encoder runs in the step, once for each caption,
the attention's keys are projected again at each word, logits are computed word by word, all in fp32. Photos and
captions are random; the captions' lengths are distributed like Flickr8k's. The limit is a large matrix product: its
operations a second, times the operations that torch counts in a step.
"""

import json
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from datasets import collate
from models import build_captioner
from optimization import captioning_loss, make_optimizer
from utils import choose_device, choose_dtype, run_script
from vocabulary import END, SPECIAL_WORDS, START


@dataclass(frozen=True)
class Settings:
    """Time a training step against the straightforward loop, after checking that both compute the same."""

    encoder: str = "resnet101"  # torchvision network, with random weights
    image_size: int = 256  # side of the photos in pixels
    batch_size: int = 32  # images a step
    captions: int = 5  # of each image
    vocabulary: int = 2541  # words; Flickr8k's at min_word_freq 5
    steps: int = 10  # counted steps of the cached side
    fine_tune_steps: int = 1  # counted steps that train the encoder, too; 0 leaves them out
    reference_steps: int = 1  # counted steps of the straightforward loop
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of the cached side
    device: str = "auto"  # auto, cpu or cuda
    seed: int = 0  # of everything random


def straightforward_loss(captioner, images, words, lengths, settings):
    """The loss of train.py, computed the way of most tutorials: images and words are one row a caption."""
    decoder = captioner.decoder
    with torch.no_grad():
        features = captioner.encoder(images)
    regions = captioner.region_layer(features)  # (N, R, D)
    lengths, order = lengths.sort(descending=True)
    regions, words = regions[order], words[order]
    hidden, memory = (part.squeeze(1) for part in decoder.first_state(regions))  # (N, H)
    embedded = decoder.dropout(decoder.embedding(words))  # (N, T + 1, E)
    cell = decoder.cell
    with torch.device("meta"):  # torch's own cell, on our weights
        lstm_cell = nn.LSTMCell(cell.words.in_features + cell.context.in_features, cell.hidden.in_features)
    cell_weights = {
        "weight_ih": torch.cat([cell.words.weight, cell.context.weight], dim=1),
        "weight_hh": cell.hidden.weight,
        "bias_ih": cell.words.bias,
        "bias_hh": torch.zeros_like(cell.words.bias),
    }
    steps = int(lengths[0])
    predictions = regions.new_zeros(len(words), steps, decoder.output.out_features)
    looked = regions.new_zeros(len(words), steps, regions.shape[1])
    for t in range(steps):
        n = int((lengths > t).sum())
        hidden, memory = hidden[:n], memory[:n]
        keys = decoder.attention.keys(regions[:n])  # (n, R, A)
        energy = keys + decoder.attention.query(hidden).unsqueeze(1)
        weights = decoder.attention.score(energy.tanh()).squeeze(2).softmax(dim=1)  # (n, R)
        context = (weights.unsqueeze(2) * regions[:n]).sum(dim=1)  # (n, D)
        context = decoder.attention.gate(hidden).sigmoid() * context
        word = embedded[:n, t]
        rows = torch.cat([word, context], dim=1)
        hidden, memory = functional_call(lstm_cell, cell_weights, (rows, (hidden, memory)))
        output = word + decoder.hidden_output(hidden) + decoder.context_output(context)
        predictions[:n, t] = decoder.output(decoder.dropout(output.tanh()))
        looked[:n, t] = weights
    real = torch.arange(steps, device=lengths.device) < lengths.unsqueeze(1)
    word_loss = functional.cross_entropy(predictions[real], words[:, 1 : steps + 1][real])
    return word_loss, word_loss + settings.doubly_stochastic * (1 - looked.sum(dim=1)).square().mean()


def straightforward_step(captioner, optimizer, images, words, lengths, settings):
    """One training step of the straightforward loop."""
    word_loss, loss = straightforward_loss(captioner, images, words, lengths, settings)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    clip_grad_norm_(captioner.parameters(), settings.gradient_clip)
    optimizer.step()
    return word_loss.item()


def random_captions(settings, generator):
    """Captions of random words for each image; lengths of mean 11.8 and deviation 3.9 as Flickr8k's."""
    captions = []
    for _ in range(settings.batch_size):
        sizes = (torch.randn(settings.captions, generator=generator) * 3.9 + 11.8).round().clamp(3, 36).int()
        captions.append(
            [
                [
                    START,
                    *torch.randint(len(SPECIAL_WORDS), settings.vocabulary, (n,), generator=generator).tolist(),
                    END,
                ]
                for n in sizes.tolist()
            ]
        )
    return captions


def seconds_each(step, count, device):
    """Median seconds of a call after one that is not counted: NaN for none."""
    times = []
    for _ in range(count + 1):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[count // 2] if count else math.nan


def operations_per_second(device, dtype, side=4096):
    """What a large matrix product reaches: the limit of all that a step computes."""
    one, other = torch.randn(2, side, side, device=device, dtype=dtype)
    return 2 * side**3 / seconds_each(lambda: one @ other, 5, device)


def bytes_per_second(device, size=2**28):
    """What a large copy reaches, counted as read and written."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_each(lambda: target.copy_(source), 5, device)


def operations(step):
    """The operations of a step's matrix products and convolutions, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def main(settings):
    """Check that both sides agree, time them, print a table and one line of JSON."""
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.precision, device)
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    plan = train.Settings(encoder=settings.encoder, encoder_weights="", dropout=0.0, label_smoothing=0.0)
    captioner = build_captioner(asdict(plan), settings.vocabulary, settings.image_size, "", "squash")
    captioner.to(device).train()

    shape = (settings.batch_size, 3, settings.image_size, settings.image_size)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    # One pass in training mode gives BatchNorm statistics that fit: without, a hundred random layers overflow.
    for module in captioner.encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        captioner.encoder(images[:4].to(device))
    optimizer = make_optimizer(captioner, plan)
    captioner.train()  # the encoder is frozen from here on
    captions = random_captions(settings, generator)
    with torch.inference_mode():
        start = time.perf_counter()
        regions = captioner.encoder(images.to(device)).half().cpu()
        extraction = len(images) / (time.perf_counter() - start)
    batch = collate([(i, regions[i].clone(), captions[i]) for i in range(len(images))])
    plain = collate([(i, images[i], captions[i]) for i in range(len(images))])
    rows = plain.lengths.numel()
    words, lengths = plain.words.flatten(0, 1).to(device), plain.lengths.flatten().to(device)
    repeated = plain.images.repeat_interleave(settings.captions, dim=0).to(device)

    def gradient(loss):
        captioner.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in captioner.decoder.parameters()]).double()

    outputs = captioner(batch.images.to(device), batch.words.to(device), batch.lengths)
    ours = captioning_loss(outputs, batch.lengths, plan, *batch.totals())[0]
    theirs = straightforward_loss(captioner, repeated, words, lengths, plan)[1]
    gap = abs(ours.item() - theirs.item())
    our_gradient, their_gradient = gradient(ours), gradient(theirs)
    direction = functional.cosine_similarity(our_gradient, their_gradient, dim=0).item()
    print(f"same loss within {gap:.1e} (cached features are float16), cosine of the two gradients {direction:.6f}")
    assert gap < 1e-2 and direction > 0.999, "the two sides do not agree"

    def step():
        return train.train_step(captioner, optimizer, batch, plan, device, dtype)

    def fine_tuning_step():
        return train.train_step(captioner, fine_tuning_optimizer, plain, tuned, device, dtype)

    limit = operations_per_second(device, dtype)
    counted = operations(step)
    ours = seconds_each(step, settings.steps, device)
    theirs = seconds_each(
        lambda: straightforward_step(captioner, optimizer, repeated, words, lengths, plan),
        settings.reference_steps,
        device,
    )
    rows_of_table = [
        ("straightforward loop", "fp32", theirs, None),
        ("train.py, cached features", dtype, ours, counted),
    ]
    if settings.fine_tune_steps:
        tuned = replace(plan, fine_tune_encoder=True)
        fine_tuning_optimizer = make_optimizer(captioner, tuned)
        counted_tuning = operations(fine_tuning_step)
        tuning = seconds_each(fine_tuning_step, settings.fine_tune_steps, device)
        rows_of_table.append(("train.py --fine_tune_encoder", dtype, tuning, counted_tuning))

    print(
        f"{settings.encoder} at {settings.image_size} pixels, {batch.images.shape[1]} regions, {rows} captions a step,"
    )
    print(
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"extracting the features once: {extraction:.1f} images/s"
    )
    print(f"limit: {limit / 1e9:.0f} GFLOP/s in a product, {bytes_per_second(device) / 1e9:.1f} GB/s in a copy")
    print("| side | precision | s/step | captions/s | images/s | GFLOP/step | of the limit |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for side, precision, seconds, count in rows_of_table:
        share = f"{count / 1e9:.0f} | {count / seconds / limit:.0%}" if count else "- | -"
        rates = f"{seconds:.3f} | {rows / seconds:.1f} | {len(images) / seconds:.1f}"
        print(f"| {side} | {str(precision).removeprefix('torch.')} | {rates} | {share} |")
    result = {
        "ratio": theirs / ours,
        "captions_per_second": rows / ours,
        "reference_captions_per_second": rows / theirs,
        "share_of_limit": counted / ours / limit,
    }
    if settings.fine_tune_steps:
        result["fine_tuned_images_per_second"] = len(images) / tuning
        result["fine_tuned_share_of_limit"] = counted_tuning / tuning / limit
    print(json.dumps(result))


if __name__ == "__main__":
    run_script(main, Settings)
