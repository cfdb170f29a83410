"""Files of whole modules, read as data: what torch.save wrote, and what somebody made to do harm."""

import collections
import io
import os
import pickle
import struct
import time
import tracemalloc
import zipfile

import pytest
import torch
from torch import nn

from common.pickled import PickledObject, open_pickled
from utils import InputError

MARKER = "run"  # a file that a malicious pickle makes


def admit_all(name):
    return True


def admit_torch(name):
    return name.startswith(("torch.", "collections."))


def write(path, pickled, *, legacy, storages=()):
    """A file of torch.save with this pickle, and storages: keys, lengths as written, and numbers as bytes."""
    if legacy:
        keys = [key for key, *_ in storages]
        head = b"".join(pickle.dumps(each, 2) for each in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
        body = b"".join(struct.pack("<q", length) + numbers for _, length, numbers in storages)
        path.write_bytes(head + pickled + pickle.dumps(keys, 2) + body)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
            for key, _, numbers in storages:
                archive.writestr(f"archive/data/{key}", numbers)
    return path


def dumps(content):
    """The part of a pickle that makes plain content."""
    return pickle.dumps(content, 2)[2:-1]


def call(module, name, *arguments):
    """A pickle that calls a function."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + dumps(arguments) + b"R."


def tensor(storage_length, size, stride, offset=0):
    """A pickle of a tensor in a storage "0" that is said to have this length."""
    pid = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu"
    numbers = [dumps(each) for each in (storage_length, offset, size, stride)]
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + pid + numbers[0] + b"tQ" + b"".join(numbers[1:]) + b"\x89NtR."
    )


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_modules_optimizers_and_numbers_are_read(legacy, tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout(0.3))
    half, shared = torch.randn(5).half(), torch.randn(4, 3)
    content = {"module": module, "numbers": [1, 2.5, "x", None, (True,)], "half": half, "rows": shared[2:]}
    content["optimizer"] = torch.optim.Adam(module.parameters())
    module(torch.randn(4, 3)).sum().backward()
    content["optimizer"].step()
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    with open_pickled(tmp_path / "x.pt", admit_all) as file:
        found = file.content["module"]
        assert found.name == "torch.nn.modules.container.Sequential" and isinstance(found, PickledObject)
        for key, each in module.named_children():
            part = found.state["_modules"][key]
            for kind in ("_parameters", "_buffers"):
                for name, expected in getattr(each, kind).items():
                    assert torch.equal(file.tensor(part.state[kind][name]), expected.data)
        assert found.state["_modules"]["2"].state["p"] == 0.3
        assert file.content["numbers"] == [1, 2.5, "x", None, (True,)]
        assert torch.equal(file.tensor(file.content["half"]), half)
        assert torch.equal(file.tensor(file.content["rows"]), shared[2:])
        with pytest.raises(InputError, match="is refused"):
            file.tensor(file.content["numbers"])


def test_a_name_that_is_not_admitted_is_named(tmp_path):
    path = write(tmp_path / "x.pt", call("posix", "system", f"touch {MARKER}"), legacy=False)
    message = "x.pt is refused: it names 'posix.system', which has no place in it"
    with pytest.raises(InputError, match=message), open_pickled(path, admit_torch):
        pass


CODE = f"open({MARKER!r}, 'w').close()"

LINEAR = b"ctorch.nn.modules.linear\nLinear\n"
DEFAULTS = dumps("__defaults__")
SETSTATE = dumps("__setstate__") + b"cposix\nsystem\ns"
MALICIOUS = {
    "a command": call("posix", "system", f"touch {MARKER}"),
    "code": call("builtins", "eval", CODE),
    "code of protocol 4": b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93" + dumps(CODE) + b"\x85R.",
    "a dotted name": b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c\x09touch run\x85R.",
    "code of protocol 0": b"(S" + repr(CODE).encode() + b"\nibuiltins\nexec\n.",
    "an object of protocol 1": b"(cbuiltins\nexec\n" + dumps(CODE) + b"o.",
    "a loader inside": call("torch", "load", "x.pt"),
    "the state of an admitted class": b"\x80\x02" + LINEAR + b")\x81}" + SETSTATE + b"b" + dumps("touch run") + b"b.",
    "an attribute of an admitted class": b"\x80\x02" + LINEAR + b"N}" + SETSTATE + b"\x86b.",
    "an attribute of a function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}" + DEFAULTS + b")s\x86b.",
    "an extension": b"\x80\x02\x82\x01)R.",
}  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("admitted", [admit_torch, admit_all])
@pytest.mark.parametrize("name", MALICIOUS)
def test_nothing_runs_whatever_is_admitted(name, admitted, legacy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "x.pt", MALICIOUS[name], legacy=legacy)
    before = torch._utils._rebuild_tensor_v2.__defaults__
    try:
        with open_pickled(path, admitted) as file:
            # Where all names are admitted, what was called is data.
            assert isinstance(file.content, PickledObject)
    except InputError as error:
        assert "is refused: " in str(error) and "\n" not in str(error)
    assert os.listdir() == ["x.pt"]
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before


def test_the_malicious_files_do_run_under_pickle(tmp_path, monkeypatch):
    """Or the test above would prove nothing."""
    monkeypatch.chdir(tmp_path)
    for name in ("a command", "code", "code of protocol 4", "code of protocol 0"):
        pickle.loads(MALICIOUS[name])
        os.remove(MARKER)


ONE = [("0", 1, bytes(4))]
DAMAGED = {
    "a terabyte of one number": (tensor(1, (10**12,), (0,)), ONE),
    "a huge storage": (tensor(10**12, (10**12,), (1,)), [("0", 10**12, bytes(4))]),
    "outside its storage": (tensor(1, (1,), (1,), offset=10**9), ONE),
    "before its storage": (tensor(1, (1,), (1,), offset=-1), ONE),
    "a negative size": (tensor(1, (-1,), (1,)), ONE),
    "a storage that is not there": (tensor(1, (1,), (1,)), []),
    "fewer numbers than said": (tensor(8, (8,), (1,)), [("0", 8, bytes(4))]),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", DAMAGED)
def test_tensors_that_are_not_in_the_file_are_one_line(name, legacy, tmp_path):
    pickled, storages = DAMAGED[name]
    path = write(tmp_path / "x.pt", pickled, legacy=legacy, storages=storages)
    with pytest.raises(InputError, match="is refused"), open_pickled(path, admit_torch) as file:
        file.tensor(file.content)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "pickled",
    [
        pytest.param(b"\x80\x02]r\xff\xff\xff\x7f.", id="a large number of a memo"),
        pytest.param(b"\x80\x04\x8e" + struct.pack("<Q", 10**12) + b"x.", id="long bytes"),
        pytest.param(b"\x80\x05\x96" + struct.pack("<Q", 3 * 10**9) + b"x.", id="a long byte array"),
        pytest.param(b"\x80\x02" + 50_000 * LINEAR + b".", id="a name again and again"),
        pytest.param(
            b"\x80\x02" + LINEAR + b"q\x00" + b"(" + 10**5 * b"N" + b"tq\x01" + 1000 * b"h\x00h\x01R" + b".",
            id="many arguments again and again",
        ),
        pytest.param(b"\x80\x04\x95" + struct.pack("<Q", 10**12) + b"N.", id="a long frame"),
        pytest.param(b"\x80\x02" + 10**5 * b"(", id="deeply nested"),
    ],
)
def test_memory_is_in_proportion_to_the_file(pickled, legacy, tmp_path):
    path = write(tmp_path / "x.pt", pickled, legacy=legacy)
    tracemalloc.start()
    try:
        with open_pickled(path, admit_torch):
            pass
    except InputError as error:
        assert "is refused: it is damaged" in str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**25


# A tuple that holds a tuple twice, and so on, 26 deep: its hash takes seconds, and twice as long for each level more.
NESTED = b"Nq\x000" + 26 * b"h\x00h\x00\x86q\x000" + b"h\x00"


@pytest.mark.parametrize(
    "pickled",
    [
        pytest.param(b"}" + NESTED + b"Ns", id="an item"),
        pytest.param(b"}(" + NESTED + b"Nu", id="items"),
        pytest.param(b"(" + NESTED + b"Nd", id="a dictionary of protocol 0"),
        pytest.param(b"\x8f(" + NESTED + b"\x90", id="a set"),
        pytest.param(b"(" + NESTED + b"\x91", id="a frozen set"),
        pytest.param(b"(X\x07\0\0\0storage" + LINEAR + NESTED + b"NNtQ", id="a storage"),
    ],
)
def test_keys_are_hashed_at_once(pickled, tmp_path):
    path = write(tmp_path / "x.pt", b"\x80\x04" + pickled + b".", legacy=False)
    start = time.process_time()
    with pytest.raises(InputError, match="is refused: it is damaged"), open_pickled(path, admit_torch):
        pass
    assert time.process_time() - start < 0.5


def test_the_keys_of_storages_are_hashed_at_once(tmp_path):
    path = write(tmp_path / "x.pt", b"\x80\x02N.", legacy=True)
    path.write_bytes(path.read_bytes().removesuffix(pickle.dumps([], 2)) + b"\x80\x02](" + NESTED + b"e.")
    start = time.process_time()
    with pytest.raises(InputError, match="is refused: it is damaged"), open_pickled(path, admit_torch):
        pass
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_cut_file_is_one_line(legacy, tmp_path):
    buffer = io.BytesIO()
    torch.save({"x": nn.Linear(3, 2)}, buffer, _use_new_zipfile_serialization=not legacy)
    content = buffer.getvalue()
    for end in (0, 1, 20, len(content) // 2, len(content) - 1):
        (tmp_path / "x.pt").write_bytes(content[:end])
        refused = pytest.raises(InputError, match=r"x\.pt is refused: it is damaged")
        with refused, open_pickled(tmp_path / "x.pt", admit_all) as file:
            file.tensor(file.content["x"].state["_parameters"]["bias"])


def test_other_files_are_one_line(tmp_path):
    for content in (b"text", pickle.dumps(collections.OrderedDict(a=1)), b"PK\x05\x06" + bytes(18)):
        (tmp_path / "x.pt").write_bytes(content)
        with (
            pytest.raises(InputError, match=r"x\.pt is refused: it is damaged"),
            open_pickled(tmp_path / "x.pt", admit_all),
        ):
            pass
    with pytest.raises(InputError, match="no such file"), open_pickled(tmp_path / "none.pt", admit_all):
        pass


def test_a_compressed_file_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))
    with pytest.raises(InputError, match="is refused"), open_pickled(tmp_path / "x.pt", admit_all):
        pass
