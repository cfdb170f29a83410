"""Settings as flags, seeds and devices, files written whole, the run log: knows no model and no data set."""

import argparse
import contextlib
import ctypes
import glob
import inspect
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import torch
from torch import distributed


class InputError(ValueError):
    """What a user got wrong, in one line that names the thing, the value and the way on."""


# ---------------------------------------------------------------------------------------------------- settings


def parse_settings(Settings, arguments=None):
    """Turn each field of a dataclass into a flag of the same name and return the filled dataclass.

    The field gives the type, the default and, through Literal, the choices; the comment behind it is the help.
    bool becomes --x/--no-x, a tuple takes several values, and a field without a default is positional.
    """
    parser = argparse.ArgumentParser(description=Settings.__doc__, allow_abbrev=False)
    help_texts = dict(re.findall(r"^    (\w+): .*#\s+(.*)$", inspect.getsource(Settings), re.MULTILINE))
    for name, kind in get_type_hints(Settings).items():
        default = getattr(Settings, name, None)
        options = {"help": help_texts.get(name, "").replace("%", "%%")}
        if get_origin(kind) is Literal:
            options.update(choices=get_args(kind))
        elif kind is bool:
            options.update(action=argparse.BooleanOptionalAction)
        elif get_origin(kind) is tuple:
            options.update(type=get_args(kind)[0], nargs="+", metavar=name.upper())
        else:
            options.update(type=kind, metavar=name.upper())
        if default is None:
            parser.add_argument(name, **options)
        else:
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            options["help"] += f" (default: {shown!r})" if shown == "" else f" (default: {shown})"
            parser.add_argument(f"--{name}", default=default, **options)
    values = vars(parser.parse_args(arguments))
    return Settings(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def run_script(main, Settings):
    """Run `main` on the settings from the command line; what a user can mend ends in one line and exit status 2."""
    settings = parse_settings(Settings)
    keep_freed_memory()
    try:
        main(settings)
    except InputError as error:
        fail(error)
    except OSError as error:  # no permission, no space: the system names the file and the reason
        fail(f"{error.filename}: {error.strerror}" if error.filename else error)
    except Stopped as stop:
        print(f"\n{stop}", file=sys.stderr)
        sys.exit(128 + stop.number)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def keep_freed_memory():
    """Let glibc keep the large blocks that a program frees, to use them again.

    It gives most of them back to the system otherwise, and a training step, which takes the same blocks each time,
    spends a sixth of its time and more on page faults (benchmarks/README.md).
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at its maximum
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def fail(error):
    """End the script with exit status 2 and one line."""
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


def require_at_least(settings, minimum, *names):
    """Raise InputError where one of the named settings, a number or a tuple of numbers, is below the minimum."""
    for name in names:
        values = getattr(settings, name)
        for value in values if isinstance(values, tuple) else (values,):
            if not value >= minimum:  # also true of nan
                raise InputError(f"--{name} {value}: must be at least {minimum}")


def require_below_one(settings, *names):
    """Raise InputError where one of the named settings, a share, is not in [0, 1)."""
    for name in names:
        if not 0 <= getattr(settings, name) < 1:
            raise InputError(f"--{name} {getattr(settings, name)}: must be below 1 and at least 0")


class Stopped(Exception):
    """A program that ended itself in order because a signal asked it to."""

    def __init__(self, number, message):
        super().__init__(message)
        self.number = number


@contextlib.contextmanager
def stop_signals():
    """Yield a list that Ctrl-C and SIGTERM append their number to, instead of stopping at once; a second one does."""
    caught = []

    def catch(number, _):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number, handler in former.items():
            if handler is not signal.SIG_IGN:  # a program under nohup or & shall not be stopped
                signal.signal(number, catch)
        yield caught
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------- several processes


def rank():
    """The number of this process, 0 for the first or only one: the one that writes files and prints."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size():
    """The number of processes that train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


@contextlib.contextmanager
def processes(device_name):
    """Yield this process's device, having joined the others where torchrun started several."""
    if not distributed.is_torchelastic_launched():
        yield choose_device(device_name)
        return
    if device_name == "cuda" or (device_name == "auto" and torch.cuda.is_available()):
        device_name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = choose_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    output = io.StringIO() if rank() else sys.stdout  # one voice
    try:
        with contextlib.redirect_stdout(output):
            yield device
    finally:
        distributed.destroy_process_group()


def add_up(numbers):
    """A list of numbers, each the sum over all processes."""
    if world_size() == 1:
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64)
    distributed.all_reduce(total)
    return [type(number)(value) for number, value in zip(numbers, total.tolist(), strict=True)]


def gather(items):
    """The lists of all processes as one, in their order."""
    if world_size() == 1:
        return items
    lists = [None] * world_size()
    distributed.all_gather_object(lists, items)
    return [item for one in lists for item in one]


def take_from_first(tensors):
    """Overwrite tensors with those of the first process."""
    if world_size() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor, 0)


def barrier():
    """Wait until all processes are here."""
    gather([])


# ------------------------------------------------------------------------------------------- seeds and devices


def choose_device(name):
    """The torch device of a setting; "auto" takes a CUDA device where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}: use --device cpu") from None


def choose_dtype(precision, device):
    """The autocast dtype of a precision setting.

    "auto" is bfloat16 where the hardware multiplies it natively (CUDA from Ampere on; CPUs with AMX or AVX512-BF16)
    and float32 elsewhere, where an emulated bfloat16 is several times slower.
    """
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if native else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def autocast(device, dtype):
    """Mixed precision as a context: master weights and losses stay float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def random_state():
    """The state of every generator that training draws from, as tensors."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state):
    """Put back what `random_state` returned."""
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


# ------------------------------------------------------------------------------------------ files, always whole


@contextlib.contextmanager
def written_whole(path):
    """Yield a temporary path beside `path` that replaces it once the block is through: never a half-written file."""
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


def require_writable(folder):
    """Raise InputError where files cannot be written into a folder, be it there already or not; makes nothing."""
    nearest = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"{folder} cannot be written: {nearest} is not a folder that you may write into")


def write_json(path, content, indent=None):
    """Write JSON whole, Unicode as it is."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=indent, ensure_ascii=False), encoding="utf-8")


def read_json(path):
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


def save_checkpoint(path, checkpoint):
    """Write a dictionary of plain containers and tensors, whole."""
    with written_whole(path) as temporary, open(temporary, "wb") as file:
        torch.save(checkpoint, file)


def load_state(path, device="cpu"):
    """Read what torch.save wrote, executing nothing; InputError where the file is missing or is not that."""
    if not Path(path).is_file():
        raise InputError(f"no such file: {path}")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception:  # a damaged file raises almost anything, and torch's own message advises to load it unsafely
        raise InputError(f"{path} is refused: it is damaged, or holds more than tensors and plain containers") from None


def first_line(error):
    """The first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


# --------------------------------------------------------------------------------------------------- the run log


def write_log(path, rows):
    """Write a file of JSON lines anew, whole."""
    with written_whole(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def append_log(path, row):
    """Append one row to a file of JSON lines."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_log(path):
    """The rows of a file of JSON lines, without one at the end that a killed run left unfinished."""
    rows = []
    with contextlib.suppress(FileNotFoundError, ValueError), open(path, encoding="utf-8") as file:
        for line in file:
            rows.append(json.loads(line))
    return rows


def write_tensorboard(folder, rows):
    """Add the numbers of rows to TensorBoard's files in a folder, where the package tensorboard is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return
    with SummaryWriter(folder) as writer:
        for row in rows:
            for name in row.keys() - {"epoch", "beam_size"}:
                if row[name] is not None:
                    writer.add_scalar(name, row[name], row["epoch"])


def draw_curves(log_paths, picture_path):
    """Draw the loss and the validation scores of one run or several by epoch, from their logs."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    figure = Figure(figsize=(12, 3.5), layout="constrained")
    panels = list(zip(figure.subplots(1, 3), ("loss", "cider", "bleu_4"), strict=True))
    titles = {"loss": "training loss", "cider": "validation CIDEr", "bleu_4": "validation BLEU-4"}
    for path in log_paths:
        rows = read_log(path)
        for axes, name in panels:
            epochs, values = [row["epoch"] for row in rows], [row[name] for row in rows]
            axes.plot(epochs, values, marker="o", markersize=3, label=str(Path(path).parent))
    for axes, name in panels:
        axes.set_title(titles[name])
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    if len(log_paths) > 1:
        panels[0][0].legend()
    with written_whole(picture_path) as temporary:
        figure.savefig(temporary, dpi=100)


def git_revision():
    """The commit of the code that runs, "" outside a checkout."""
    with contextlib.suppress(OSError):
        command = ["git", "rev-parse", "HEAD"]
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        return result.stdout.strip()
    return ""
