"""The start of a run: from scratch, resumed from its last.pt, or with the weights of another run's best.pt."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
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
from training.logs import prune_tensorboard
from training.optim import ModelEMA, make_optimizer
from training.state import TrainState, has_structure
from utils import InputError, choose_device, has_type

if TYPE_CHECKING:
    from train import Settings

# Settings that say how a program starts, not how a run trains.
START_SETTINGS = ("run_folder", "overwrite", "resume", "init_from", "plot")
# Settings that may change when a run is resumed: it stays the same run.
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
# Paths on this machine: an edited default is not a request for another run.
MACHINE_SETTINGS = ("run_folder", "encoder_weights")


@contextlib.contextmanager
def lock_run_folder(settings: Settings) -> Iterator[None]:
    """Create the run folder and keep every other train.py out of it; remove it at the end if it holds no run.

    Raises InputError if the folder cannot be written or another process holds it.
    """
    if settings.resume and settings.init_from:
        raise InputError(f"--init_from {settings.init_from} cannot be combined with --resume: remove one of them")
    if settings.resume and not Path(settings.resume).is_file():
        raise InputError(f"no such file: {settings.resume}")
    folder = Path(settings.resume).parent if settings.resume else Path(settings.run_folder)
    with contextlib.ExitStack() as stack:
        on_rank_zero(lambda: stack.enter_context(_lock_folder(folder)))
        yield


@contextlib.contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
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


def prepare_run(settings: Settings) -> tuple[Settings, dict[str, Any] | None]:
    """Return the settings to run with and, for --resume and --init_from, the checkpoint to start from.

    Raises InputError for settings that do not go with the checkpoint, and if a new run's folder holds a run.
    """
    if settings.resume:
        return resume_settings(settings)
    last = Path(settings.run_folder) / "last.pt"
    if last.exists() and not settings.overwrite:
        raise InputError(
            f"{settings.run_folder} holds a run: continue it with --resume {last}, start again with --overwrite, or "
            f"give another --run_folder"
        )
    if not settings.init_from:
        if settings.objective == "scst":
            raise InputError("--objective scst requires a trained model: give its best.pt as --init_from")
        return settings, None
    if settings.pretrained_embeddings:
        path = settings.pretrained_embeddings
        raise InputError(f"--pretrained_embeddings {path} cannot be combined with --init_from: remove one of them")
    checkpoint = load_run(settings.init_from, settings)
    names = [field.name for field in fields(ModelSettings)]
    # No encoder weights are read; `build_from_checkpoint` checks whether the checkpoint's fit the other settings.
    may_differ = [name for name in names if name != "encoder_weights"]
    return merge_settings(settings, checkpoint, settings.init_from, names, may_differ), checkpoint


def resume_settings(settings: Settings) -> tuple[Settings, dict[str, Any]]:
    """Return a resumed run's settings and checkpoint; raise InputError for a setting that would make it another run."""
    checkpoint = load_run(settings.resume, settings)
    if not has_structure(checkpoint, {"optimizer": {}, "data": {"digest": "", "folders": [""]}}):
        raise InputError(f"{settings.resume} cannot be resumed: give the run's last.pt, or use --init_from")
    names = [field.name for field in fields(settings) if field.name not in START_SETTINGS]
    merged = merge_settings(settings, checkpoint, settings.resume, names, RESUME_SETTINGS)
    run_folder = Path(settings.resume).parent
    if was_given("run_folder", settings, checkpoint) and Path(settings.run_folder).resolve() != run_folder.resolve():
        raise InputError(f"--run_folder {settings.run_folder}: --resume continues in {run_folder}, leave it out")
    is_given = was_given("data_folder", settings, checkpoint)
    folders = [merged.data_folder] if is_given else checkpoint["data"]["folders"]
    data_folder = find_data_folder(folders, checkpoint, settings.resume)
    origin = checkpoint["settings"]["init_from"]
    return merged.replace(run_folder=str(run_folder), data_folder=data_folder, init_from=origin), checkpoint


def load_run(path: str, settings: Settings) -> dict[str, Any]:
    """Load a checkpoint with its run's settings; settings that train.py has gained since are at their defaults.

    Raises InputError if they are not settings of train.py, each of its type.
    """
    checkpoint = load_checkpoint(path)
    hints, now = get_type_hints(type(settings)), asdict(type(settings)())
    for key in ("settings", "defaults"):
        saved: Any = checkpoint.get(key)
        is_known = isinstance(saved, dict) and saved.keys() <= now.keys()
        if not is_known or not all(has_type(value, hints[name]) for name, value in saved.items()):
            raise InputError(f"{path}: its {key} are not those of this train.py: train again")
        checkpoint[key] = now | saved
    return checkpoint


def was_given(name: str, settings: Settings, checkpoint: dict[str, Any]) -> bool:
    """Return True if the user chose a setting: with a flag, or by editing its default in train.py or models.py.

    A flag counts even at its default. A default counts as edited if it is not what it was when the checkpoint was
    written; those of `MACHINE_SETTINGS` never do.
    """
    is_edited = getattr(settings, name) != checkpoint["defaults"][name]
    return name in settings.given or (is_edited and name not in MACHINE_SETTINGS)


def merge_settings(
    settings: Settings, checkpoint: dict[str, Any], path: str, names: Collection[str], may_differ: Collection[str]
) -> Settings:
    """Return the settings, with the checkpoint's value for each of `names` that the user did not give.

    Raises InputError for one that was given, differs and is not in `may_differ`.
    """
    saved, changes = checkpoint["settings"], {}
    for name in names:
        value = getattr(settings, name)
        if not was_given(name, settings, checkpoint):
            changes[name] = saved[name]
        elif value != saved[name]:
            if name not in may_differ:
                raise mismatch(name, value, path, saved[name])
            print(f"{name} is {value!r}, where {path} has {saved[name]!r}: given as a flag, or edited in its file")
    return settings.replace(**changes)


def mismatch(name: str, value: Any, path: str, saved: Any) -> InputError:
    """Return the error for a setting that was given and does not go with a checkpoint."""
    return InputError(
        f"--{name} {value} does not go with {path}, which was trained with {saved}: leave it out, or give "
        f"--{name} {saved} if its default was edited"
    )


def find_data_folder(folders: list[str], checkpoint: dict[str, Any], path: str) -> str:
    """Return the first of some folders that holds the data of a checkpoint's run; raise InputError if none does."""
    data = checkpoint["data"]
    for folder in folders:
        if (Path(folder) / "dataset.json").is_file() and read_metadata(folder)["digest"] == data["digest"]:
            return folder
    trained_on = next(filter(os.path.isabs, data["folders"]), data["folders"][0])
    raise InputError(
        f"{folders[0]} does not hold the data that {path} was trained on in {trained_on}: give the folder in which it "
        f"is now as --data_folder, or start a new run on other data with --init_from"
    )


def choose_run_device(settings: Settings, device: torch.device) -> torch.device:
    """Return the device of a run: `device`, unless the run is resumed and was trained on another one.

    Raises InputError if the device that a resumed run was trained on does not exist here.
    """
    if settings.device in ("auto", device.type):
        return device
    try:
        return choose_device(settings.device)
    except InputError as error:
        raise InputError(f"{settings.resume} was trained with {error}") from None


def build_from_checkpoint(settings: Settings, checkpoint: dict[str, Any]) -> Captioner:
    """Build the captioner of a checkpoint with the model settings of a run that starts from it.

    Settings that no weight depends on (dropout, graph_knn, ...) may differ. Raises InputError for any other.
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


def build_new(settings: Settings, metadata: dict[str, Any]) -> Captioner:
    """Build a new captioner for a prepared folder; raise InputError if the settings do not fit its data."""
    info = region_info(metadata)
    if info and settings.regions == "features" and settings.grounding_weight and not info.has_boxes:
        raise InputError(f"--grounding_weight: the region features of {settings.data_folder} have no boxes")
    vocabulary = Vocabulary.load(settings.data_folder)
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
    return captioner


def start_run(settings: Settings, checkpoint: dict[str, Any] | None, device: torch.device) -> TrainState:
    """Build the captioner, new or from a checkpoint, its optimizer and its average."""
    torch.manual_seed(settings.seed)
    metadata = read_metadata(settings.data_folder)
    captioner = build_from_checkpoint(settings, checkpoint) if checkpoint else build_new(settings, metadata)
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
    """Write last.pt and remove what the run folder holds of later epochs or of an overwritten run."""
    state.save("last.pt", with_training_state=True)
    on_rank_zero(lambda: clean_files(Path(state.settings.run_folder), state.epoch))


def clean_files(folder: Path, epoch: int) -> None:
    """Remove later epochs from the logs of a run folder and, at epoch 0, results of an overwritten run."""
    rows = [row for row in read_jsonl(folder / "log.jsonl") if row["epoch"] <= epoch]
    if not epoch:
        for name in ("best.pt", "curves.png"):
            (folder / name).unlink(missing_ok=True)
    write_jsonl(folder / "log.jsonl", rows)
    prune_tensorboard(folder / "tensorboard", epoch)
