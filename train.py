"""Train a captioner: python train.py --data_folder data/flickr8k --run_folder runs/flickr8k"""

import contextlib
import copy
import math
import shutil
import signal
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from datasets import Vocabulary, epoch_order, make_loader, open_split, read_card, split_order
from eval import Settings as EvaluationSettings
from eval import evaluate
from models import CHECKPOINT_FORMAT, MODEL_SETTINGS, Captioner, build_captioner, load_checkpoint, restore_captioner
from utils import (
    InputError,
    Stopped,
    add_up,
    append_log,
    autocast,
    choose_dtype,
    draw_curves,
    first_line,
    gather,
    git_revision,
    processes,
    random_state,
    rank,
    read_log,
    require_at_least,
    require_below_one,
    require_writable,
    run_script,
    save_checkpoint,
    set_random_state,
    stop_signals,
    take_from_first,
    world_size,
    write_log,
    write_tensorboard,
)


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
    grid_size: int = 0  # pool the features to a grid of this side (the paper: 14); 0 keeps the network's own

    region_dim: int = 512  # units of a dense layer on the features; 0: none, the decoder sees them as they are
    embedding_size: int = 512  # units of a word
    attention_size: int = 512  # units of the attention
    hidden_size: int = 512  # units of the LSTM
    dropout: float = 0.5  # on words, regions and the output layer

    epochs: int = 10  # passes over the training images
    batch_size: int = 8  # images a step, each with all its captions; over all processes
    accumulate: int = (
        1  # parts a batch is computed in, one after the other: less memory, the same gradient but for BatchNorm
    )
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
    max_length: int = 30  # words at most of a caption generated for validation
    save_minutes: float = 10.0  # write last.pt this often within an epoch, too

    seed: int = 0  # of weights, order and dropout
    workers: int = 0  # processes that load batches; 0: the main one
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # bf16 mixed precision where the hardware has it
    device: str = "auto"  # auto, cpu or cuda


NOT_OF_THE_RUN = ("resume", "run_folder", "overwrite", "look")  # settings that a resumed run does not take over


def captioning_loss(outputs, lengths, settings, words, captions):
    """The loss of teacher forcing and, of it, the cross-entropy of all words, added up and without label smoothing.

    The rest is the doubly stochastic term of "Show, Attend and Tell" (equation 14): over a caption, the weights of
    each region should add up to about one. Label smoothing is that of Szegedy et al. (2016, section 7).

    Args:
        outputs: what `models.Decoder.forward` returns.
        lengths: (B, C) as it takes them.
        settings: label_smoothing and doubly_stochastic.
        words, captions: the numbers to divide by, those of the whole step where this is a part of it.
    """
    logits, targets, weights = outputs
    log_probabilities = logits.float().log_softmax(dim=-1)  # (N, V)
    cross_entropy = smoothed = functional.nll_loss(log_probabilities, targets, reduction="sum")
    if share := settings.label_smoothing:
        smoothed = (1 - share) * cross_entropy - share * log_probabilities.mean(dim=-1).sum()
    looked = weights.sum(dim=0)[lengths.to(weights.device) > 0]  # (captions, R)
    once = (1 - looked).square().mean(dim=-1).sum()
    return smoothed / words + settings.doubly_stochastic * once / captions, cross_entropy


def learning_rate_factor(settings, step, steps_per_epoch):
    """The factor on the learning rates at a step, counted from 0 over all epochs."""
    steps = settings.epochs * steps_per_epoch
    warm_up = min(1, (step + 1) / max(1, settings.warm_up * steps))
    if settings.schedule == "step":
        return warm_up * settings.learning_rate_decay ** (step // steps_per_epoch)
    return warm_up * (1 + math.cos(math.pi * step / steps)) / 2


class WeightAverage:
    """A captioner whose weights are the exponential moving average of those that are trained.

    The average forgets faster while it is young, so that the random start does not linger in it.
    """

    def __init__(self, captioner, decay):
        frozen = not any(parameter.requires_grad for parameter in captioner.encoder.parameters())
        shared = {id(captioner.encoder): captioner.encoder} if frozen else {}
        self.captioner, self.decay = copy.deepcopy(captioner, shared), decay
        pairs = zip(self.captioner.parameters(), captioner.parameters(), strict=True)
        self.averages, self.weights = zip(*((own, new) for own, new in pairs if new.requires_grad), strict=True)
        pairs = zip(self.captioner.buffers(), captioner.buffers(), strict=True)
        self.buffers = [(own, new) for own, new in pairs if own is not new]

    @torch.no_grad()
    def update(self, step):
        """Take in the weights after a step, counted from 0 over all epochs."""
        average = get_ema_multi_avg_fn(min(self.decay, (step + 1) / (step + 10)))
        average(self.averages, self.weights, None)
        for own, new in self.buffers:
            own.copy_(new)


def train_step(network, optimizer, batch, settings, device, dtype, totals=None, sampling=0.0):
    """One step on a `datasets.Batch`; returns the cross-entropy of its words, added up, and their number.

    `network` is a Captioner, or one in DistributedDataParallel: then `totals` are the words and captions of all
    processes. `sampling` is that of `models.Decoder.forward`. Raises FloatingPointError where the loss is not finite.
    """
    words, captions = totals or batch.totals()
    sum_of_losses = 0.0
    optimizer.zero_grad(set_to_none=True)
    parts = batch.split(settings.accumulate)
    for part in parts:
        images = part.images.to(device, non_blocking=True)
        numbers = part.words.to(device, non_blocking=True)
        # Between processes gradients are averaged, once a step.
        wait = network.no_sync() if world_size() > 1 and part is not parts[-1] else contextlib.nullcontext()
        with wait:
            with autocast(device, dtype):
                outputs = network(images, numbers, part.lengths, sampling)
            loss, cross_entropy = captioning_loss(outputs, part.lengths, settings, words, captions)
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"the loss is {loss.item()}")
            (loss * world_size()).backward()
        sum_of_losses += cross_entropy.item()
    if settings.gradient_clip:
        clip_grad_norm_(network.parameters(), settings.gradient_clip)
    optimizer.step()
    return sum_of_losses, batch.totals()[0]


@dataclass
class Run:
    """All that a training run changes as it goes, and so all that it must save."""

    settings: Settings
    captioner: Captioner
    vocabulary: Vocabulary
    optimizer: torch.optim.Optimizer
    average: WeightAverage
    network: nn.Module  # the captioner, in DistributedDataParallel where there are several processes
    epoch: int = 0  # epochs done
    step: int = 0  # steps done of the epoch under way
    seconds: float = 0.0  # that they took
    loss: float = 0.0  # cross-entropy of this process's words in them, added up
    words: int = 0  # number of these words
    best_score: float = -1.0
    waited: int = 0  # epochs since the best score

    PROGRESS = ("epoch", "step", "seconds", "best_score", "waited")

    def save(self, name, resumable):
        """Write a checkpoint: the averaged weights or, where it is resumable, all that a resumed run needs.

        Every process calls it, the first one writes.
        """
        captioner = self.captioner if resumable else self.average.captioner
        loss, words = add_up([self.loss, self.words])
        checkpoint = {
            "format": CHECKPOINT_FORMAT,
            "model": captioner.state_dict(),
            "image_size": self.captioner.image_size,
            "words": self.vocabulary.words,
            "settings": asdict(self.settings),
            "epoch": self.epoch,
            "best_score": self.best_score,
            "git": git_revision(),
        }
        if resumable:
            checkpoint["progress"] = {name: getattr(self, name) for name in self.PROGRESS} | {
                "loss": loss,
                "words": words,
            }
            checkpoint["optimizer"] = self.optimizer.state_dict()
            checkpoint["average"] = [own.detach() for own in self.average.averages]
            checkpoint["rng"] = gather([random_state()])
        if rank() == 0:
            save_checkpoint(Path(self.settings.run_folder) / name, checkpoint)

    def restore(self, checkpoint):
        """Take over what `save` wrote beside the model, the random numbers last."""
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        for own, saved in zip(self.average.averages, checkpoint["average"], strict=True):
            own.data.copy_(saved)
        for name in self.PROGRESS:
            setattr(self, name, checkpoint["progress"][name])
        if rank() == 0:  # sums over all processes, however many there were
            self.loss, self.words = checkpoint["progress"]["loss"], checkpoint["progress"]["words"]
        if rank() < len(checkpoint["rng"]):
            set_random_state(checkpoint["rng"][rank()])


def train_one_epoch(run, training, device, dtype, caught):
    """What is left of a pass over the training images with all their captions; adds up in `run` as it goes.

    A signal in the list `caught`, of `utils.stop_signals`, ends the program before the next step, with all steps until
    then in last.pt.
    """
    settings = run.settings
    run.captioner.train()
    order = epoch_order(len(training), settings.seed, run.epoch)
    batches = split_order(order, settings.batch_size)
    loader = make_loader(training, batches[run.step :], settings.workers)
    done = sum(len(training.captions[index]) for batch in batches[: run.step] for index in batch)
    start = saved = time.perf_counter()
    seconds_before = run.seconds
    with tqdm(
        total=sum(map(len, training.captions)),
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
                loss, own_words = train_step(
                    run.network, run.optimizer, batch, settings, device, dtype, totals, sampling
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
            run.words += own_words
            run.seconds = seconds_before + time.perf_counter() - start
            bar.set_postfix(loss=f"{run.loss / run.words:.3f}", refresh=False)
            bar.update(captions)


def settings_from(checkpoint, path, settings, names, free=()):
    """Settings with the named ones as a checkpoint has them.

    One given otherwise on the command line counts where it is free to differ, and is an InputError elsewhere.
    """
    defaults = Settings()
    for name in names:
        given, saved = getattr(settings, name), checkpoint["settings"][name]
        if given == getattr(defaults, name):
            settings = replace(settings, **{name: saved})
        elif name not in free and given != saved:
            raise InputError(f"--{name} {given} does not go with {path}, which was trained with {saved}")
    return settings


def prepare_run(settings):
    """Resolve --resume and --init_from: the settings to run with and the checkpoint to start from, or None."""
    run_folder = Path(settings.run_folder)
    if settings.resume and settings.init_from:
        raise InputError("--resume continues a run and --init_from starts a new one: give one of them")
    if settings.resume:
        checkpoint = load_checkpoint(settings.resume)
        if "optimizer" not in checkpoint:
            raise InputError(f"{settings.resume} cannot be resumed: give the run's last.pt, or use --init_from")
        settings = replace(settings, run_folder=str(Path(settings.resume).parent))
        names = [field.name for field in fields(Settings) if field.name not in NOT_OF_THE_RUN]
        free = ("data_folder", "epochs", "patience", "workers", "device", "accumulate", "save_minutes")
        return settings_from(checkpoint, settings.resume, settings, names, free), checkpoint
    if (run_folder / "last.pt").exists() and not settings.overwrite:
        raise InputError(
            f"{run_folder} holds a run: continue it with --resume {run_folder / 'last.pt'}, start anew with "
            f"--overwrite, or give another --run_folder"
        )
    if settings.init_from:
        checkpoint = load_checkpoint(settings.init_from)
        names = [*MODEL_SETTINGS, "encoder_weights"]
        return settings_from(checkpoint, settings.init_from, settings, names), checkpoint
    return settings, None


def make_optimizer(captioner, settings):
    """Adam over what decodes and, where it is fine-tuned, the encoder with its own learning rate."""
    captioner.encoder.requires_grad_(settings.fine_tune_encoder)
    decoding = [*captioner.region_layer.parameters(), *captioner.decoder.parameters()]
    groups = [{"params": decoding, "lr": settings.learning_rate}]
    if settings.fine_tune_encoder:
        groups.append({"params": captioner.encoder.parameters(), "lr": settings.encoder_learning_rate})
    for group in groups:
        group["initial_lr"] = group["lr"]  # what the schedule starts from
    return torch.optim.Adam(groups, fused=True)


def start_run(settings, checkpoint, device):
    """Build the model, new or from a checkpoint, its optimizer and its average."""
    torch.manual_seed(settings.seed)
    if checkpoint:
        captioner, vocabulary = restore_captioner(checkpoint, settings.resume or settings.init_from)
    else:
        vocabulary = Vocabulary.load(settings.data_folder)
        image_size = read_card(settings.data_folder)["image_size"]
        captioner = build_captioner(asdict(settings), len(vocabulary), image_size, settings.encoder_weights)
    captioner.to(device)
    optimizer = make_optimizer(captioner, settings)
    average = WeightAverage(captioner, settings.weight_average)
    network = captioner
    if world_size() > 1:
        network = DistributedDataParallel(captioner, broadcast_buffers=settings.fine_tune_encoder)
    if rank() > 0:
        torch.manual_seed(settings.seed + rank())  # the same weights, but dropout of its own
    run = Run(settings, captioner, vocabulary, optimizer, average, network)
    if settings.resume:
        run.restore(checkpoint)
    return run


def start_files(run, checkpoint):
    """Bring the run folder to where the run starts: of a resumed one, no later rows than its checkpoint's."""
    folder, rows = Path(run.settings.run_folder), []
    if run.settings.resume:
        rows = [row for row in read_log(folder / "log.jsonl") if row["epoch"] <= checkpoint["epoch"]]
    elif rank() == 0:
        for name in ("best.pt", "curves.png"):  # of a run that --overwrite replaces
            (folder / name).unlink(missing_ok=True)
    if rank() == 0:
        write_log(folder / "log.jsonl", rows)
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        if rows:
            write_tensorboard(folder / "tensorboard", rows)
    run.save("last.pt", resumable=True)


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
        "captions_per_second": sum(map(len, training.captions)) / run.seconds,
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
    require_below_one(settings, "warm_up", "dropout", "label_smoothing", "weight_average", "scheduled_sampling")
    if settings.batch_size < world_size() * settings.accumulate:
        raise InputError(
            f"--batch_size {settings.batch_size} cannot be shared by {world_size()} processes in "
            f"--accumulate {settings.accumulate} parts: give at least {world_size() * settings.accumulate}"
        )


def draw_runs(folders):
    """Draw the curves of several runs into curves.png beside the first; returns its path."""
    for folder in folders:
        if not read_log(Path(folder) / "log.jsonl"):
            raise InputError(f"--look {folder}: no run there, it has no log.jsonl with an epoch")
    picture = Path(folders[0]).resolve().parent / "curves.png"
    require_writable(picture.parent)
    draw_curves([Path(folder) / "log.jsonl" for folder in folders], picture)
    return picture


def main(settings):
    """Train until the validation score stops rising, or on each of several processes its share (torchrun)."""
    if settings.look:
        print(draw_runs(settings.look))
        return
    with processes(settings.device) as device:
        settings, checkpoint = prepare_run(settings)
        check(settings)
        require_writable(settings.run_folder)
        dtype = choose_dtype(settings.precision, device)
        run = start_run(settings, checkpoint, device)
        cached = not settings.fine_tune_encoder
        validation, training = (
            open_split(settings.data_folder, split, run.vocabulary, run.captioner, cached, device, dtype)
            for split in ("val", "train")
        )
        if len(training) < world_size():
            raise InputError(f"{len(training)} training images cannot be shared by {world_size()} processes")
        start_files(run, checkpoint)
        print(f"{len(training)} training images, {len(run.vocabulary)} words, {device}, {str(dtype).split('.')[1]}")
        if run.waited >= settings.patience:
            print(f"nothing to do: {run.waited} epochs brought no better score, --patience N waits longer")
        elif run.epoch >= settings.epochs:
            print(f"nothing to do after {run.epoch} epochs: --epochs N trains longer, the schedule is stretched to it")
        with stop_signals() as caught:
            while run.epoch < settings.epochs and run.waited < settings.patience:
                train_one_epoch(run, training, device, dtype, caught)
                finish_epoch(run, training, validation, device, dtype)
        print(f"best {settings.score} {run.best_score:.4f}: {Path(settings.run_folder) / 'best.pt'}")


if __name__ == "__main__":
    run_script(main, Settings)
