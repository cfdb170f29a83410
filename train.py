"""Train a captioner: python train.py --data_folder data/flickr8k --run_folder runs/flickr8k"""

import contextlib
import math
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from datasets import collate, epoch_order, make_loader, open_split, place_of, split_order
from eval import Settings as EvaluationSettings
from eval import evaluate
from optimization import TEMPERATURE, captioning_loss, follow, learning_rate_factor, self_critical_loss
from rewards import CiderReward
from runs import draw_runs, prepare_run, start_files, start_run
from search import sample
from utils import (
    InputError,
    Stopped,
    add_up,
    append_log,
    autocast,
    choose_dtype,
    draw_curves,
    first_line,
    processes,
    rank,
    require_at_least,
    require_below_one,
    require_writable,
    run_script,
    stop_signals,
    take_from_first,
    world_size,
    write_tensorboard,
)
from vocabulary import END, START


@dataclass(frozen=True)
class Settings:
    """Train an image captioner. Edit a value here or give it as flag: python train.py --batch_size 64"""

    data_folder: str = "data/shapes"  # what create_input_files.py wrote
    run_folder: str = "runs/shapes"  # where checkpoints, log and curves go
    overwrite: bool = False  # start anew in a run folder that holds a run
    resume: str = ""  # a last.pt: continue that run exactly, in its folder and with its settings
    init_from: str = ""  # a best.pt: a new run from its weights, words and model settings
    look: tuple[str, ...] = ()  # run folders: draw their curves into one picture and stop

    encoder: str = "resnet101"  # any torchvision classification network
    encoder_layer: str = ""  # layer whose grid the decoder sees; empty: the network's last grid
    encoder_weights: str = "imagenet"  # imagenet, the path of a torchvision state dict, or empty for random
    fine_tune_encoder: bool = False  # train the encoder too; frozen, its features are computed once and cached
    fine_tune_from: str = ""  # first of its parts to be trained then, such as layer3; empty: all of it
    grid_size: int = 0  # pool the features to a grid of this side (the paper: 14); 0 keeps the network's own

    region_dim: int = 512  # units of a dense layer on the features; 0: none, the decoder sees them as they are
    graph_layers: int = 0  # graph attention between the regions, before the decoder; 0: none
    graph_neighbours: int = 4  # regions that each hears from for looking alike, besides those around it
    graph_heads: int = 4  # attention heads of a graph layer
    cell: Literal["lstm", "gru", "rnn"] = "lstm"  # recurrent cell of the decoder
    attention: Literal["soft", "dot", "hard", "none"] = "soft"  # none: the image only sets the first state
    embedding_size: int = 512  # units of a word
    attention_size: int = 512  # units of the attention
    hidden_size: int = 512  # units of the recurrent cell
    word_vectors: str = ""  # text file of word vectors (GloVe, word2vec) that the words start from
    freeze_word_vectors: bool = False  # leave all words as they start, those without a vector too
    dropout: float = 0.5  # on words, regions and the output layer

    objective: Literal["cross_entropy", "cider"] = "cross_entropy"  # of true captions; or CIDEr of captions it draws
    epochs: int = 8  # passes over the training images
    batch_size: int = 8  # images a step, each with all its captions; over all processes
    accumulate: int = 1  # parts that a batch is computed in: less memory, the same gradient but for BatchNorm
    mirror: bool = False  # show half of the images as in a mirror, "left" and "right" exchanged in their captions
    learning_rate: float = 1e-3  # of the decoder (Adam)
    encoder_learning_rate: float = 1e-4  # of the encoder, where it is trained
    warm_up: float = 0.05  # share of all steps over which both learning rates rise to these values
    schedule: Literal["cosine", "step"] = "cosine"  # meanwhile they fall to 0 along a cosine, or by a factor an epoch
    learning_rate_decay: float = 0.8  # that factor
    gradient_clip: float = 5.0  # norm of the gradient at most; 0: as it is
    doubly_stochastic: float = 0.0  # weight of the term that asks to look everywhere once
    label_smoothing: float = 0.1  # share of a target's probability that is spread over all words
    scheduled_sampling: float = 0.0  # share of words, at the end, that follow the model's own word and not the true one
    weight_average: float = 0.999  # decay of the moving average of weights that best.pt holds; 0: none
    score: Literal["cider", "bleu_4"] = "cider"  # validation score that picks best.pt and stops early
    patience: int = 5  # stop after this many epochs without a better score
    max_length: int = 30  # words at most of a caption generated for validation, or for the objective cider
    save_minutes: float = 10.0  # write last.pt this often within an epoch, too

    seed: int = 0  # of weights, order and dropout
    workers: int = 0  # processes that load batches; 0: the main one
    in_memory: bool = False  # keep all photos in memory, where --fine_tune_encoder reads photos
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # bf16 mixed precision where the hardware has it
    device: str = "auto"  # auto, cpu or cuda


def draw_captions(captioner, batch, reward, max_length, device, dtype):
    """A Batch of captions that a captioner draws itself for the images of another, and their rewards (B, C).

    There are as many of each image as any of them has true ones, and at least two.
    """
    number = max(2, batch.words.shape[1])
    with torch.inference_mode(), autocast(device, dtype):
        regions = captioner.regions(batch.images.to(device, non_blocking=True))
        drawn = sample(captioner.decoder, regions, number, max_length, TEMPERATURE).tolist()
    drawn = [[[START, *words[: words.index(END) + 1 if END in words else None]] for words in image] for image in drawn]
    own = collate(list(zip(batch.indices, batch.images, drawn, strict=True)))
    true = dict(zip(batch.indices, batch.captions(), strict=True))
    rewards = [reward(true[index], captions) for index, captions in zip(own.indices, own.captions(), strict=True)]
    return own, torch.tensor(rewards)


def train_step(network, optimizer, batch, settings, device, dtype, totals=None, sampling=0.0, reward=None):
    """One step on a `datasets.Batch`; returns the cross-entropy of its words, added up, and their number.

    `network` is a Captioner, or one in DistributedDataParallel: then `totals` are the words and captions of all
    processes. `sampling` is that of `decoders.Decoder.forward`. With a `reward` the step is on captions that the
    captioner draws itself, and returns minus their rewards, added up, and their number. Raises FloatingPointError
    where the loss is not finite.
    """
    words, captions = totals or batch.totals()
    sum_of_losses, number = 0.0, 0
    optimizer.zero_grad(set_to_none=True)
    parts = batch.split(settings.accumulate)
    for i, part in enumerate(parts, start=1):
        if reward:
            captioner = network.module if world_size() > 1 else network
            part, rewards = draw_captions(captioner.eval(), part, reward, settings.max_length, device, dtype)
            captioner.train()  # dropout: without it, rewards are soon learned by heart
            captioner.decoder.attention.eval()  # hard attention looks at the expectation: no reward tells of its draws
        images = part.images.to(device, non_blocking=True)
        numbers = part.words.to(device, non_blocking=True)
        # Between processes gradients are averaged, once a step.
        wait = network.no_sync() if world_size() > 1 and i < len(parts) else contextlib.nullcontext()
        with wait:
            with autocast(device, dtype):
                outputs = network(images, numbers, part.lengths, sampling)
            if reward:
                loss = self_critical_loss(outputs, part.lengths, rewards, words)
                sum_of_losses, number = sum_of_losses - rewards.sum().item(), number + rewards.numel()
            else:
                loss, cross_entropy = captioning_loss(outputs, part.lengths, settings, words, captions)
                sum_of_losses, number = sum_of_losses + cross_entropy.item(), number + part.totals()[0]
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"the loss is {loss.item()}")
            (loss * world_size()).backward()
    if settings.gradient_clip:
        clip_grad_norm_(network.parameters(), settings.gradient_clip)
    optimizer.step()
    if outputs.baseline is not None:
        follow(outputs.baseline, add_up([sum_of_losses])[0] / words)
    return sum_of_losses, number


def train_one_epoch(run, training, device, dtype, caught, reward):
    """What is left of a pass over the training images with all their captions; adds up in `run` as it goes.

    A signal in the list `caught`, of `utils.stop_signals`, ends the program before the next step, with all steps until
    then in last.pt. `reward` is that of `train_step`.
    """
    settings = run.settings
    run.captioner.train()
    order = epoch_order(len(training), settings.seed, run.epoch, settings.mirror)
    batches = split_order(order, settings.batch_size)
    loader = make_loader(training, batches[run.step :], settings.workers)
    done = sum(len(training.captions[place_of(item)]) for batch in batches[: run.step] for item in batch)
    start = saved = time.perf_counter()
    seconds_before = run.seconds
    with tqdm(
        total=training.captions.total(),
        initial=done,
        desc=f"epoch {run.epoch + 1}",
        unit="caption",
        leave=False,
        disable=rank() > 0,
    ) as bar:
        for batch in loader:
            save_now = rank() == 0 and time.perf_counter() - saved > settings.save_minutes * 60
            words, captions, stop, save_now = add_up([*batch.totals(), bool(caught), save_now])
            if stop or save_now:
                run.save("last.pt", resumable=True)
                saved = time.perf_counter()
            if stop:
                path = Path(settings.run_folder) / "last.pt"
                number = caught[0] if caught else signal.SIGTERM  # another process caught it
                raise Stopped(number, f"stopped in epoch {run.epoch + 1}: python train.py --resume {path} goes on")

            step = run.epoch * len(batches) + run.step
            factor = learning_rate_factor(settings, step, len(batches))
            for group in run.optimizer.param_groups:
                group["lr"] = factor * group["initial_lr"]
            sampling = settings.scheduled_sampling * step / (settings.epochs * len(batches))  # rising along a line
            try:
                totals = (words, captions)
                loss, number = train_step(
                    run.network, run.optimizer, batch, settings, device, dtype, totals, sampling, reward
                )
            except FloatingPointError as error:
                rate = run.optimizer.param_groups[0]["lr"]
                raise InputError(
                    f"{error} at epoch {run.epoch + 1}, step {run.step + 1}, learning rate {rate:g}: "
                    f"lower --learning_rate or --gradient_clip, or try --precision fp32"
                ) from None
            except torch.OutOfMemoryError as error:
                raise InputError(
                    f"{first_line(error)} With --batch_size {settings.batch_size} --accumulate "
                    f"{settings.accumulate}: double --accumulate, or halve --batch_size"
                ) from None
            run.average.update(step)
            run.step += 1
            run.loss += loss
            run.words += number
            run.seconds = seconds_before + time.perf_counter() - start
            bar.set_postfix(loss=f"{run.loss / run.words:.3f}", refresh=False)
            bar.update(captions)


def finish_epoch(run, training, validation, device, dtype):
    """Validate, then write log.jsonl, best.pt, last.pt and curves.png."""
    settings = run.settings
    run.save("last.pt", resumable=True)  # validation takes its time, too
    take_from_first([own for own, _ in run.average.buffers])  # BatchNorm's statistics are each process's own
    evaluation = EvaluationSettings(max_length=settings.max_length)
    scores, captions = evaluate(run.average.captioner, run.vocabulary, validation, evaluation, 1, device, dtype)
    loss, words = add_up([run.loss, run.words])
    row = {
        "epoch": run.epoch + 1,
        "loss": loss / words,
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "seconds": run.seconds,
        "captions_per_second": training.captions.total() / run.seconds,
        **scores,
    }
    run.epoch, run.step, run.seconds, run.loss, run.words = run.epoch + 1, 0, 0.0, 0.0, 0
    better = scores[settings.score] > run.best_score
    run.waited = 0 if better else run.waited + 1
    run.best_score = max(run.best_score, scores[settings.score])
    folder = Path(settings.run_folder)
    if rank() == 0:
        append_log(folder / "log.jsonl", row)
        write_tensorboard(folder / "tensorboard", [row])
    if better:
        run.save("best.pt", resumable=False)
    run.save("last.pt", resumable=True)
    if rank() == 0:
        draw_curves([folder / "log.jsonl"], folder / "curves.png")
    print(
        f"epoch {run.epoch}: loss {row['loss']:.3f}, BLEU-4 {scores['bleu_4']:.4f}, CIDEr {scores['cider']:.4f}, "
        f"{row['captions_per_second']:.0f} captions/s, {row['seconds']:.0f} s{', best' if better else ''}"
    )
    print(f"  {validation.entries[0]['image']}: {' '.join(captions[0])}")


def check(settings):
    """Raise InputError for a number out of its range."""
    require_at_least(settings, 1, "epochs", "batch_size", "accumulate", "patience", "max_length")
    require_at_least(settings, 1, "embedding_size", "attention_size", "hidden_size")
    require_at_least(settings, 0, "learning_rate", "encoder_learning_rate", "doubly_stochastic", "workers")
    require_at_least(settings, 0, "grid_size", "region_dim", "gradient_clip", "learning_rate_decay", "save_minutes")
    require_at_least(settings, 0, "graph_layers", "graph_neighbours")
    require_at_least(settings, 1, "graph_heads")
    require_below_one(settings, "warm_up", "dropout", "label_smoothing", "weight_average", "scheduled_sampling")
    if settings.fine_tune_from and not settings.fine_tune_encoder:
        raise InputError(f"--fine_tune_from {settings.fine_tune_from} needs --fine_tune_encoder")
    if settings.freeze_word_vectors and not (settings.word_vectors or settings.init_from):
        raise InputError("--freeze_word_vectors needs --word_vectors: without, the words would stay random")
    if settings.objective == "cider" and not (settings.init_from or settings.resume):
        raise InputError("--objective cider needs a model that can caption already: give its best.pt as --init_from")
    for name in ("scheduled_sampling", "doubly_stochastic"):
        if settings.objective == "cider" and getattr(settings, name):
            raise InputError(f"--{name} {getattr(settings, name)} does not go with --objective cider")
    if settings.batch_size < world_size() * settings.accumulate:
        raise InputError(
            f"--batch_size {settings.batch_size} cannot be shared by {world_size()} processes in "
            f"--accumulate {settings.accumulate} parts: give at least {world_size() * settings.accumulate}"
        )


def train(settings, device):
    """Train until the validation score stops rising."""
    settings, checkpoint = prepare_run(settings)
    check(settings)
    require_writable(settings.run_folder)
    dtype = choose_dtype(settings.precision, device)
    run = start_run(settings, checkpoint, device)
    cached = not settings.fine_tune_encoder
    validation, training = (
        open_split(
            settings.data_folder,
            split,
            run.vocabulary,
            run.captioner,
            cached,
            device,
            dtype,
            mirror=mirror,
            in_memory=settings.in_memory,
        )
        for split, mirror in (("val", False), ("train", settings.mirror))
    )
    if len(training) < world_size():
        raise InputError(f"{len(training)} training images cannot be shared by {world_size()} processes")
    start_files(run, checkpoint)
    print(f"{len(training)} training images, {len(run.vocabulary)} words, {device}, {str(dtype).split('.')[1]}")
    if run.waited >= settings.patience:
        print(f"nothing to do: {run.waited} epochs brought no better score, --patience N waits longer")
    elif run.epoch >= settings.epochs:
        print(f"nothing to do after {run.epoch} epochs: --epochs N trains longer, the schedule is stretched to it")
    reward = None
    if settings.objective == "cider":
        # <end> counts as a word: captions that break off would cost nothing otherwise.
        reward = CiderReward([[caption[1:] for caption in one_image] for one_image in training.captions])
    with stop_signals() as caught:
        while run.epoch < settings.epochs and run.waited < settings.patience:
            train_one_epoch(run, training, device, dtype, caught, reward)
            finish_epoch(run, training, validation, device, dtype)
    print(f"best {settings.score} {run.best_score:.4f}: {Path(settings.run_folder) / 'best.pt'}")


def main(settings):
    """Train, on each of several processes its share (torchrun), or draw the curves of runs."""
    if settings.look:
        print(draw_runs(settings.look))
        return
    with processes(settings.device) as device:
        train(settings, device)  # all that uses the processes' connection is gone when it is closed


if __name__ == "__main__":
    run_script(main, Settings)
