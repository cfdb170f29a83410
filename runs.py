"""A training run: all that it changes as it goes, its run folder, and how it starts, is saved and goes on."""

import shutil
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from models import CHECKPOINT_FORMAT, MODEL_SETTINGS, Captioner, build_captioner, load_checkpoint, restore_captioner
from optimization import WeightAverage, make_optimizer
from prepared import read_card
from utils import (
    InputError,
    add_up,
    draw_curves,
    gather,
    git_revision,
    random_state,
    rank,
    read_log,
    require_writable,
    save_checkpoint,
    set_random_state,
    world_size,
    write_log,
    write_tensorboard,
)
from vocabulary import Vocabulary, read_word_vectors

NOT_OF_THE_RUN = ("resume", "run_folder", "overwrite", "look")  # settings that a resumed run does not take over


@dataclass
class Run:
    """All that a training run changes as it goes, and so all that it must save."""

    settings: Any  # of train.py
    captioner: Captioner
    vocabulary: Vocabulary
    optimizer: torch.optim.Optimizer
    average: WeightAverage
    network: nn.Module  # the captioner, in DistributedDataParallel where there are several processes
    epoch: int = 0  # epochs done
    step: int = 0  # steps done of the epoch under way
    seconds: float = 0.0  # that they took
    loss: float = 0.0  # cross-entropy of this process's words in them, or minus rewards of captions, added up
    words: int = 0  # number of these words, or captions
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
            "resize": self.captioner.resize,
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


def settings_from(checkpoint, path, settings, names, free=()):
    """Settings with the named ones as a checkpoint has them; one that was unknown when it was written stays.

    One given otherwise on the command line counts where it is free to differ, and is an InputError elsewhere.
    """
    defaults = type(settings)()
    for name in names:
        given, saved = getattr(settings, name), checkpoint["settings"].get(name, getattr(defaults, name))
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
        names = [field.name for field in fields(settings) if field.name not in NOT_OF_THE_RUN]
        free = ("data_folder", "epochs", "patience", "workers", "device", "accumulate", "save_minutes", "in_memory")
        return settings_from(checkpoint, settings.resume, settings, names, free), checkpoint
    if (run_folder / "last.pt").exists() and not settings.overwrite:
        raise InputError(
            f"{run_folder} holds a run: continue it with --resume {run_folder / 'last.pt'}, start anew with "
            f"--overwrite, or give another --run_folder"
        )
    if settings.init_from:
        if settings.word_vectors:
            raise InputError(f"--word_vectors {settings.word_vectors}: --init_from has trained words, leave one out")
        checkpoint = load_checkpoint(settings.init_from)
        names = [*MODEL_SETTINGS, "encoder_weights"]
        return settings_from(checkpoint, settings.init_from, settings, names), checkpoint
    return settings, None


def start_run(settings, checkpoint, device):
    """Build the model, new or from a checkpoint, its optimizer and its average."""
    torch.manual_seed(settings.seed)
    if checkpoint:
        captioner, vocabulary = restore_captioner(checkpoint, settings.resume or settings.init_from)
    else:
        card = read_card(settings.data_folder)
        vocabulary = Vocabulary.load(settings.data_folder)
        captioner = build_captioner(
            asdict(settings), len(vocabulary), card["image_size"], settings.encoder_weights, card["resize"]
        )
        if settings.word_vectors:
            vectors = read_word_vectors(settings.word_vectors, vocabulary, settings.embedding_size)
            captioner.decoder.start_words(*vectors)
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


def draw_runs(folders):
    """Draw the curves of several runs into curves.png beside the first; returns its path."""
    for folder in folders:
        if not read_log(Path(folder) / "log.jsonl"):
            raise InputError(f"--look {folder}: no run there, it has no log.jsonl with an epoch")
    picture = Path(folders[0]).resolve().parent / "curves.png"
    require_writable(picture.parent)
    draw_curves([Path(folder) / "log.jsonl" for folder in folders], picture)
    return picture
