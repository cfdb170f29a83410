"""How a run starts: from scratch, resumed from its last.pt, or from the weights of another run's best.pt."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
from torch.nn.parallel import DistributedDataParallel

from common.distributed import on_rank_zero, rank, world_size
from common.files import hold_lock, read_jsonl, require_writable, write_jsonl
from models import Captioner, ModelSettings, captioner_from_checkpoint, load_checkpoint
from preparation.storage import read_metadata, region_info
from text.vocabulary import Vocabulary, read_pretrained_embeddings
from training.logs import rewrite_tensorboard
from training.optim import ModelEMA, make_optimizer
from training.state import TrainState
from utils import InputError, choose_device, has_type

if TYPE_CHECKING:
    from train import Settings

# Settings that say how a program starts, not how a run trains.
START_SETTINGS = ("run_folder", "overwrite", "resume", "init_from", "plot")
# Settings that a resumed run may change: it stays the same run.
RESUME_SETTINGS = (
    "data_folder",
    "epochs",
    "patience",
    "workers",
    "device",
    "gradient_accumulation_steps",
    "save_minutes",
    "in_memory",
    "features_folder",
)


@contextlib.contextmanager
def lock_run_folder(settings: Settings) -> Iterator[None]:
    """Make the run folder and keep every other train.py out of it in the block; without a run in it, it is removed.

    Raises InputError where the folder cannot be written or another process holds it.
    """
    if settings.resume and settings.init_from:
        raise InputError("--resume continues a run and --init_from starts a new one: give one of them")
    if settings.resume and not Path(settings.resume).is_file():
        raise InputError(f"no such file: {settings.resume}")
    folder = Path(settings.resume).parent if settings.resume else Path(settings.run_folder)
    with contextlib.ExitStack() as stack:
        on_rank_zero(lambda: stack.enter_context(hold_run_folder(folder)))
        yield


@contextlib.contextmanager
def hold_run_folder(folder: Path) -> Iterator[None]:
    """What `lock_run_folder` does on rank 0."""
    require_writable(folder)
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    message = f"{folder} is in use by another train.py: wait until it ends, stop it, or give another --run_folder"
    try:
        with hold_lock(folder / ".lock", message):
            yield
    finally:
        with contextlib.suppress(OSError):  # not empty: there is a run
            for path in new:
                path.rmdir()


def given_settings(settings: Settings, checkpoint: dict[str, Any]) -> set[str]:
    """The names of the settings that the user gave: as a flag, or by editing a default of train.py.

    A flag counts even at its default. A default counts as edited where it is not what it was when the checkpoint was
    written; that of --encoder_weights says where a file lies on a machine and never counts.
    """
    defaults = checkpoint["defaults"]
    edited = {name for name, value in asdict(settings).items() if value != defaults[name]}
    return (edited - {"encoder_weights"}) | settings.given


def merge_settings(
    settings: Settings, checkpoint: dict[str, Any], path: str, names: Iterable[str], may_differ: Collection[str]
) -> Any:
    """Settings with the checkpoint's values of `names`, but for those that the user gave.

    Raises InputError for one that was given, differs and may not.
    """
    given, saved = given_settings(settings, checkpoint), checkpoint["settings"]
    for name in names:
        value = getattr(settings, name)
        if name not in given:
            settings = settings.replace(**{name: saved[name]})
        elif name not in may_differ and value != saved[name]:
            raise mismatch(name, value, path, saved[name])
        elif value != saved[name]:
            print(f"{name} is {value!r}, where {path} has {saved[name]!r}: given as a flag, or at the top of train.py")
    return settings


def load_run(path: str, settings: Settings) -> dict[str, Any]:
    """Read a checkpoint with the settings that its run had; those that train.py has got since, at their defaults.

    Raises InputError where they are not settings of train.py, each of its type.
    """
    checkpoint = load_checkpoint(path)
    hints, now = get_type_hints(type(settings)), asdict(type(settings)())
    for key in ("settings", "defaults"):
        saved = checkpoint.get(key)
        if not isinstance(saved, dict) or not saved.keys() <= now.keys():
            raise InputError(f"{path}: its {key} are not those of this train.py: train again")
        for name, value in saved.items():
            if not has_type(value, hints[name]):
                raise InputError(f"{path}: its {key} have a {name} of another type: train again")
        checkpoint[key] = now | saved
    return checkpoint


def mismatch(name: str, value: Any, path: str, saved: Any) -> InputError:
    """The error for a setting that was given and does not go with a checkpoint."""
    return InputError(
        f"--{name} {value} does not go with {path}, which was trained with {saved}: leave it out, or give "
        f"--{name} {saved} where the default at the top of train.py is another"
    )


def prepare_run(settings: Settings) -> tuple[Settings, dict[str, Any] | None]:
    """Resolve --resume and --init_from: the settings to run with and the checkpoint to start from, or None.

    Raises InputError where they do not go with the other settings, or the run folder holds a run.
    """
    if settings.resume:
        return resume_settings(settings)
    last = Path(settings.run_folder) / "last.pt"
    if last.exists() and not settings.overwrite:
        raise InputError(
            f"{settings.run_folder} holds a run: continue it with --resume {last}, start again with --overwrite, or "
            f"give another --run_folder"
        )
    if settings.init_from:
        if settings.pretrained_embeddings:
            raise InputError(
                f"--pretrained_embeddings {settings.pretrained_embeddings}: --init_from has trained words, leave it out"
            )
        checkpoint = load_run(settings.init_from, settings)
        names = {field.name for field in fields(ModelSettings)}
        # No encoder weights are read; `build_from_checkpoint` checks the other settings against the weights.
        may_differ = names - {"encoder_weights"}
        return merge_settings(settings, checkpoint, settings.init_from, names, may_differ), checkpoint
    return settings, None


def resume_settings(settings: Settings) -> tuple[Settings, dict[str, Any]]:
    """The settings of a resumed run and its checkpoint. Raises InputError for a setting that would make it another."""
    checkpoint = load_run(settings.resume, settings)
    if "optimizer" not in checkpoint:
        raise InputError(f"{settings.resume} cannot be resumed: give the run's last.pt, or use --init_from")
    data = checkpoint.get("data")
    folders = data.get("folders") if isinstance(data, dict) else None
    known = isinstance(folders, list) and has_type(tuple(folders), tuple[str, ...]) and any(map(os.path.isabs, folders))
    if not known or "digest" not in checkpoint["data"]:
        raise InputError(
            f"{settings.resume} does not say which data it was trained on: use --init_from with its best.pt"
        )
    run_folder = Path(settings.resume).parent
    names = [field.name for field in fields(settings) if field.name not in START_SETTINGS]
    merged = merge_settings(settings, checkpoint, settings.resume, names, RESUME_SETTINGS)
    if "run_folder" in settings.given and Path(settings.run_folder).resolve() != run_folder.resolve():
        raise InputError(f"--run_folder {settings.run_folder}: --resume continues in {run_folder}, leave it out")
    given = "data_folder" in given_settings(settings, checkpoint)
    folders = [merged.data_folder] if given else checkpoint["data"]["folders"]
    data_folder = find_data_folder(folders, checkpoint, settings.resume)
    origin = checkpoint["settings"]["init_from"]
    return merged.replace(run_folder=str(run_folder), data_folder=data_folder, init_from=origin), checkpoint


def choose_run_device(settings: Settings, device: torch.device) -> torch.device:
    """The device of settings that are merged with a checkpoint's; `device` is that of the settings before.

    Raises InputError where the device that a resumed run was trained on is not there.
    """
    if settings.device in ("auto", device.type):
        return device
    try:
        return choose_device(settings.device)
    except InputError as error:
        raise InputError(f"{settings.resume} was trained with {error}") from None


def find_data_folder(folders: list[str], checkpoint: dict[str, Any], path: str) -> str:
    """The first of the folders that holds the data that a checkpoint was trained on; InputError where none does."""
    prepared = [folder for folder in folders if (Path(folder) / "dataset.json").is_file()]
    for folder in prepared:
        if read_metadata(folder)["digest"] == checkpoint["data"]["digest"]:
            return folder
    trained_on = next(filter(os.path.isabs, checkpoint["data"]["folders"]))
    if not prepared:
        raise InputError(
            f"{folders[0]} is no data folder: give the one that {path} was trained on, {trained_on}, as "
            f"--data_folder, wherever it is now"
        )
    raise InputError(
        f"{prepared[0]} does not hold the data that {path} was trained on in {trained_on}: give that data as "
        f"--data_folder, or start a new run on this data with --init_from"
    )


def build_from_checkpoint(settings: Settings, checkpoint: dict[str, Any]) -> Captioner:
    """The captioner of a checkpoint with the model settings of a run that starts from it.

    Those that no weight depends on (dropout, graph_knn, ...) may differ. Raises InputError for one whose change the
    weights do not fit.
    """
    path, saved = settings.resume or settings.init_from, checkpoint["model_settings"]
    checkpoint = checkpoint | {"fine_tune_encoder": settings.fine_tune_encoder}
    try:
        return captioner_from_checkpoint(checkpoint, path, settings)
    except InputError:
        for name, value in saved.items():
            if value != getattr(settings, name) and not weights_fit(checkpoint, path, name, getattr(settings, name)):
                raise mismatch(name, getattr(settings, name), path, value) from None
        raise


def weights_fit(checkpoint: dict[str, Any], path: str, name: str, value: Any) -> bool:
    """Return True if a checkpoint's weights fit a model with another value of one of its settings."""
    try:
        captioner_from_checkpoint(checkpoint, path, ModelSettings(**checkpoint["model_settings"] | {name: value}))
    except InputError:
        return False
    return True


def start_run(settings: Settings, checkpoint: dict[str, Any] | None, device: torch.device) -> TrainState:
    """Build the model, new or from a checkpoint, its optimizer and its average."""
    torch.manual_seed(settings.seed)
    metadata = read_metadata(settings.data_folder)
    if checkpoint:
        captioner = build_from_checkpoint(settings, checkpoint)
    else:
        vocabulary = Vocabulary.load(settings.data_folder)
        info = region_info(metadata)
        captioner = Captioner(
            settings,
            vocabulary,
            metadata["image_size"],
            metadata["resize"],
            feature_dim=info.feature_dim if info else 0,
            fine_tune_encoder=settings.fine_tune_encoder,
        )
        if settings.pretrained_embeddings:
            vectors = read_pretrained_embeddings(settings.pretrained_embeddings, vocabulary, settings.embed_dim)
            captioner.decoder.load_pretrained_embeddings(*vectors)
    captioner.to(device)
    optimizer = make_optimizer(captioner, settings)
    ema = ModelEMA(captioner, settings.ema_decay)
    network = captioner
    if world_size() > 1:
        network = DistributedDataParallel(captioner, broadcast_buffers=settings.fine_tune_encoder)
    if rank() > 0:
        torch.manual_seed(settings.seed + rank())  # the same weights, but dropout of its own
    folders = [settings.data_folder, os.path.abspath(settings.data_folder)]
    state = TrainState(settings, captioner, optimizer, ema, network, metadata["digest"], folders)
    if settings.resume:
        assert checkpoint is not None
        state.restore(checkpoint)
    return state


def start_files(state: TrainState) -> None:
    """Bring the run folder to where the run starts: that of a resumed run has no later rows than its checkpoint."""
    state.save("last.pt", with_training_state=True)
    on_rank_zero(lambda: clean_files(Path(state.settings.run_folder), state.epoch))


def clean_files(folder: Path, epoch: int) -> None:
    """Remove from a run folder the log of later epochs and, before the first, what --overwrite replaces."""
    rows = [row for row in read_jsonl(folder / "log.jsonl") if row["epoch"] <= epoch]
    if not epoch:
        for name in ("best.pt", "curves.png"):
            (folder / name).unlink(missing_ok=True)
    write_jsonl(folder / "log.jsonl", rows)
    rewrite_tensorboard(folder / "tensorboard", rows)
