"""Files of torch.save that hold whole modules, read as data: no class or function that a file names is looked up.

`torch.load` with `weights_only=True` and stand-ins for the classes reads the zip format alone. In the format before
torch 1.6 the classes of modules are persistent ids, and it refuses those of anything but storages.
"""

import contextlib
import io
import mmap
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import torch
from torch import Tensor

from common.files import check_zip, reraise_as_refused
from utils import InputError

LEGACY_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C  # the first pickle of a file of torch before 1.6
DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.LongStorage": torch.int64,
    "torch.ByteStorage": torch.uint8,
}
MAX_ARGS = 20  # of a call; torch's functions that make a tensor have seven


class PickledObject(dict):
    """An object of a file: the arguments it was made with, its state, and its items where it is a dictionary.

    Each name in a file becomes a subclass of this, so a call of whatever it stands for makes an object that does
    nothing.
    """

    name = ""  # of the class or function, with its module
    args: tuple
    state: dict[Any, Any]
    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]  # an optimizer has parameters as keys

    def __new__(cls, *args: Any) -> "PickledObject":
        if len(args) > MAX_ARGS:  # each call copies its arguments
            raise ValueError("a call with many arguments")
        made = super().__new__(cls)
        made.args, made.state = args, {}
        return made

    def __init__(self, *args: Any) -> None:
        pass  # the arguments are no items

    def __setstate__(self, state: Any) -> None:
        """Keep the state. Raises ValueError where it is no dictionary: torch's modules and optimizers have one."""
        if not isinstance(state, dict):
            raise ValueError("a state that is not a dictionary")
        self.state = state


class Storage(NamedTuple):
    """A storage that a file's tensors refer to; its numbers are read when a tensor is."""

    kind: str  # such as torch.FloatStorage
    key: str  # its name in the file
    length: int  # numbers


class PickledFile:
    """What a file holds, `content`, in dictionaries, lists and `PickledObject`; `tensor` reads a tensor of it."""

    def __init__(self, path: str | Path, content: Any, read_storage: Callable[[str], bytes]) -> None:
        self.path, self.content = path, content
        self._read_storage = read_storage
        self._storages: dict[str, Tensor] = {}

    def tensor(self, pickled: Any) -> Tensor:
        """Read a tensor or parameter of `content`; InputError where it is not a tensor, or not contiguous.

        Tensors of one storage share its memory, so all tensors together take no more than the file's size.
        """
        with reraise_as_refused(self.path):
            while pickled.name == "torch._utils._rebuild_parameter":
                pickled = pickled.args[0]
            if pickled.name != "torch._utils._rebuild_tensor_v2":
                raise ValueError("not a tensor")
            storage, offset, shape, stride = pickled.args[:4]
            if storage.key not in self._storages:
                numbers = bytearray(self._read_storage(storage.key))  # torch wants memory that it may write
                self._storages[storage.key] = torch.frombuffer(numbers, dtype=DTYPES[storage.kind])
            tensor = self._storages[storage.key].as_strided(shape, stride, offset)
            if not tensor.is_contiguous():  # one number can stand for a terabyte
                raise ValueError("not contiguous")
            return tensor


class _Unpickler(pickle._Unpickler):
    """pickle's unpickler in Python; `admitted` as in `open_pickled`. That in C can allocate more than the file's size.

    Opcodes that torch.save does not write and that could take more memory or time than the file's size explains raise
    ValueError: byte arrays, which are allocated before they are read, and elements of sets, which are hashed.

    Attributes: storages, by their keys.
    """

    stack: list[Any]
    _load: ClassVar[Any] = pickle._Unpickler.dispatch  # by opcode

    def __init__(self, file: BinaryIO | mmap.mmap, path: str | Path, admitted: Callable[[str], bool]) -> None:
        super().__init__(file)
        self.path, self.admitted = path, admitted
        self.storages: dict[str, Storage] = {}
        self._classes: dict[str, type[PickledObject]] = {}

    def find_class(self, module_name: str, global_name: str) -> type[PickledObject]:
        """The class that stands for a name of the file. Raises InputError for a name that is not admitted."""
        name = f"{module_name}.{global_name}"
        if not self.admitted(name):
            raise InputError(f"{self.path} is refused: it names {ascii(name)[:80]}, which has no place in it")
        if name not in self._classes:
            self._classes[name] = type("Pickled", (PickledObject,), {"name": name})
        return self._classes[name]

    def get_extension(self, code: int) -> None:
        """Raise an exception: a name of pickle's registry of extensions would not pass through `find_class`."""
        raise ValueError("an extension of pickle")

    def persistent_load(self, pid: Any) -> Any:
        """A storage or, in the format before torch 1.6, the class of a module."""
        if pid[0] == "module":
            return pid[1]  # with the file and the text of its source
        kind, key, _, length, *view = pid[1:]
        if pid[0] != "storage" or view not in ([], [None]) or not isinstance(key, str):
            raise ValueError("not a storage, or a part of one")
        self.storages[key] = Storage(kind.name, key, length)
        return self.storages[key]

    def load_setitem(self) -> None:
        """An item of a dictionary: its key and value are the last of the stack."""
        require_keys(self.stack[-2:-1])
        self._load[pickle.SETITEM[0]](self)

    def load_setitems(self) -> None:
        """Several items of a dictionary: keys and values alternate on the stack."""
        require_keys(self.stack[::2])
        self._load[pickle.SETITEMS[0]](self)

    def load_dict(self) -> None:
        """A dictionary of protocol 0 with its items: as `load_setitems`."""
        require_keys(self.stack[::2])
        self._load[pickle.DICT[0]](self)

    def refuse(self) -> None:
        """Raise an exception, in place of an opcode."""
        raise ValueError("an opcode that torch.save does not write")

    dispatch: ClassVar[Any] = {
        **_load,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.BYTEARRAY8[0]: refuse,
        pickle.NEXT_BUFFER[0]: refuse,
        pickle.READONLY_BUFFER[0]: refuse,
        pickle.ADDITEMS[0]: refuse,
        pickle.FROZENSET[0]: refuse,
    }


def require_keys(keys: Iterable[Any]) -> None:
    """Raise ValueError for a key of a dictionary that is not hashed at once, as a nested tuple is not."""
    if not all(isinstance(key, str | int | PickledObject) for key in keys):
        raise ValueError("a key that is no string, integer or object")


@contextlib.contextmanager
def open_pickled(path: str | Path, admitted: Callable[[str], bool]) -> Iterator[PickledFile]:
    """Open a file of any version of torch.save. Nothing in it is executed.

    Args:
        path: the file, which must stay as it is in the block.
        admitted: whether the file may name a class or function, such as torch.nn.modules.linear.Linear.

    Raises InputError where the file is missing, damaged, or names what is not admitted.
    """
    if not Path(path).is_file():
        raise InputError(f"no such file: {path}")
    with contextlib.ExitStack() as stack:
        with reraise_as_refused(path):
            file = stack.enter_context(open(path, "rb"))
            check_zip(file)
            if zipfile.is_zipfile(file):
                opened = _open_zip(stack.enter_context(zipfile.ZipFile(file)), path, admitted)
            else:
                content = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                opened = _open_legacy(content, path, admitted)
        yield opened


def _open_zip(archive: zipfile.ZipFile, path: str | Path, admitted: Callable[[str], bool]) -> PickledFile:
    """A file of torch since 1.6: a zip archive of a pickle, and a record for each storage."""
    (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
    folder = name.removesuffix("data.pkl")
    content = _Unpickler(io.BytesIO(archive.read(name)), path, admitted).load()
    return PickledFile(path, content, lambda key: archive.read(f"{folder}data/{key}"))


def _open_legacy(file: mmap.mmap, path: str | Path, admitted: Callable[[str], bool]) -> PickledFile:
    """A file of torch before 1.6: five pickles, the last the keys of the storages; then each one's length and numbers.

    The first three are a magic number, the version, and sizes of numbers.
    """
    magic_number, _, _ = (_Unpickler(file, path, admitted).load() for _ in range(3))
    if magic_number != LEGACY_MAGIC_NUMBER:
        raise ValueError("not a file of torch.save")
    unpickler = _Unpickler(file, path, admitted)
    content = unpickler.load()
    slices = {}
    keys = _Unpickler(file, path, admitted).load()
    require_keys(keys)
    for key in keys:
        storage = unpickler.storages[key]
        if int.from_bytes(file.read(8), "little") != storage.length:
            raise ValueError("another length than its tensors have")
        start = file.tell()
        end = start + storage.length * DTYPES[storage.kind].itemsize
        file.seek(end)  # ValueError behind the file's end
        slices[key] = slice(start, end)
    return PickledFile(path, content, lambda key: file[slices[key]])
