"""Files: atomic writes, JSON and JSON lines, and loading that executes nothing."""

import contextlib
import errno
import glob
import json
import os
import re
import secrets
import time
import warnings
import zipfile
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Any, BinaryIO

import torch

from utils import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextlib.contextmanager
def hold_lock(path: str | Path, message: str) -> Iterator[None]:
    """Hold an exclusive lock on a file in the block; InputError(message) where another process holds it.

    The file is made for the lock and removed with it. The system releases the lock of a process that ends, however it
    ends. Where the file system or the platform has no locks, nothing is locked.
    """
    with contextlib.ExitStack() as stack:
        if fcntl:
            file = stack.enter_context(open(path, "a"))
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by workers
                if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    raise InputError(message)  # its holder has removed the file since it was opened here
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN, errno.ENOENT):
                    raise InputError(message) from None
            stack.callback(Path(path).unlink, missing_ok=True)  # while it is still locked
        yield


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it when the block ends: never a half-written file.

    Processes and threads that write the same path do not disturb each other, the last one stays. An OSError of the
    block names `path`, that of a full disk too.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = path.stem[:50]  # names have a maximum length
    remove_leftovers(path.parent, f".{glob.escape(stem)}.partial-*{glob.escape(path.suffix)}")
    temporary = path.with_name(f".{stem}.partial-{secrets.token_hex(4)}{path.suffix}")  # figures need the suffix
    try:
        with open(temporary, "wb+") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                _flock(file)  # alive, `remove_leftovers` sees; unlike lockf's, kept when another handle is closed
            yield temporary
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename in (None, str(temporary)) and error.errno:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def name_in_errors(path: str | Path) -> Iterator[None]:
    """An OSError of the block names `path`: that of a full disk names no file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def display_name(path: str | Path) -> str:
    """A file's name as text, which it need not be: JSON holds Unicode only."""
    return os.fsencode(path).decode(errors="replace")


def path_text(path: str | Path) -> str:
    """An absolute path, as `display_name`."""
    return display_name(Path(path).resolve())


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove the temporary files of `atomic_write` that killed processes left in a folder, by a pattern of names.

    A file that a process still writes is locked, but in its first instant. Without locks nothing is removed.
    """
    for leftover in folder.glob(pattern):
        with contextlib.suppress(OSError), open(leftover, "rb+") as file:
            if time.time() - leftover.stat().st_mtime > 10:  # seconds
                _flock(file, blocking=False)
                leftover.unlink()


def _flock(file: IO, blocking: bool = True) -> None:
    """Lock an open file exclusively; OSError where it is locked and not `blocking`, or cannot be locked here."""
    if not fcntl:
        raise OSError("no locks on this platform")
    fcntl.flock(file, fcntl.LOCK_EX | (0 if blocking else fcntl.LOCK_NB))


def save_torch(path: str | Path, content: Any) -> None:
    """Write with torch.save atomically; OSError where the disk is full."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch hides the reason of a failed write
                raise error.__context__ from None
            raise


def save_figure(figure: Any, path: str | Path, **options: Any) -> set[str]:
    """Write a matplotlib figure atomically, as a file of the type that its suffix names, with options of `savefig`.

    Returns the characters that the font lacks, of which matplotlib would warn one by one.
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
    """A folder where it exists, otherwise the nearest of its parents that does."""
    return next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())


def require_writable(folder: str | Path) -> None:
    """Raise InputError where files cannot be written into a folder, be it there already or not; makes nothing."""
    nearest = nearest_existing(folder)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"{folder} cannot be written: {nearest} is not a folder that you may write into")


def write_json(path: str | Path, content: Any, indent: int | None = None) -> None:
    """Write JSON atomically, Unicode as it is."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=indent, ensure_ascii=False), encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read JSON; InputError where the file is missing, is not JSON, or holds text that no file can hold."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        content = json.loads(text)
        if re.search(r"\\u[dD]", text):
            json.dumps(content, ensure_ascii=False).encode()  # half of an escaped pair of surrogates cannot be
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    return content


def safe_load(path: str | Path, device: str | torch.device = "cpu") -> Any:
    """Read what torch.save wrote, executing nothing; InputError where the file is missing or is not that.

    The memory that it takes is in proportion to the file's size.
    """
    if not Path(path).is_file():
        raise InputError(f"no such file: {path}")
    with open(path, "rb") as file, warnings.catch_warnings(), reraise_as_refused(path):
        warnings.simplefilter("ignore")  # of what is then refused
        check_zip(file)
        return torch.load(file, map_location=device, weights_only=True)


@contextlib.contextmanager
def reraise_as_refused(path: str | Path) -> Iterator[None]:
    """Any exception of reading a file becomes an InputError, but those of the machine: no memory, a disk that fails."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, InputError):
        raise
    except Exception as error:
        # A damaged file raises almost anything, and torch's own message advises to load it unsafely.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # a disk that fails
            raise
        raise InputError(f"{path} is refused: it is damaged, or holds more than tensors and plain containers") from None


def check_zip(file: BinaryIO) -> None:
    """Raise an exception where a zip file is damaged, which torch.load does not notice, or would unpack to more."""
    if zipfile.is_zipfile(file):  # torch's files before 1.6 are none
        with zipfile.ZipFile(file) as archive:
            if sum(record.file_size for record in archive.infolist()) > os.fstat(file.fileno()).st_size:
                raise zipfile.BadZipFile("compressed or overlapping records")
            if archive.testzip():
                raise zipfile.BadZipFile("wrong checksum")
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
    """The rows of a file of JSON lines, without a last one that a killed run left unfinished."""
    rows = []
    with contextlib.suppress(FileNotFoundError, ValueError), open(path, encoding="utf-8") as file:
        for line in file:
            rows.append(json.loads(line))
    return rows


def did_you_mean(path: str) -> str:
    """The end of a message about a path that does not exist: a path with a similar name, if there is one."""
    missing = next((part for part in (Path(path), *Path(path).parents) if part.parent.is_dir()), Path(path))
    similar = get_close_matches(missing.name, [found.name for found in missing.parent.iterdir()], 1)
    return f", did you mean {missing.with_name(similar[0])}?" if similar else ""
