"""Read files of torch.save that hold whole modules, without importing or running anything that they name.

`torch.load` with `weights_only=True` reads them; inert stubs stand for the classes that a file may name.
"""

import io
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoints import check_dense
from common.files import open_untrusted
from utils import InputError

MAX_MODULES = 1000  # a ResNet-152 has 423


class Stub:
    """An object of a file, with its attributes and without the methods of its class."""


def load_modules(path: str | Path, classes: Iterable[str]) -> Any:
    """Read a file of torch.save, of any version since 0.4, with stubs as the objects of these classes.

    Raises InputError if the file is missing, damaged, or names a class or function that is not among `classes`, such as
    torch.nn.modules.linear.Linear, and not one of torch's tensors or Python's containers.
    """
    allowed: list[Any] = [(type(name, (Stub,), {}), name) for name in classes]
    allowed += [(dict, "builtins.dict"), (_make_dict, "collections.defaultdict"), (_class_of, "stubs.class_of")]
    with open_untrusted(path) as file, torch.serialization.safe_globals(allowed):
        try:
            readable = file if zipfile.is_zipfile(path) else _replace_module_ids(file.read())
            return torch.load(readable, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if named := re.search(r"GLOBAL (\S{1,80})", str(error)):
                raise InputError(f"{path} is refused: it names {named[1]}, which is not allowed") from None
            raise


def state_dict(module: Any, path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a stub by name, as `nn.Module.state_dict` does. Errors name it by its `path`.

    Raises InputError if it is not a stub of a module, or if one of its tensors is not dense.
    """
    if not isinstance(module, Stub):
        raise InputError(f"{path} is of type {type(module).__name__}, not a module")
    tensors: dict[str, Tensor] = {}
    modules: list[tuple[str, Any]] = [("", module)]
    for prefix, parent in modules:  # the loop appends to it
        for name, tensor in (parent._parameters | parent._buffers).items():
            if tensor is not None:
                check_dense(tensor, f"{prefix}{name}", path)
                tensors[f"{prefix}{name}"] = tensor.detach()
        modules += [(f"{prefix}{name}.", child) for name, child in parent._modules.items() if child is not None]
        if len(modules) > MAX_MODULES:  # a module that contains itself
            raise InputError(f"{path} has more than {MAX_MODULES} modules")
    return tensors


def _replace_module_ids(content: bytes) -> io.BytesIO:
    """Return the content of a file of torch before 1.6 in a form that `weights_only=True` reads.

    These versions saved the class of a module as a persistent id, ("module", class, path, source), which torch refuses.
    A call of `_class_of` with the same four values replaces it. The result is trusted no more than the file.
    """
    file = io.BytesIO(content)
    ids, start, name = [], 0, ""  # positions of ids; where the latest tuple starts, and what it names
    for _ in range(4):  # pickles: a magic number, the version, the sizes of numbers, the content
        for opcode, argument, position in pickletools.genops(file):
            if opcode.name == "MARK":
                start, name = position, ""
            elif opcode.name == "GLOBAL":
                name = argument
            elif opcode.name == "BINPERSID" and name and not name.startswith("torch "):  # such as torch FloatStorage
                ids.append((start, position))
    parts, copied = [], 0
    for start, end in ids:
        parts += [content[copied:start], b"cstubs\nclass_of\n", content[start:end], pickle.REDUCE]
        copied = end + 1
    return io.BytesIO(b"".join([*parts, memoryview(content)[copied:]]))


def _class_of(kind: str, stub: type[Stub], source_path: str, source: str) -> type[Stub]:
    """Return the class in a persistent id."""
    return stub


def _make_dict(*args: Any) -> dict:
    """Return a dictionary in place of a defaultdict, which `weights_only=True` does not fill."""
    return {}
