"""A pretend accelerator: tensors that say they are on device "gpu:0" while their numbers stay in CPU memory.

    with PretendGPU(ROOT) as gpu:
        x = torch.randn(3, device="gpu")
        x + torch.zeros(3)  # raises, as it does on CUDA
        x.sum().item()
    gpu.waits  # Counter({("read a number", "file function"): 1})

Every operation of torch passes `PretendGPU.__torch_dispatch__`, which checks it as CUDA would, counts what CUDA would
make the CPU wait for, and computes it on the CPU. Streams, the order of kernels, memory and speed are not pretended.
One process has one `PretendGPU`, since torch never takes the name of a device back: use it in a subprocess.
"""

import contextlib
import sys
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
    return_and_correct_aliasing,
)
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "gpu"
aten = torch.ops.aten

# CUDA needs a number of the result, or its shape, on the CPU.
READS = {
    aten._local_scalar_dense.default: "read a number",
    aten.equal.default: "compare two tensors",
    aten.nonzero.default: "count the nonzero elements",
    aten.masked_select.default: "count the selected elements",
    aten._unique2.default: "count the unique elements",
    aten.unique_consecutive.default: "count the unique elements",
    aten.repeat_interleave.Tensor: "count the repeated elements",
}
INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
    aten._unsafe_index_put.default,
}
COPIES = {aten._to_copy.default, aten.copy_.default}


class GPUTensor(torch.Tensor):
    """A tensor on the pretend device; `host` holds its numbers."""

    @staticmethod
    def __new__(cls, host):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=f"{NAME}:0",
        )

    def __init__(self, host):
        self.host = host

    def tolist(self):
        """Return the numbers as a list; torch's own method refuses a subclass."""
        return self.cpu().tolist()

    def __repr__(self):
        return f"GPUTensor({self.host})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func}: a tensor of the pretend device is used outside PretendGPU()")


class DeviceModule:
    """What torch asks of a device's module, as it asks torch.cuda."""

    is_initialized = is_available = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: None)  # its numbers come from the CPU's generator
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])


class PretendGPU(TorchDispatchMode):
    """In this context device "gpu" exists.

    `waits` counts the (operation, "file function") of the code below the folder `root` that made the CPU wait for the
    device.
    """

    def __init__(self, root):
        super().__init__()
        _setup_privateuseone_for_python_backend(NAME, DeviceModule())
        self._libraries = [*register_autocast(), register_lists()]  # torch forgets what is garbage
        self.root = str(Path(root).resolve())
        self.waits = Counter()
        self._pinned = []  # kept alive, so that no other tensor gets their memory
        torch.Tensor.is_pinned = lambda x, *_: any(x.untyped_storage().data_ptr() == p for p in self._pinned_pointers)
        torch.Tensor.pin_memory = lambda x, *_: x if x.is_pinned() else self._pin(x)

    @property
    def _pinned_pointers(self):
        return [x.untyped_storage().data_ptr() for x in self._pinned]

    def _pin(self, x):
        """A copy in what stands for page-locked memory; the last ones are remembered."""
        self._pinned = [*self._pinned[-50:], x.clone(memory_format=torch.contiguous_format)]
        return self._pinned[-1]

    def wait(self, operation):
        """Count a wait for the device, at the innermost function of the code under test."""
        self.waits[operation, self.caller()] += 1

    def caller(self):
        """The innermost function of the code under test, as "file function"."""
        frame = sys._getframe()
        while frame is not None:
            path, name = frame.f_code.co_filename, frame.f_code.co_name
            is_own = path.startswith(self.root) and "site-packages" not in path  # .venv may lie in the repository
            if is_own and path != __file__ and name[0] != "<":  # no lambda or comprehension
                return f"{path[len(self.root) + 1 :]} {name}"
            frame = frame.f_back
        return "backward"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        on_device = any(isinstance(leaf, GPUTensor) for leaf in tree_leaves((args, kwargs)))
        target = kwargs.get("device")
        to_device = target is not None and torch.device(target).type == NAME
        if not on_device and not to_device:
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled():  # it hands over operations that are made of others
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        self._check_devices(func, args, kwargs)
        self._count_wait(func, args, kwargs)
        if to_device:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        host_args, host_kwargs = tree_map_only(GPUTensor, lambda x: x.host, (args, kwargs))
        result = func(*host_args, **host_kwargs)
        if func is aten._to_copy.default and target is not None and not to_device:
            return result  # to the CPU
        if func is aten._local_scalar_dense.default or (
            func is aten.copy_.default and not isinstance(args[0], GPUTensor)
        ):
            return result
        # A view of a tensor made outside inference mode is no inference tensor either.
        is_plain_view = func.is_view and isinstance(args[0], torch.Tensor) and not args[0].is_inference()
        with torch.inference_mode(False) if is_plain_view else contextlib.nullcontext():
            result = tree_map_only(torch.Tensor, GPUTensor, result)
        return return_and_correct_aliasing(func, args, kwargs, result) if on_device else result

    def _check_devices(self, func, args, kwargs):
        """Raise where CUDA does: a tensor of the CPU beside one of the device.

        A copy may cross; an index may come from the CPU; a scalar of the CPU may be an operand, but not of a cat or
        stack.
        """
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_cpu = [x for x in tensors if not isinstance(x, GPUTensor)]
        if func in COPIES or not on_cpu or len(on_cpu) == len(tensors):
            return
        if func in INDEXING and isinstance(args[0], GPUTensor):
            on_cpu = [x for x in args[2:3] if not isinstance(x, GPUTensor)]  # the values
        if all(x.ndim == 0 for x in on_cpu) and not isinstance(args[0], (list, tuple)):
            return
        raise RuntimeError(
            f"{func} in {self.caller()}: a tensor {tuple(on_cpu[0].shape)} is on the CPU and others on {NAME}:0"
        )

    def _count_wait(self, func, args, kwargs):
        """Count what makes the CPU wait on CUDA."""
        if func in READS:
            self.wait(READS[func])
        elif func in INDEXING:
            for index in filter(None.__ne__, args[1]):
                if not isinstance(index, GPUTensor):
                    self.wait("index with a tensor of the CPU")
                elif index.dtype in (torch.bool, torch.uint8):
                    self.wait("index with a mask")
        elif func is aten._to_copy.default and kwargs.get("device") is not None:
            self._count_copy(args[0], torch.device(kwargs["device"]).type == NAME, kwargs.get("non_blocking", False))
        elif func is aten.copy_.default:
            self._count_copy(args[1], isinstance(args[0], GPUTensor), len(args) > 2 and args[2])

    def _count_copy(self, source, to_device, non_blocking):
        """Count a copy between CPU and device that waits: all but an asynchronous one from page-locked memory."""
        if isinstance(source, GPUTensor) == to_device:
            return
        if not to_device:
            self.wait("copy to the CPU")
        elif not (non_blocking and source.is_pinned() and source.is_contiguous()):
            self.wait("copy to the device")


def register_lists():
    """A list as an index, `x[..., [0, 1]]`, which torch copies to the device below every dispatch mode."""
    library = torch.library.Library("aten", "IMPL", "PrivateUse1")

    def empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
        return GPUTensor(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))

    def copy_from(source, target, non_blocking=False):
        mode = _get_current_dispatch_mode()
        if isinstance(mode, PretendGPU):
            mode.wait("index with a list")
        target.host.copy_(source)
        return target

    library.impl("empty_strided", empty_strided)
    library.impl("_copy_from", copy_from)
    return library


def register_autocast():
    """torch.autocast("gpu", ...) with CUDA's rules, for the operations that the project uses."""
    lower_precision = "mm addmm bmm baddbmm matmul linear conv2d convolution addmv mv"
    float32 = (
        "softmax.int log_softmax.int nll_loss layer_norm norm.ScalarOpt_dim prod cumsum exp log sum sum.dim_IntList"
    )
    fallback = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    fallback.fallback(torch.library.fallthrough_kernel)
    library = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    autocast_key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def casting(op, dtype):
        def cast(x):
            changes = x.is_floating_point() and x.dtype != torch.float64 and x.device.type == NAME
            return x.to(dtype or torch.get_autocast_dtype(NAME)) if changes else x

        def kernel(*args, **kwargs):
            with torch._C._ExcludeDispatchKeyGuard(autocast_key):
                args, kwargs = tree_map_only(torch.Tensor, cast, (args, kwargs))
                return op(*args, **kwargs)

        return kernel

    for names, dtype in ((lower_precision, None), (float32, torch.float32)):
        for name in names.split():
            packet, _, overload = name.partition(".")
            library.impl(name, casting(getattr(getattr(aten, packet), overload or "default"), dtype))
    return fallback, library
