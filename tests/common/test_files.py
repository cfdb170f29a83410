"""Files written whole, locks, full disks, and loading that executes nothing."""

import errno
import os
import resource
import subprocess
import sys
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


WRITE_AND_WAIT = """
import sys, time
from common import files
with files.atomic_write(sys.argv[1]):
    print("writing", flush=True)
    time.sleep(60)
"""

HOLD_AND_WAIT = """
import sys, time
from common import files
with files.hold_lock(sys.argv[1], "in use"):
    print("holding", flush=True)
    time.sleep(60)
"""


def start_process(code, path):
    """A process that runs code with a path until it is killed; returns once it has printed a line."""
    process = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def test_what_a_killed_program_left_is_removed_and_what_a_running_one_writes_is_not(tmp_path):
    process = start_process(WRITE_AND_WAIT, tmp_path / "file.json")
    (temporary,) = tmp_path.iterdir()
    try:
        os.utime(temporary, (0, 0))
        files.write_json(tmp_path / "file.json", {})
        assert temporary.exists()
    finally:
        process.kill()
        process.wait()
    assert temporary.exists()
    files.write_json(tmp_path / "file.json", {})
    assert not temporary.exists()


def test_a_file_of_the_user_is_no_leftover(tmp_path):
    for name in (".file.backup.json", ".file.1234.json", "file.json.bak"):
        (tmp_path / name).write_text("mine")
        os.utime(tmp_path / name, (0, 0))
    files.write_json(tmp_path / "file.json", {})
    assert len(list(tmp_path.iterdir())) == 4


def test_threads_that_write_one_file_do_not_disturb_each_other(tmp_path):
    path, texts = tmp_path / "file.json", ["a" * 2**20, "b" * 2**19]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: files.write_json(path, texts[i % 2]), range(40)))
    assert files.read_json(path) in texts
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_locked_is_written_and_never_a_leftover(tmp_path, monkeypatch):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    with files.atomic_write(tmp_path / "file.json") as temporary:
        os.utime(temporary, (0, 0))
        files.write_json(tmp_path / "file.json", "first")
        assert temporary.exists()
        temporary.write_text('"second"')
    assert files.read_json(tmp_path / "file.json") == "second"
    monkeypatch.setattr(files, "fcntl", None)  # as on Windows
    files.write_json(tmp_path / "file.json", "third")
    assert files.read_json(tmp_path / "file.json") == "third"


def test_a_file_is_locked_while_it_is_written(tmp_path):
    with files.atomic_write(tmp_path / "file") as temporary, open(temporary, "rb+") as other:  # noqa: SIM117
        with pytest.raises(BlockingIOError):
            files.fcntl.flock(other, files.fcntl.LOCK_SH | files.fcntl.LOCK_NB)


def test_a_lock_is_held_until_the_process_ends(tmp_path):
    process = start_process(HOLD_AND_WAIT, tmp_path / ".lock")
    try:
        with pytest.raises(utils.InputError, match="in use"), files.hold_lock(tmp_path / ".lock", "in use"):
            pass
    finally:
        process.kill()
        process.wait()
    with files.hold_lock(tmp_path / ".lock", "in use"):
        assert list(tmp_path.iterdir()) == [tmp_path / ".lock"]
    assert not list(tmp_path.iterdir())


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
    with pytest.raises(utils.InputError, match=r"bad\.pt is refused"):
        files.safe_load(tmp_path / "bad.pt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 half a zip"])
def test_damaged_files_are_named(tmp_path, content):
    (tmp_path / "bad.pt").write_bytes(content)
    with pytest.raises(utils.InputError, match=r"bad\.pt"):
        files.safe_load(tmp_path / "bad.pt")


def test_names_may_be_as_long_as_the_file_system_allows(tmp_path):
    path = tmp_path / f"{'n' * 250}.json"
    files.write_json(path, {})
    assert files.read_json(path) == {}
