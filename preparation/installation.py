"""Install a prepared folder whole or not at all, by one process at a time, and never over the user's own files."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.files import hold_lock
from preparation.storage import SPLITS, read_metadata
from utils import InputError


@contextlib.contextmanager
def lock_folder(output: Path) -> Iterator[None]:
    """Prevent other processes from preparing `output` during the block. Raises InputError if one already does."""
    lock = output.resolve().with_name(f".{output.resolve().name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    message = f"{output} is being prepared by another process: wait for it, or give another --output_folder"
    with hold_lock(lock, message):
        yield


def is_prepared(output: Path, source: dict[str, Any], overwrite: bool) -> bool:
    """Return True if a folder has been prepared from `source`. Raises InputError if it holds something else."""
    if not output.exists() or not any(output.iterdir()):
        return False
    if not (output / "dataset.json").is_file():
        if {path.name for path in output.iterdir()} <= set(owned_files(output)):
            return False  # a run was killed while it installed its files
        raise InputError(f"{output} holds other files: give another --output_folder")
    if overwrite:
        return False
    metadata = read_metadata(output)
    if metadata["source"] != source:
        raise InputError(
            f"{output} was made with other settings: --overwrite replaces it, or give another --output_folder"
        )
    for name, size in metadata["files"].items():
        if not (output / name).is_file() or (output / name).stat().st_size != size:
            raise InputError(f"{output / name} is missing or was changed: --overwrite prepares the folder again")
    return True


@contextlib.contextmanager
def installed_folder(output: Path) -> Iterator[Path]:
    """Yield a new folder, which is moved to `output` when the block ends and removed when it fails.

    Raises InputError if the disk is full: h5py's own error takes several lines.
    """
    partial = output.resolve().with_name(f".{output.resolve().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        install_folder(partial, output)
    except (OSError, RuntimeError) as error:
        if reason := re.search(r"error message = '([^']*)'", str(error)):
            raise InputError(f"{output} cannot be written: {reason[1]}") from None
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def owned_files(folder: Path) -> list[str]:
    """Return the names of all that create_input_files.py and the feature cache may write into a folder."""
    names = ["dataset.json", "word_map.json", "features", "contact_sheet.png", "words.png"]
    names += [f"{split}_{kind}" for split in SPLITS for kind in ("images.hdf5", "captions.json", "regions.hdf5")]
    if (folder / "dataset_shapes.json").exists():  # the photos of another data set belong to the user
        names += ["photos", "dataset_shapes.json"]
    return names


def install_folder(complete: Path, output: Path) -> None:
    """Move a complete folder to `output`, replacing the files of an earlier run; other files stay.

    dataset.json is removed first and moved last, so a half-replaced folder is recognized.
    """
    if not output.exists():
        os.replace(complete, output)
        return
    for name in owned_files(output):
        if (output / name).is_dir():
            shutil.rmtree(output / name)
        else:
            (output / name).unlink(missing_ok=True)
    for path in sorted(complete.iterdir(), key=lambda path: path.name == "dataset.json"):
        os.replace(path, output / path.name)
