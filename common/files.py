"""Files: atomic writes, JSON and JSON lines, and loading that executes nothing."""

import contextlib
import glob
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from utils import InputError


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it when the block ends: never a half-written file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{glob.escape(path.stem)}.*{path.suffix}"):
        with contextlib.suppress(FileNotFoundError):  # another program may be done with it just now
            if time.time() - leftover.stat().st_mtime > 3600:  # whoever wrote it was killed
                leftover.unlink()
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")  # figures are typed by their suffix
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a matplotlib figure atomically, as a file of the type that its suffix names."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=100)


def require_writable(folder: str | Path) -> None:
    """Raise InputError where files cannot be written into a folder, be it there already or not; makes nothing."""
    nearest = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
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
    """Read what torch.save wrote, executing nothing; InputError where the file is missing or is not that."""
    if not Path(path).is_file():
        raise InputError(f"no such file: {path}")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception:  # a damaged file raises almost anything, and torch's own message advises to load it unsafely
        raise InputError(f"{path} is refused: it is damaged, or holds more than tensors and plain containers") from None


def write_jsonl(path: str | Path, rows: list[dict]) -> None:
    """Replace a file of JSON lines atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def append_jsonl(path: str | Path, row: dict) -> None:
    """Append one row to a file of JSON lines."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_jsonl(path: str | Path) -> list[dict]:
    """The rows of a file of JSON lines, without a last one that a killed run left unfinished."""
    rows = []
    with contextlib.suppress(FileNotFoundError, ValueError), open(path, encoding="utf-8") as file:
        for line in file:
            rows.append(json.loads(line))
    return rows
