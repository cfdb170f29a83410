"""Settings as flags, errors in one line, device and dtype: knows no model and no data set."""

import argparse
import contextlib
import ctypes
import dataclasses
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import torch


class InputError(ValueError):
    """A user's mistake, in one line that names the thing, the value and what to do."""


class StopRequested(Exception):  # noqa: N818 (not an error)
    """A program that ended itself in order because a signal asked it to."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


# ---------------------------------------------------------------------------------------------------- settings


def parse_settings(settings_class: type, arguments: Sequence[str] | None = None) -> Any:
    """Turn each field of a dataclass into a flag of the same name and return the filled dataclass.

    The field gives the type, the default and, through Literal, the choices; the comment behind it is the help, and a
    line `# group: NAME` starts a group of flags. bool becomes --x/--no-x, a tuple takes several values, and a field
    without a default is positional; where it is a tuple, there may be none. Text that is ~ or starts with ~/ is a path
    in the user's home folder, which a shell does not expand in quotes or after a =. The attribute `given` of the result
    holds the names of the flags on the command line, those given at their defaults too.
    """
    parser = _Parser(description=settings_class.__doc__, allow_abbrev=False)
    source = inspect.getsource(settings_class)
    help_texts = dict(re.findall(r"^    (\w+): .*#\s+(.*)$", source, re.MULTILINE))
    hints, defaults, group = get_type_hints(settings_class), {}, parser
    group_starts = {name: title for title, name in re.findall(r"^    # group: (.*)\n    (\w+):", source, re.MULTILINE)}
    for field in dataclasses.fields(settings_class):
        name, kind = field.name, hints[field.name]
        if name in group_starts:
            group = parser.add_argument_group(group_starts[name])
        options: dict[str, Any] = {"help": help_texts.get(name, "").replace("%", "%%")}
        if get_origin(kind) is Literal:
            options.update(choices=get_args(kind))
        elif kind is bool:
            options.update(action=argparse.BooleanOptionalAction)
        elif get_origin(kind) is tuple:
            options.update(type=get_args(kind)[0], nargs="+", metavar=name.upper())
        else:
            options.update(type=kind, metavar=name.upper())
        if field.default is dataclasses.MISSING:
            if get_origin(kind) is tuple:
                options.update(nargs="*")
            group.add_argument(name, **options)
        else:
            defaults[name] = field.default
            shown = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
            options["help"] += f" (default: {shown!r})" if shown == "" else f" (default: {shown})"
            group.add_argument(f"--{name}", default=argparse.SUPPRESS, **options)
    given = vars(parser.parse_args(arguments))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    settings = settings_class(**{name: expand_home(value) for name, value in (defaults | given).items()})
    object.__setattr__(settings, "given", frozenset(given))  # a frozen dataclass takes it no other way
    return settings


def replace_settings(settings: Any, **changes: Any) -> Any:
    """As `dataclasses.replace`, but the result was given the same flags."""
    replaced = dataclasses.replace(settings, **changes)
    object.__setattr__(replaced, "given", getattr(settings, "given", frozenset()))
    return replaced


def has_type(value: Any, hint: Any) -> bool:
    """Whether a value, such as one of a file, is of the type of a setting; an int does for a float."""
    if get_origin(hint) is Literal:
        return type(value) is str and value in get_args(hint)
    if get_origin(hint) is tuple:
        return type(value) is tuple and all(has_type(part, get_args(hint)[0]) for part in value)
    return type(value) in ((int, float) if hint is float else (hint,))


class _Parser(argparse.ArgumentParser):
    """argparse's parser, whose errors are one line without the usage, which fills a screen here."""

    def error(self, message: str) -> NoReturn:
        """End the script with exit status 2 and one line."""
        fail(f"{message} (--help lists all settings)")


def expand_home(value: Any) -> Any:
    """Text that is ~ or starts with ~/, also in a tuple, as a path in the home folder; any other value as it is."""
    if isinstance(value, tuple):
        return tuple(map(expand_home, value))
    if isinstance(value, str) and (value == "~" or value.startswith("~/")):
        return os.path.expanduser(value)
    return value


def run_script(main: Callable[[Any], None], settings_class: type) -> None:
    """Run `main` on the settings from the command line; a user's mistake ends in one line and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for words that the terminal's encoding does not have
    try:
        try:
            settings = parse_settings(settings_class)
            tune_malloc()
            main(settings)
        finally:
            flush_output()
    except InputError as error:
        fail(error)
    except BrokenPipeError:  # | head
        sys.exit(128 + 13)  # SIGPIPE, which Windows lacks
    except OSError as error:  # no permission, no space: the system names the file and the reason
        fail(f"{error.filename}: {error.strerror}" if error.filename else error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        fail(f"out of memory ({first_line(error)}): give smaller sizes, or use a machine with more")
    except StopRequested as stop:
        print(f"\n{stop}", file=sys.stderr)
        sys.exit(128 + stop.signum)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def flush_output() -> None:
    """Flush stdout. Where that fails (a closed pipe, a full disk), drop the rest, or Python complains at its exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be allocated, on a CPU (where torch has no class for it) or a GPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)


def tune_malloc() -> None:
    """Let glibc keep the large blocks that a program frees, and use them again.

    By default it returns most of them to the system, and a training step, which allocates the same blocks each time,
    spends a sixth of its time or more on page faults (docs/performance.md).
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at its maximum
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def fail(error: object) -> NoReturn:
    """End the script with exit status 2 and one line."""
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def require_at_least(settings: object, minimum: float, *names: str) -> None:
    """Raise InputError where one of the named settings, a number or a tuple of numbers, is below the minimum."""
    for name in names:
        values = getattr(settings, name)
        for value in values if isinstance(values, tuple) else (values,):
            if not value >= minimum:  # also true of nan
                raise InputError(f"--{name} {value}: must be at least {minimum}")


def require_below_one(settings: object, *names: str) -> None:
    """Raise InputError where one of the named settings, a share, is not in [0, 1)."""
    for name in names:
        if not 0 <= getattr(settings, name) < 1:
            raise InputError(f"--{name} {getattr(settings, name)}: must be below 1 and at least 0")


# -------------------------------------------------------------------------------------------- device and dtype


@dataclass(frozen=True)
class Runtime:
    """What a program computes on, and in which precision."""

    device: torch.device
    dtype: torch.dtype  # of autocast; float32 turns it off

    def autocast(self) -> torch.autocast:
        """Mixed precision as a context: master weights and losses stay float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def choose_runtime(device: str | torch.device, precision: str) -> Runtime:
    """The runtime of the settings --device and --precision. Raises InputError for a device that is not there.

    The precision "auto" is bfloat16 where the hardware multiplies it faster than float32: CUDA from Ampere on, CPUs
    with AMX, and AMD's with AVX512-BF16. It is float32 elsewhere.
    """
    device = choose_device(device)
    if precision == "auto":
        if device.type == "cuda":
            is_faster = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            is_faster = cpu_multiplies_bf16_faster(torch.cpu.get_capabilities())
        return Runtime(device, torch.bfloat16 if is_faster else torch.float32)
    return Runtime(device, {"bf16": torch.bfloat16, "fp32": torch.float32}[precision])


def cpu_multiplies_bf16_faster(capabilities: Mapping[str, Any]) -> bool:
    """Whether a CPU with these capabilities (`torch.cpu.get_capabilities`) multiplies bfloat16 faster than float32.

    Intel's AVX512-BF16 without AMX does not (docs/performance.md): large products ran at 83 GFLOP/s, 148 in float32.
    """
    return bool(capabilities.get("amx_bf16")) or (
        bool(capabilities.get("avx512_bf16")) and "Intel" not in capabilities.get("cpu_name", "")
    )


def choose_device(name: str | torch.device) -> torch.device:
    """The torch device of a setting; "auto" takes a CUDA device where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {first_line(error)}: use --device cpu") from None


def copy_to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device, copied there without waiting for it: such a copy needs contiguous, page-locked memory."""
    if x.device.type == "cpu" and device.type != "cpu":
        x = x.contiguous().pin_memory()  # both do nothing where a loader has done it
    return x.to(device, non_blocking=True)
