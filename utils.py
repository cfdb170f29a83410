"""Settings as flags, one-line errors, device and precision."""

import argparse
import contextlib
import ctypes
import dataclasses
import inspect
import io
import operator
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import torch

S = TypeVar("S", bound="BaseSettings")


PRECISIONS = ("auto", "bf16", "fp32")  # of `choose_runtime`


class InputError(ValueError):
    """A user's mistake, described in one line: what is wrong, the value, what to do."""


class StopRequested(Exception):  # noqa: N818 (not an error)
    """Orderly end of a program that a signal asked to stop."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


# ---------------------------------------------------------------------------------------------------- settings


def setting(
    default: Any,
    *,
    choices: Iterable[str] = (),
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    needs: str = "",
) -> Any:
    """Declare a field of `BaseSettings` with its default and what its value must satisfy.

    Args:
        choices: allowed values; any iterable of names, such as a table of classes. Each item of a tuple is one.
        minimum, above, maximum, below: bounds of a number, or of each number of a tuple.
        needs: conditions without which the setting has no effect; see `unmet_condition`.
    """
    bounds = {"minimum": minimum, "above": above, "maximum": maximum, "below": below}
    return dataclasses.field(default=default, metadata={"choices": tuple(choices), "needs": needs} | bounds)


@dataclass(frozen=True, kw_only=True)
class BaseSettings:
    """Base class of all settings: a frozen dataclass whose fields are the flags of a script.

    A field's comment is the help of its flag, and a comment `# group: NAME` above a field starts a group of flags.
    Creating an instance checks the values. Raises InputError for a value out of range.

    Attributes:
        given: names of the settings on the command line, or passed as keyword arguments.
    """

    given: ClassVar[frozenset[str]] = frozenset()
    NOT_FLAGS: ClassVar[tuple[str, ...]] = ()  # inherited fields that a script sets itself
    INHERITED_NEEDS: ClassVar[dict[str, str]] = {}  # `needs` of inherited fields; "" is the key of all others

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_value(field, getattr(self, field.name))

    def replace(self: S, **changes: Any) -> S:
        """Return a copy with changes, with the same settings given."""
        return _mark_given(dataclasses.replace(self, **changes), self.given)


def _mark_given(settings: S, names: Iterable[str]) -> S:
    """Set `given` of a settings object and return the object."""
    object.__setattr__(settings, "given", frozenset(names))  # bypasses frozen=True
    return settings


def check_value(field: dataclasses.Field, value: Any) -> None:
    """Raise InputError if a value is not one of the choices of its field, or out of its range."""
    rules = field.metadata
    for item in value if isinstance(value, tuple) else (value,):
        if rules.get("choices") and item not in rules["choices"]:
            raise InputError(f"--{field.name} {item}: choose from {' '.join(rules['choices'])}")
        bounds = {
            "at least": (operator.ge, rules.get("minimum")),
            "above": (operator.gt, rules.get("above")),
            "at most": (operator.le, rules.get("maximum")),
            "below": (operator.lt, rules.get("below")),
        }
        for words, (satisfies, bound) in bounds.items():
            if bound is not None and not satisfies(item, bound):  # also true of nan
                raise InputError(f"--{field.name} {item}: must be {words} {bound}")


def require_needs(settings: BaseSettings) -> None:
    """Raise InputError if a setting that was given has no effect, because another one that it needs is off.

    A setting that is off by default (0, empty or False) and is on in `settings` counts as given.
    """
    own = inspect.get_annotations(type(settings))
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        is_given = field.name in settings.given or (value and not field.default)
        is_off = value is False or value in ("", ()) or not (value or field.default)
        if is_off or not is_given:
            continue
        needs = field.metadata.get("needs", "").split("; ")
        if field.name not in own:
            needs += settings.INHERITED_NEEDS.get(field.name, settings.INHERITED_NEEDS.get("", "")).split("; ")
        for condition in filter(None, needs):
            if problem := unmet_condition(settings, condition):
                shown = "" if isinstance(value, bool) else " " + " ".join(map(str, _as_tuple(value)))
                raise InputError(f"--{field.name}{shown} {problem}")


def unmet_condition(settings: BaseSettings, condition: str) -> str:
    """Return why a condition on settings does not hold, as the end of a sentence, or "" if it holds.

    A condition is `NAME` (on: neither 0 nor empty), `NAME=VALUE` or `NAME=VALUE,VALUE`, `NAME>NUMBER`, one of these
    behind `not `, or several joined by ` or `. In `needs`, conditions that must all hold are joined by "; ".
    """
    if condition.startswith("not "):
        flag, holds = _read_condition(settings, condition.removeprefix("not "))
        return f"cannot be combined with {flag}: remove one of them" if holds else ""
    alternatives = [_read_condition(settings, each) for each in condition.split(" or ")]
    if any(holds for _, holds in alternatives):
        return ""
    return f"requires {' or '.join(flag for flag, _ in alternatives)}"


def _read_condition(settings: BaseSettings, condition: str) -> tuple[str, bool]:
    """Return a single condition as flags, and whether it holds."""
    match = re.fullmatch(r"(\w+)([=>]?)(.*)", condition)
    assert match, condition
    name, sign, wanted = match.groups()
    value = getattr(settings, name)
    if sign == "=":
        return f"--{name} {wanted.replace(',', ' or ')}", value in wanted.split(",")
    if sign == ">":
        return f"--{name} above {wanted}", value > float(wanted)
    return f"--{name}", bool(value)


def parse_settings(settings_class: type[S], arguments: Sequence[str] | None = None) -> S:
    """Return settings filled from command-line flags, one for each field of the class.

    bool becomes --x/--no-x and a tuple takes several values. A field without a default is positional; if it is a tuple,
    there may be none. @FILE.txt reads flags from a file, one a line with its values; # starts a comment. A leading ~ is
    expanded to the home folder, because shells do not expand it within quotes or after =.
    """
    parser = _Parser(description=settings_class.__doc__, allow_abbrev=False)
    hints = get_type_hints(settings_class)
    fields = {field.name: field for field in dataclasses.fields(settings_class)}
    groups: dict[str, Any] = {"": parser}
    for name, group, help_text in _describe_fields(settings_class):
        field, kind = fields[name], hints[name]
        options: dict[str, Any] = {"help": help_text.replace("%", "%%"), "metavar": name.upper()}
        if kind is bool:
            options = {"help": options["help"], "action": argparse.BooleanOptionalAction}
        elif get_origin(kind) is tuple:
            options |= {"type": get_args(kind)[0], "nargs": "+"}
        else:
            options["type"] = kind
        if choices := field.metadata.get("choices"):
            options["metavar"] = "{" + ",".join(choices) + "}"
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        if field.default is dataclasses.MISSING:
            if get_origin(kind) is tuple:
                options["nargs"] = "*"
            groups[group].add_argument(name, **options)
        else:
            shown = " ".join(map(str, _as_tuple(field.default)))
            options["help"] += f" (default: {shown or repr(shown)})"
            groups[group].add_argument(f"--{name}", default=argparse.SUPPRESS, **options)
    given = vars(parser.parse_args(expand_files(sys.argv[1:] if arguments is None else arguments)))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return _mark_given(settings_class(**{name: expand_home(value) for name, value in given.items()}), given)


def _describe_fields(settings_class: type) -> Iterator[tuple[str, str, str]]:
    """Yield the name, group and help of each flag: fields of the class itself first, then those of its base classes."""
    left = {field.name for field in dataclasses.fields(settings_class)} - set(settings_class.NOT_FLAGS)
    for owner in settings_class.__mro__[:-1]:
        source, group = inspect.getsource(owner), ""
        # A field is one line, or several if a formatter has wrapped it; the comment ends the last one.
        pattern = r"^    (?:# group: (.*)|(\w+): (?:.*\(\n(?: {8}.*\n)+    \)|.*?)(?:  # (.*))?)$"
        for title, name, comment in re.findall(pattern, source, re.MULTILINE):
            group = title or group
            if name in left:
                left.remove(name)  # a class may give an inherited field another default
                yield name, group, comment


def make_settings(settings_class: type[S], values: Mapping[str, Any]) -> S:
    """Return settings filled from keyword arguments, which count as given.

    Raises InputError for a name that is not a setting, a value of another type, and a setting without effect.
    """
    hints = get_type_hints(settings_class)
    names = [field.name for field in dataclasses.fields(settings_class)]
    converted = {}
    for name, value in values.items():
        if name not in names:
            similar = get_close_matches(name.removeprefix("num_"), names, 1)
            hint = f"did you mean {similar[0]}? " if similar else ""
            raise InputError(f"{name} is not a setting: {hint}choose from {' '.join(names)}")
        if isinstance(value, list):
            value = tuple(value)
        elif hasattr(value, "item"):  # a number of NumPy or torch
            value = value.item()
        if not has_type(value, hints[name]):
            raise InputError(f"{name}={value!r}: must be of type {getattr(hints[name], '__name__', hints[name])}")
        converted[name] = value
    settings = _mark_given(settings_class(**converted), converted)
    require_needs(settings)
    return settings


def has_type(value: Any, hint: Any) -> bool:
    """Return True if a value, such as one read from a file, is of a setting's type; an int passes for a float."""
    if get_origin(hint) is tuple:
        return type(value) is tuple and all(has_type(part, get_args(hint)[0]) for part in value)
    return type(value) in ((int, float) if hint is float else (hint,))


def _as_tuple(value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,)


class _Parser(argparse.ArgumentParser):
    """argparse's parser with one-line errors: the usage would fill a screen."""

    def error(self, message: str) -> NoReturn:
        """End the script with exit status 2 and one line."""
        fail(f"{message} (--help lists all settings)")


def expand_files(arguments: Sequence[str]) -> list[str]:
    """Replace each argument @FILE.txt by the flags in that file. Raises InputError if the file cannot be read."""
    expanded: list[str] = []
    for argument in arguments:
        if not (argument.startswith("@") and argument.endswith(".txt")):
            expanded.append(argument)
            continue
        try:
            for line in Path(expand_home(argument[1:])).read_text(encoding="utf-8-sig").splitlines():
                words = shlex.shlex(line, posix=True, punctuation_chars=False)
                words.whitespace_split, words.escape = True, ""  # a backslash separates folders on Windows
                expanded += words
        except (OSError, ValueError) as error:
            raise InputError(f"{argument}: {first_line(error)}") from None
    return expanded


def expand_home(value: Any) -> Any:
    """Expand a leading ~ or ~/ to the home folder, also in a tuple; return any other value unchanged."""
    if isinstance(value, tuple):
        return tuple(map(expand_home, value))
    if isinstance(value, str) and (value == "~" or value.startswith("~/")):
        return os.path.expanduser(value)
    return value


def run_script(main: Callable[[Any], None], settings_class: type) -> None:
    """Run `main` on the settings from the command line; report a user's mistake in one line, with exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # words may not fit the terminal's encoding
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
    except OSError as error:  # no permission or no space; the system names the file and the reason
        fail(f"{error.filename}: {error.strerror}" if error.filename else error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        fail(f"out of memory ({first_line(error)}): reduce the sizes or use a machine with more memory")
    except StopRequested as stop:
        print(f"\n{stop}", file=sys.stderr)
        sys.exit(128 + stop.signum)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def flush_output() -> None:
    """Flush stdout. If that fails (a closed pipe, a full disk), drop the rest: Python would complain at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error says that memory could not be allocated; on a CPU, torch has no class for it."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)


def tune_malloc() -> None:
    """Let glibc keep and reuse the large blocks that a program frees.

    By default glibc returns most of them to the system. A training step allocates the same blocks each time and then
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
    """Return the first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


# -------------------------------------------------------------------------------------------- device and dtype


@dataclass(frozen=True)
class Runtime:
    """The device and precision of a program."""

    device: torch.device
    dtype: torch.dtype  # of autocast; float32 turns it off

    def autocast(self) -> torch.autocast:
        """Mixed precision as a context: master weights and losses stay float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def choose_runtime(device: str | torch.device, precision: str) -> Runtime:
    """Return the runtime of the settings --device and --precision.

    The precision "auto" is bfloat16 if the hardware multiplies it faster than float32: CUDA from Ampere on, CPUs with
    AMX, and AMD's with AVX512-BF16. Otherwise it is float32.

    Raises InputError for a device that does not exist.
    """
    device = choose_device(device)
    if precision not in PRECISIONS:
        raise InputError(f"--precision {precision}: choose from {' '.join(PRECISIONS)}")
    if precision == "auto":
        if device.type == "cuda":
            is_faster = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            is_faster = cpu_multiplies_bf16_faster(torch.cpu.get_capabilities())
        return Runtime(device, torch.bfloat16 if is_faster else torch.float32)
    return Runtime(device, {"bf16": torch.bfloat16, "fp32": torch.float32}[precision])


def cpu_multiplies_bf16_faster(capabilities: Mapping[str, Any]) -> bool:
    """Return True if a CPU with these capabilities (`torch.cpu.get_capabilities`) multiplies bfloat16 faster.

    Intel's AVX512-BF16 without AMX does not: large products ran at 83 GFLOP/s, at 148 in float32 (docs/performance.md).
    """
    return bool(capabilities.get("amx_bf16")) or (
        bool(capabilities.get("avx512_bf16")) and "Intel" not in capabilities.get("cpu_name", "")
    )


def choose_device(name: str | torch.device) -> torch.device:
    """Return the torch device of a setting; "auto" is a CUDA device if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {first_line(error)}: use --device cpu") from None


def copy_to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device asynchronously, which requires contiguous, page-locked memory."""
    if x.device.type == "cpu" and device.type != "cpu":
        x = x.contiguous().pin_memory()  # no-ops if the loader already did this
    return x.to(device, non_blocking=True)
