"""A training step, with teacher forcing or self-critical, on one process or several; and the validation loss."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

from common.distributed import all_reduce_sum, rank, world_size
from datasets import Batch, CaptionDataset, Example, collate, in_order, make_batches, make_loader
from decoding.sampling import sample
from decoding.settings import training_decoding
from models import Captioner
from modules.decoders import DecoderOutput, map_tensors
from text.cider import CiderD
from text.vocabulary import END, START
from training.losses import TEMPERATURE, captioning_loss, grounding_loss, self_critical_loss
from utils import Runtime, copy_to_device

if TYPE_CHECKING:
    from train import Settings


def train_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    settings: Settings,
    runtime: Runtime,
    counts: tuple[int, int] | None = None,
    sampling_prob: float = 0.0,
) -> tuple[float, int]:
    """Take one step of teacher forcing on a batch; return the cross-entropy summed over its words, and their number.

    Args:
        network: a Captioner, or one wrapped in DistributedDataParallel.
        counts: words and captions of this step over all processes; None: those of the batch.
        sampling_prob: probability of feeding back a word of the model (`Decoder.forward`).

    Raises FloatingPointError if the loss or the gradient is not finite; the weights are unusable then.
    """
    words, captions = counts or batch.counts()

    def micro_batch_loss(micro_batch: Batch) -> tuple[Tensor, Tensor, int]:
        micro_batch = on_device(micro_batch, runtime)
        output = forward(network, micro_batch, runtime, sampling_prob)
        loss, cross_entropy = captioning_loss(output, micro_batch.lengths, settings, words, captions)
        if settings.grounding_weight:
            assert micro_batch.object_boxes is not None and micro_batch.named is not None
            grounding = grounding_loss(output, micro_batch.object_boxes, micro_batch.named)
            loss = loss + settings.grounding_weight * grounding / words
        return loss, cross_entropy, micro_batch.counts()[0]

    cross_entropy, count = optimize(network, optimizer, batch, settings, micro_batch_loss)
    decoder = unwrap(network).decoder
    if decoder.baseline is not None and decoder.training:
        decoder.update_baseline(all_reduce_sum([cross_entropy])[0] / words)
    return cross_entropy, count


def scst_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    settings: Settings,
    runtime: Runtime,
    reward: CiderD,
    counts: tuple[int, int] | None = None,
) -> tuple[float, int]:
    """Take one step of self-critical training on captions that the captioner samples for the images of a batch.

    Returns the sum of their rewards and their number. Arguments and errors are those of `train_step`.
    """
    words, _ = counts or batch.counts()
    captioner = unwrap(network)

    def micro_batch_loss(micro_batch: Batch) -> tuple[Tensor, Tensor, int]:
        sampled, rewards = sample_captions(captioner.eval(), micro_batch, reward, settings.max_length, runtime)
        captioner.train()  # without dropout, the rewards are soon memorized
        captioner.decoder.take_expectation()  # rewards do not train the samples of hard attention
        output = forward(network, sampled, runtime)
        loss = self_critical_loss(output, sampled.lengths, rewards, words)
        return loss, copy_to_device(rewards.sum(), loss.device), rewards.numel()

    return optimize(network, optimizer, batch, settings, micro_batch_loss)


def forward(network: nn.Module, batch: Batch, runtime: Runtime, sampling_prob: float = 0.0) -> DecoderOutput:
    """Run teacher forcing on a batch, whose inputs are copied to the device."""
    batch = on_device(batch, runtime)
    with runtime.autocast():
        return network(batch.inputs, batch.words, batch.lengths, sampling_prob, batch.boxes)


def on_device(batch: Batch, runtime: Runtime) -> Batch:
    """Return a batch with its inputs and objects on the device; tensors that are there already are not copied."""
    parts = (batch.inputs, batch.boxes, batch.object_boxes, batch.named)
    inputs, boxes, object_boxes, named = map_tensors(lambda x: copy_to_device(x, runtime.device), parts)
    return replace(batch, inputs=inputs, boxes=boxes, object_boxes=object_boxes, named=named)


def optimize(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    settings: Settings,
    micro_batch_loss: Callable[[Batch], tuple[Tensor, Tensor, int]],
) -> tuple[float, int]:
    """Accumulate the gradient over the micro-batches of a batch, clip it and take the optimizer's step.

    `micro_batch_loss` returns the loss of a micro-batch, a sum to report and a count. Returns the total of both. All
    work of the step is queued on a GPU before the single wait for its numbers.

    Raises FloatingPointError, after the optimizer's step, if the loss or the norm of the gradient is not finite.
    """
    losses, totals, count = [], [], 0
    optimizer.zero_grad(set_to_none=True)
    micro_batches = batch.micro_batches(settings.gradient_accumulation_steps)
    for i, micro_batch in enumerate(micro_batches, start=1):
        # Processes average their gradients once per step, at the last micro-batch.
        sync_context = contextlib.nullcontext()
        if isinstance(network, nn.parallel.DistributedDataParallel) and i < len(micro_batches):
            sync_context = network.no_sync()
        with sync_context:
            loss, total, micro_batch_count = micro_batch_loss(micro_batch)
            (loss * world_size()).backward()
        losses.append(loss.detach())
        totals.append(total.detach())
        count += micro_batch_count
    norm = get_total_norm([param.grad for param in network.parameters() if param.grad is not None])
    if settings.grad_clip:
        clip_grads_with_norm_(network.parameters(), settings.grad_clip, norm)
    optimizer.step()
    norm, *numbers = torch.stack([norm, *losses, *totals]).tolist()  # the one wait for the device
    losses, totals = numbers[: len(losses)], numbers[len(losses) :]
    if not math.isfinite(sum(losses)):
        raise FloatingPointError(f"the loss is {sum(losses)}")
    if not math.isfinite(norm):
        raise FloatingPointError(f"the norm of the gradient is {norm}")
    return sum(totals), count


def unwrap(network: nn.Module) -> Captioner:
    """Return the captioner of a network that may be wrapped in DistributedDataParallel."""
    captioner = network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network
    assert isinstance(captioner, Captioner)
    return captioner


def sample_captions(
    captioner: Captioner, batch: Batch, reward: CiderD, max_length: int, runtime: Runtime
) -> tuple[Batch, Tensor]:
    """Sample captions for the images of a batch; return them as a Batch, and their rewards (B, C).

    Each image gets as many captions as the largest number of references in the batch, and at least two.
    """
    count = max(2, batch.words.shape[1])
    sampling = training_decoding(samples=count, max_length=max_length, temperature=TEMPERATURE)
    with torch.no_grad(), runtime.autocast():
        copied = on_device(batch, runtime)
        encoded = captioner.encode(copied.inputs, copied.boxes)
        sampled = sample(captioner.decoder, encoded.regions, sampling, mask=encoded.mask).tolist()
    captions = [[[START, *cut_at_end(words)] for words in image] for image in sampled]
    boxes = [None] * len(captions) if batch.boxes is None else batch.boxes
    examples = map(Example, batch.indices, batch.inputs, captions, boxes)
    new_batch = collate(list(examples))
    references = dict(zip(batch.indices, batch.captions(), strict=True))
    pairs = zip(new_batch.indices, new_batch.captions(), strict=True)
    return new_batch, torch.tensor([reward(references[index], candidates) for index, candidates in pairs])


def cut_at_end(words: list[int]) -> list[int]:
    """Return word ids up to the first <end>, which is kept; all of them if there is none."""
    return words[: words.index(END) + 1] if END in words else words


@torch.no_grad()
def validation_loss(captioner: Captioner, validation: CaptionDataset, batch_size: int, runtime: Runtime) -> float:
    """Return the mean cross-entropy of the words of all validation captions, without label smoothing."""
    captioner.eval()
    losses, count = [], 0
    progress = tqdm(total=len(validation), desc="validation loss", unit="image", leave=False, disable=rank() > 0)
    with progress as bar:
        for batch in make_loader(validation, make_batches(in_order(len(validation)), batch_size)):
            output = forward(captioner, batch, runtime)
            losses.append(nn.functional.cross_entropy(output.logits.float(), output.targets, reduction="sum"))
            count += batch.counts()[0]
            bar.update(len(batch.indices) * world_size())
    total = sum(torch.stack(losses).tolist()) if losses else 0.0  # one wait for a GPU
    total, count = all_reduce_sum([total, count])
    return total / count
