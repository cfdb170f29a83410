"""Files written whole, locks, full disks, and loading that executes nothing."""

import contextlib
import errno
import os
import resource
import subprocess
import sys
import time
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import utils
from common import files


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.json"
    files.write_json(path, {"old": True})
    with pytest.raises(RuntimeError), files.atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert files.read_json(path) == {"old": True}
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_of_killed_programs_are_removed_after_a_day_and_nothing_else(tmp_path):
    path, day_ago = tmp_path / "file.json", time.time() - files.LEFTOVER_AGE
    mine = [
        tmp_path / name for name in (".file.backup.json", ".file.1234.json", "file.json.bak", ".fil.partial-1.json")
    ]
    for old in [*mine, tmp_path / ".file.partial-01234567.json"]:
        old.write_text("old")
        os.utime(old, (day_ago - 10, day_ago - 10))
    with files.atomic_write(path) as temporary:
        os.utime(temporary, (day_ago + 10, day_ago + 10))  # a writer that is slow, or waits for a disk
        files.write_json(path, "first")
        temporary.write_text('"second"')
    assert files.read_json(path) == "second"
    assert sorted(tmp_path.iterdir()) == sorted([*mine, path])


def test_threads_that_write_one_file_do_not_disturb_each_other(tmp_path):
    path, texts = tmp_path / "file.json", ["a" * 2**20, "b" * 2**19]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: files.write_json(path, texts[i % 2]), range(40)))
    assert files.read_json(path) in texts
    assert list(tmp_path.iterdir()) == [path]


HOLD_AND_WAIT = """
import sys, time
from common import files
with files.hold_lock(sys.argv[1], "in use"):
    print("holding", flush=True)
    time.sleep(60)
"""


def test_a_lock_is_held_until_the_process_ends(tmp_path):
    lock = tmp_path / ".lock"
    process = subprocess.Popen([sys.executable, "-c", HOLD_AND_WAIT, lock], stdout=subprocess.PIPE)
    process.stdout.readline()
    try:
        with pytest.raises(utils.InputError, match="in use"), files.hold_lock(lock, "in use"):
            pass
    finally:
        process.kill()
        process.wait()
    with files.hold_lock(lock, "in use"):
        assert list(tmp_path.iterdir()) == [lock]
        with pytest.raises(utils.InputError, match="in use"), files.hold_lock(lock, "in use"):
            pass
    assert not list(tmp_path.iterdir())


def test_of_many_processes_only_one_holds_a_lock(tmp_path):
    """They open, remove and make the file all the time."""
    held = []

    def take(_):
        with contextlib.suppress(utils.InputError), files.hold_lock(tmp_path / ".lock", "in use"):
            held.append(1)
            assert len(held) == 1
            time.sleep(1e-4)
            held.pop()
            return 1
        return 0

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(take, range(2000))) > 10
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EACCES])
def test_where_the_file_system_has_no_locks_nothing_is_locked(tmp_path, monkeypatch, number):
    def no_locks(lock):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.FileLock, "acquire", no_locks)
    refused = pytest.raises(OSError, match="denied") if number == errno.EACCES else contextlib.nullcontext()
    with refused, files.hold_lock(tmp_path / ".lock", "in use"):
        pass


@pytest.fixture
def full_disk():
    """Files larger than 100 kB fail as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: files.save_torch(path, {"weights": torch.zeros(100_000)}),
        lambda path: files.write_json(path, list(range(100_000))),
    ],
)
def test_a_full_disk_is_an_os_error_that_names_the_file(tmp_path, full_disk, write):
    with pytest.raises(OSError, match="File too large") as caught:
        write(tmp_path / "file")
    assert caught.value.filename == str(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_nothing_that_is_loaded_executes_code(tmp_path):
    torch.save({"format": 1, "model": Malicious(str(tmp_path / "owned"))}, tmp_path / "bad.pt")
    malicious = (tmp_path / "bad.pt").read_bytes()
    for content in (malicious, b"", b"no checkpoint", b"PK\x03\x04 half a zip"):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(utils.InputError, match=r"bad\.pt is refused"):
            files.safe_load(tmp_path / "bad.pt")
    assert not (tmp_path / "owned").exists()


def test_names_may_be_as_long_as_the_file_system_allows(tmp_path):
    path = tmp_path / f"{'n' * 250}.json"
    files.write_json(path, {})
    assert files.read_json(path) == {}


@pytest.mark.parametrize("name", ["builtins bytearray", "torch Tensor"])
def test_a_file_that_asks_for_memory_is_refused(tmp_path, name):
    content = f"\x80\x02c{name.replace(' ', chr(10))}\n".encode("latin-1") + b"J\x00\x00\x00\x10\x85R."
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", content)
        archive.writestr("a/version", "3\n")
        archive.writestr("a/byteorder", "little")
    tracemalloc.start()
    with pytest.raises(utils.InputError, match="is refused"):
        files.safe_load(tmp_path / "a.pt")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
