"""Files of whole modules, read as data: what torch.save wrote, and what somebody made to do harm."""

import os
import pickle
import re
import struct
import tracemalloc
import zipfile

import pytest
import torch
from torch import nn

from conftest import peak_memory
from tools.pickled_modules import Stub, load_modules, state_dict
from utils import InputError

CLASSES = [f"torch.nn.modules.{name}" for name in ("container.Sequential", "linear.Linear", "batchnorm.BatchNorm1d")]
CLASSES += ["torch.nn.modules.dropout.Dropout", "torch.optim.adam.Adam"]
MARKER = "run"  # a file that a malicious pickle makes
FORMATS = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


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
            archive.writestr("archive/version", b"3\n")
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
    pid = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu" + dumps(storage_length) + b"NtQ"
    numbers = b"".join(dumps(each) for each in (offset, size, stride))
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + pid + numbers + b"\x89NtR."


@FORMATS
def test_modules_optimizers_and_tensors_are_read(legacy, tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Sequential(nn.Linear(2, 2, bias=False), nn.Dropout(0.3))
    )
    module.register_module("nothing", None)
    optimizer, shared = torch.optim.Adam(module.parameters()), torch.randn(4, 3)
    module[:3](torch.randn(4, 3)).sum().backward()
    optimizer.step()
    content = {"module": module, "optimizer": optimizer, "numbers": [1, 2.5, "module", None, (True,)]}
    content["rows"] = shared[2:]
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    found = load_modules(tmp_path / "x.pt", CLASSES)
    tensors, expected = state_dict(found["module"], "x.pt"), module.state_dict()
    assert tensors.keys() == expected.keys() and len(tensors) == 8
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert isinstance(found["module"], Stub) and not isinstance(found["module"], nn.Module)
    assert found["module"]._modules["2"]._modules["1"].p == 0.3
    assert len(found["optimizer"].state) == 5 and found["optimizer"].defaults["lr"] == 1e-3
    assert found["numbers"] == content["numbers"]
    assert torch.equal(found["rows"], content["rows"])


CODE = f"open({MARKER!r}, 'w').close()"
LINEAR = b"ctorch.nn.modules.linear\nLinear\n"
DEFAULTS = dumps("__defaults__")
SETSTATE = dumps("__setstate__") + b"cposix\nsystem\ns"
MODULE_ID = b"(X\x06\0\0\0module"
MALICIOUS = {
    "a command": call("posix", "system", f"touch {MARKER}"),
    "code": call("builtins", "eval", CODE),
    "code of protocol 4": b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93" + dumps(CODE) + b"\x85R.",
    "a dotted name": b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c\x09touch run\x85R.",
    "code of protocol 0": b"(S" + repr(CODE).encode() + b"\nibuiltins\nexec\n.",
    "an object of protocol 1": b"(cbuiltins\nexec\n" + dumps(CODE) + b"o.",
    "a loader inside": call("torch", "load", "x.pt"),
    "a class of a module": b"\x80\x02" + MODULE_ID + b"cbuiltins\nexec\nNNtQ" + dumps((CODE,)) + b"R.",
    "an argument of a module": b"\x80\x02" + MODULE_ID + LINEAR + b"cbuiltins\nexec\n" + dumps((CODE,)) + b"RNtQ.",
    "the state of a known class": b"\x80\x02" + LINEAR + b")\x81}" + SETSTATE + b"b" + dumps("touch run") + b"b.",
    "an attribute of a known class": b"\x80\x02" + LINEAR + b"N}" + SETSTATE + b"\x86b.",
    "an attribute of a function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}" + DEFAULTS + b")s\x86b.",
    "an extension": b"\x80\x02\x82\x01)R.",
}  # fmt: skip


@FORMATS
@pytest.mark.parametrize("name", MALICIOUS)
def test_nothing_runs_and_the_error_is_one_line(name, legacy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "x.pt", MALICIOUS[name], legacy=legacy)
    before = torch._utils._rebuild_tensor_v2.__defaults__
    with pytest.raises(InputError, match="is refused: ") as caught:
        load_modules(path, CLASSES)
    assert "\n" not in str(caught.value)
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
    "fewer numbers than said": (tensor(8, (8,), (1,)), [("0", 8, bytes(4))]),
    "a large number of a memo": (b"\x80\x02]r\xff\xff\xff\x7f.", []),
    "long bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 10**12) + b"x.", []),
    "a long byte array": (b"\x80\x05\x96" + struct.pack("<Q", 3 * 10**9) + b"x.", []),
    "deeply nested": (b"\x80\x02" + 10**4 * b"(", []),
}


@FORMATS
@pytest.mark.parametrize("name", DAMAGED)
def test_memory_is_in_proportion_to_the_file(name, legacy, tmp_path):
    pickled, storages = DAMAGED[name]
    path = write(tmp_path / "x.pt", pickled, legacy=legacy, storages=storages)
    before = peak_memory(reset=True)
    tracemalloc.start()
    try:
        weight, module = load_modules(path, CLASSES), Stub()
        vars(module).update(_parameters={"weight": weight}, _buffers={}, _modules={})
        state_dict(module, path)
    except InputError as error:
        assert re.search("is refused: it is damaged|are not one after another|is not a dense tensor", str(error))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**25 and peak_memory() - before < 2**26


@FORMATS
def test_cut_and_other_files_are_one_line(legacy, tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"x": nn.Linear(3, 2)}, path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    cut = [whole[:end] for end in (0, 1, 20, len(whole) // 2, len(whole) - 1)]
    for content in [*cut, b"text", pickle.dumps({"a": 1}), b"PK\x05\x06" + bytes(18)]:
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"x\.pt is refused: it is damaged"):
            load_modules(path, CLASSES)
    with pytest.raises(InputError, match="no such file"):
        load_modules(tmp_path / "none.pt", CLASSES)
