"""Files: atomic writes, locks, JSON and JSON lines, and loading that executes nothing."""

import contextlib
import errno
import glob
import json
import os
import pickle
import re
import secrets
import time
import warnings
import zipfile
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock, Timeout

from utils import InputError

# Classes that no state dict names; torch.load with weights_only=True would call them with any size.
ALLOCATING = rb"c(?:__builtin__|builtins)\nbytearray\n|ctorch\nTensor\n"
LEFTOVER_AGE = 24 * 60 * 60  # seconds; a writer touches its file far more often


@contextlib.contextmanager
def hold_lock(path: str | Path, message: str) -> Iterator[None]:
    """Hold an exclusive lock on a file in the block; raise InputError(message) if another process holds it.

    The lock creates the file and removes it at the end. The system releases the lock when the process ends, even if it
    is killed. On a file system without locks, only filelock's weaker soft lock protects the file, or nothing does.
    """
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(message) from None
    except NotImplementedError:  # no locks on this platform
        pass
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes the file on release and not before
            Path(path).unlink()  # before the release, or it could be the lock of the next process
        lock.release()


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it when the block ends: never a half-written file.

    Processes and threads that write the same path do not disturb each other; the last one wins. An OSError in the
    block names `path`, even that of a full disk. Temporary files that killed processes left are removed after a day.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = path.stem[:50]  # names have a maximum length
    remove_leftovers(path.parent, f".{glob.escape(stem)}.partial-*{glob.escape(path.suffix)}")
    temporary = path.with_name(f".{stem}.partial-{secrets.token_hex(4)}{path.suffix}")  # figures need the suffix
    try:
        with open(temporary, "wb") as file:
            yield temporary
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary)) and error.errno:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove files in a folder that match a pattern and were last written more than a day ago."""
    for leftover in folder.glob(pattern):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > LEFTOVER_AGE:
                leftover.unlink()


@contextlib.contextmanager
def name_in_errors(path: str | Path) -> Iterator[None]:
    """Name `path` in any OSError of the block; that of a full disk names no file by itself."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def display_name(path: str | Path) -> str:
    """Return a path as text that JSON can hold: bytes that are not UTF-8 are replaced."""
    return os.fsencode(path).decode(errors="replace")


def path_text(path: str | Path) -> str:
    """Return the absolute path as `display_name` shows it."""
    return display_name(Path(path).resolve())


def save_torch(path: str | Path, content: Any) -> None:
    """Write with torch.save atomically. Raises OSError if the disk is full."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch hides why a write failed
                raise error.__context__ from None
            raise


def save_figure(figure: Any, path: str | Path, **options: Any) -> set[str]:
    """Write a matplotlib figure atomically, in the format of its suffix, with options of `savefig`.

    Returns the characters that the font lacks, instead of one warning for each.
    """
    with warnings.catch_warnings(record=True) as caught, atomic_write(path) as temporary:
        warnings.simplefilter("always")
        figure.savefig(temporary, dpi=100, **options)
    missing = set()
    for warning in caught:
        if glyph := re.match(r"Glyph (\d+) ", str(warning.message)):
            missing.add(chr(int(glyph[1])))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return missing


def nearest_existing(folder: str | Path) -> Path:
    """Return the folder if it exists, otherwise its nearest parent that does."""
    return next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())


def require_writable(folder: str | Path) -> None:
    """Raise InputError if files cannot be written into a folder, which need not exist yet and is not created."""
    nearest = nearest_existing(folder)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"{folder} cannot be written: {nearest} is not a writable folder")


def write_json(path: str | Path, content: Any, indent: int | None = None) -> None:
    """Write JSON atomically, with Unicode unescaped."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=indent, ensure_ascii=False), encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read JSON. Raises InputError if the file is missing, is not JSON, or holds text that cannot be written again."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        content = json.loads(text)
        if re.search(r"\\u[dD]", text):
            json.dumps(content, ensure_ascii=False).encode()  # fails on half of a surrogate pair
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    return content


def safe_load(path: str | Path, device: str | torch.device = "cpu") -> Any:
    """Read what torch.save wrote without executing code. Memory stays in proportion to the file's size.

    Raises InputError if the file is missing, damaged, or holds more than tensors and plain containers.
    """
    with open_untrusted(path) as file:
        return torch.load(file, map_location=device, weights_only=True)


@contextlib.contextmanager
def open_untrusted(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file of torch.save for `torch.load`. An exception in the block becomes an InputError.

    Raises InputError if the file is missing or damaged.
    """
    if not Path(path).is_file():
        raise InputError(f"no such file: {path}")
    with open(path, "rb") as file, warnings.catch_warnings(), reraise_as_refused(path):
        warnings.simplefilter("ignore")  # torch warns of what it then refuses
        check_zip(file)
        check_globals(file)
        yield file


@contextlib.contextmanager
def reraise_as_refused(path: str | Path) -> Iterator[None]:
    """Turn any exception of reading a file into an InputError, except those of memory and of a failing disk."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, InputError):
        raise
    except Exception as error:
        # A damaged file raises almost anything, and torch's own message suggests loading it unsafely.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # a failing disk
            raise
        raise InputError(f"{path} is refused: it is damaged, or holds more than tensors and plain containers") from None


def check_zip(file: BinaryIO) -> None:
    """Raise BadZipFile if a zip file unpacks to more than its size or has wrong checksums, which torch.load ignores."""
    if zipfile.is_zipfile(file):  # torch before 1.6 wrote another format
        with zipfile.ZipFile(file) as archive:
            if sum(record.file_size for record in archive.infolist()) > os.fstat(file.fileno()).st_size:
                raise zipfile.BadZipFile("compressed or overlapping records")
            if archive.testzip():
                raise zipfile.BadZipFile("wrong checksum")
    file.seek(0)


def check_globals(file: BinaryIO) -> None:
    """Raise UnpicklingError if a pickle names one of the `ALLOCATING` classes."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            pickles = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
    else:
        file.seek(0)
        pickles = [file.read(2**24)]  # the weights follow the pickles
    for content in pickles:
        if named := re.search(ALLOCATING, content):
            raise pickle.UnpicklingError(f"the file names {named[0]!r}")
    file.seek(0)


def write_jsonl(path: str | Path, rows: list[dict]) -> None:
    """Replace a file of JSON lines atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def append_jsonl(path: str | Path, row: dict) -> None:
    """Append one row to a file of JSON lines."""
    with name_in_errors(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_jsonl(path: str | Path) -> list[dict]:
    """Return the rows of a file of JSON lines, without a last row that a killed run left unfinished."""
    rows = []
    with contextlib.suppress(FileNotFoundError, ValueError), open(path, encoding="utf-8") as file:
        for line in file:
            rows.append(json.loads(line))
    return rows


def did_you_mean(path: str) -> str:
    """Return the end of a message about a missing path: ", did you mean X?" if a path with a similar name exists."""
    missing = next((part for part in (Path(path), *Path(path).parents) if part.parent.is_dir()), Path(path))
    similar = get_close_matches(missing.name, [found.name for found in missing.parent.iterdir()], 1)
    return f", did you mean {missing.with_name(similar[0])}?" if similar else ""
