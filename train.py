"""Train a captioner: python train.py --data_folder data/flickr8k --run_folder runs/flickr8k"""

import math
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from datasets import Vocabulary, epoch_order, make_loader, open_split, read_card
from eval import Settings as EvaluationSettings
from eval import evaluate
from models import CHECKPOINT_FORMAT, MODEL_SETTINGS, Captioner, build_captioner, load_checkpoint, restore_captioner
from utils import (
    InputError,
    append_log,
    autocast,
    choose_device,
    choose_dtype,
    draw_curves,
    git_revision,
    random_state,
    read_log,
    require_at_least,
    require_writable,
    run_script,
    save_checkpoint,
    set_random_state,
    write_log,
)


@dataclass(frozen=True)
class Settings:
    """Train an image captioner. Edit a value here or give it as flag: python train.py --batch_size 64"""

    data_folder: str = "data/shapes"  # what create_input_files.py wrote
    run_folder: str = "runs/shapes"  # where checkpoints, log and curves go
    overwrite: bool = False  # start anew in a run folder that holds a run
    resume: str = ""  # a last.pt: continue that run exactly, in its folder and with its settings
    init_from: str = ""  # a best.pt: a new run from its weights, words and model settings

    encoder: str = "resnet101"  # any torchvision classification network
    encoder_layer: str = ""  # layer whose grid the decoder sees; empty: the network's last grid
    encoder_weights: str = "imagenet"  # imagenet, the path of a torchvision state dict, or empty for random
    fine_tune_encoder: bool = False  # train the encoder too; frozen, its features are computed once and cached
    grid_size: int = 0  # pool the features to a grid of this side (the paper: 14); 0 keeps the network's own

    region_dim: int = 512  # units of a dense layer on the features; 0: none, the decoder sees them as they are
    embedding_size: int = 512  # units of a word
    attention_size: int = 512  # units of the attention
    hidden_size: int = 512  # units of the LSTM
    dropout: float = 0.4  # on words, regions and the output layer

    epochs: int = 15  # passes over the training images
    batch_size: int = 16  # images a step, each with all its captions
    learning_rate: float = 1e-3  # of the decoder (Adam)
    encoder_learning_rate: float = 1e-4  # of the encoder, where it is trained
    learning_rate_decay: float = 0.5  # factor on both after an epoch without a better score
    gradient_clip: float = 5.0  # norm of the gradient at most; 0: as it is
    doubly_stochastic: float = 1.0  # weight of the term that asks to look everywhere once
    score: Literal["cider", "bleu_4"] = "cider"  # validation score that picks best.pt and stops early
    patience: int = 5  # stop after this many epochs without a better score
    max_length: int = 30  # words at most of a caption generated for validation

    seed: int = 0  # of weights, order and dropout
    workers: int = 0  # processes that load batches; 0: the main one
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # bf16 mixed precision where the hardware has it
    device: str = "auto"  # auto, cpu or cuda


def captioning_loss(logits, targets, weights, lengths, doubly_stochastic):
    """The loss of teacher forcing and, of it, the mean cross-entropy of a word.

    The rest is the doubly stochastic term of "Show, Attend and Tell" (equation 14): over a caption, the weights of
    each region should add up to about one. Arguments as `models.Decoder.forward` takes and returns them.
    """
    word_loss = functional.cross_entropy(logits.float(), targets)
    looked = weights.sum(dim=0)[lengths.to(weights.device) > 0]  # (captions, R)
    return word_loss + doubly_stochastic * (1 - looked).square().mean(), word_loss


def train_step(captioner, optimizer, batch, settings, device, dtype):
    """One step on a `datasets.Batch`; returns the mean cross-entropy of a word and the number of words.

    Raises FloatingPointError where the loss is not finite.
    """
    images = batch.images.to(device, non_blocking=True)
    words = batch.words.to(device, non_blocking=True)

    with autocast(device, dtype):
        logits, targets, weights = captioner(images, words, batch.lengths)
    loss, word_loss = captioning_loss(logits, targets, weights, batch.lengths, settings.doubly_stochastic)
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"the loss is {loss.item()}")

    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if settings.gradient_clip:
        clip_grad_norm_(captioner.parameters(), settings.gradient_clip)
    optimizer.step()
    return word_loss.item(), len(targets)


def train_one_epoch(captioner, loader, optimizer, settings, device, dtype, epoch):
    """One pass over the training images with all their captions; returns the mean cross-entropy of a word."""
    captioner.train()
    total_loss = total_words = 0
    number_of_captions = sum(map(len, loader.dataset.captions))
    with tqdm(total=number_of_captions, desc=f"epoch {epoch}", unit="caption", leave=False) as bar:
        for step, batch in enumerate(loader, start=1):
            try:
                loss, words = train_step(captioner, optimizer, batch, settings, device, dtype)
            except FloatingPointError as error:
                rate = optimizer.param_groups[0]["lr"]
                raise InputError(
                    f"{error} at epoch {epoch}, step {step}, learning rate {rate:g}: "
                    f"lower --learning_rate or --gradient_clip, or try --precision fp32"
                ) from None
            total_loss += loss * words
            total_words += words
            bar.set_postfix(loss=f"{total_loss / total_words:.3f}", refresh=False)
            bar.update(int((batch.lengths > 0).sum()))
    return total_loss / total_words


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
        names = [field.name for field in fields(Settings) if field.name not in ("resume", "run_folder", "overwrite")]
        free = ("data_folder", "epochs", "patience", "workers", "device")
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
    return torch.optim.Adam(groups, fused=True)


@dataclass
class Run:
    """All that a training run changes as it goes, and so all that it must save."""

    settings: Settings
    captioner: Captioner
    vocabulary: Vocabulary
    optimizer: torch.optim.Optimizer
    epoch: int = 0  # epochs done
    best_score: float = -1.0
    waited: int = 0  # epochs since the best score

    def save(self, name, resumable):
        """Write a checkpoint: what inference needs and, where it is resumable, what only a resumed run needs."""
        checkpoint = {
            "format": CHECKPOINT_FORMAT,
            "model": self.captioner.state_dict(),
            "image_size": self.captioner.image_size,
            "words": self.vocabulary.words,
            "settings": asdict(self.settings),
            "epoch": self.epoch,
            "best_score": self.best_score,
            "git": git_revision(),
        }
        if resumable:
            checkpoint.update(optimizer=self.optimizer.state_dict(), patience=self.waited, rng=random_state())
        save_checkpoint(Path(self.settings.run_folder) / name, checkpoint)

    def restore(self, checkpoint):
        """Take over what `save` wrote beside the model, the random numbers last."""
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.epoch, self.best_score = checkpoint["epoch"], checkpoint["best_score"]
        self.waited = checkpoint["patience"]
        set_random_state(checkpoint["rng"])


def start_run(settings, checkpoint, device):
    """Build the model, new or from a checkpoint, and its optimizer."""
    if checkpoint:
        captioner, vocabulary = restore_captioner(checkpoint, settings.resume or settings.init_from)
    else:
        vocabulary = Vocabulary.load(settings.data_folder)
        image_size = read_card(settings.data_folder)["image_size"]
        captioner = build_captioner(asdict(settings), len(vocabulary), image_size, settings.encoder_weights)
    captioner.to(device)
    return Run(settings, captioner, vocabulary, make_optimizer(captioner, settings))


def main(settings):
    """Train until the validation score stops rising; write last.pt, best.pt, log.jsonl and curves.png."""
    require_at_least(settings, 1, "epochs", "batch_size", "patience", "max_length")
    require_at_least(settings, 1, "embedding_size", "attention_size", "hidden_size")
    require_at_least(settings, 0, "learning_rate", "encoder_learning_rate", "doubly_stochastic", "workers")
    require_at_least(settings, 0, "grid_size", "region_dim", "gradient_clip", "learning_rate_decay")
    if not 0 <= settings.dropout < 1:
        raise InputError(f"--dropout {settings.dropout}: must be below 1 and at least 0")
    settings, checkpoint = prepare_run(settings)
    require_writable(settings.run_folder)
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.precision, device)
    torch.manual_seed(settings.seed)
    run = start_run(settings, checkpoint, device)
    cached = not settings.fine_tune_encoder
    validation, training = (
        open_split(settings.data_folder, split, run.vocabulary, run.captioner, cached, device, dtype)
        for split in ("val", "train")
    )
    evaluation = EvaluationSettings(batch_size=settings.batch_size, max_length=settings.max_length)

    log_path = Path(settings.run_folder) / "log.jsonl"
    rows = []
    if settings.resume:
        rows = [row for row in read_log(log_path) if row["epoch"] <= checkpoint["epoch"]]
        run.restore(checkpoint)
    else:
        for name in ("best.pt", "curves.png"):  # of a run that --overwrite replaces
            (Path(settings.run_folder) / name).unlink(missing_ok=True)
    write_log(log_path, rows)
    run.save("last.pt", resumable=True)
    print(f"{len(training)} training images, {len(run.vocabulary)} words, {device}, {str(dtype).split('.')[1]}")

    if run.epoch >= settings.epochs or run.waited >= settings.patience:
        print(f"nothing to do after {run.epoch} of {settings.epochs} epochs: --epochs N trains longer")
    while run.epoch < settings.epochs and run.waited < settings.patience:
        order = epoch_order(len(training), settings.seed, run.epoch)
        loader = make_loader(training, settings.batch_size, order, settings.workers)
        start = time.perf_counter()
        loss = train_one_epoch(run.captioner, loader, run.optimizer, settings, device, dtype, run.epoch + 1)
        seconds = time.perf_counter() - start
        scores, captions = evaluate(run.captioner, run.vocabulary, validation, evaluation, 1, device, dtype)

        run.epoch += 1
        row = {
            "epoch": run.epoch,
            "loss": loss,
            "learning_rate": run.optimizer.param_groups[0]["lr"],
            "seconds": seconds,
            "captions_per_second": sum(map(len, training.captions)) / seconds,
            **scores,
        }
        append_log(log_path, row)
        better = scores[settings.score] > run.best_score
        if better:
            run.best_score, run.waited = scores[settings.score], 0
            run.save("best.pt", resumable=False)
        else:
            run.waited += 1
            for group in run.optimizer.param_groups:
                group["lr"] *= settings.learning_rate_decay
        run.save("last.pt", resumable=True)
        draw_curves(log_path, Path(settings.run_folder) / "curves.png")
        print(
            f"epoch {run.epoch}: loss {loss:.3f}, BLEU-4 {scores['bleu_4']:.4f}, CIDEr {scores['cider']:.4f}, "
            f"{row['captions_per_second']:.0f} captions/s, {seconds:.0f} s{', best' if better else ''}"
        )
        print(f"  {validation.entries[0]['image']}: {' '.join(captions[0])}")
    print(f"best {settings.score} {run.best_score:.4f}: {Path(settings.run_folder) / 'best.pt'}")


if __name__ == "__main__":
    run_script(main, Settings)
