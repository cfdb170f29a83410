"""Settings as flags, random state, device and precision."""

import io
import os
import platform
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

import utils
from training import state
from utils import BaseSettings, InputError, make_settings, parse_settings, require_needs, setting


@dataclass(frozen=True, kw_only=True)
class Base(BaseSettings):
    """Settings of several examples."""

    # group: shared
    rate: float = setting(0.5, above=0, maximum=1)  # a share, 100% at most
    hidden: int = 3  # set by the script
    warmup: int = setting(0, minimum=0, below=10, needs="cell=gru")  # steps
    decay: float = setting(0.8, minimum=0, needs="cell=gru")  # a factor


@dataclass(frozen=True, kw_only=True)
class Example(Base):
    """An example."""

    photos: tuple[str, ...]  # the photos
    cell: str = setting("lstm", choices=("lstm", "gru", "rnn"))  # the cell
    sizes: tuple[int, ...] = setting((1, 3), minimum=1, needs="not plain")  # some sizes
    fast: bool = True  # hurry
    plain: bool = setting(False, needs="cell=lstm,gru or fast; groups>1")  # nothing special
    groups: int = setting(
        1,
        minimum=1,
        needs="fast",
    )  # a field that a formatter has wrapped

    NOT_FLAGS: ClassVar = ("hidden",)
    INHERITED_NEEDS: ClassVar = {"": "not plain", "warmup": "", "decay": ""}


def test_every_field_becomes_a_flag():
    arguments = ["a.jpg", "b.jpg", "--rate", "1", "--cell", "gru", "--sizes", "2", "4", "--no-fast"]
    expected = Example(photos=("a.jpg", "b.jpg"), rate=1.0, cell="gru", sizes=(2, 4), fast=False)
    assert parse_settings(Example, arguments) == expected
    assert parse_settings(Example, ["a.jpg"]) == Example(photos=("a.jpg",))
    settings = parse_settings(Example, ["--rate", "0.5", "--fast"])
    assert settings == Example(photos=()) and settings.given == {"photos", "rate", "fast"}
    assert settings.replace(rate=0.25).given == settings.given


def test_help_shows_comment_default_choices_and_groups_own_fields_first(capsys):
    with pytest.raises(SystemExit):
        parse_settings(Example, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in ("a share, 100% at most (default: 0.5)", "{lstm,gru,rnn}", "(default: 1 3)", "--no-fast", "the photos"):
        assert part in text
    assert "a field that a formatter has wrapped (default: 1)" in text and "--hidden" not in text
    assert text.index("the cell") < text.index("shared: --rate")


def test_flags_come_from_a_file_too(tmp_path):
    path = tmp_path / "flags.txt"
    path.write_text("# An example\n--rate 0.25  # a comment\n\n--sizes 2 4\n--cell gru\n")
    settings = parse_settings(Example, [f"@{path}", "--cell", "rnn"])
    assert (settings.rate, settings.sizes, settings.cell) == (0.25, (2, 4), "rnn")
    assert settings.given == {"photos", "rate", "sizes", "cell"}


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    photos = ("~/a.jpg", "~", "~b.jpg", "c/~/d.jpg", "")
    settings = parse_settings(Example, [*photos, "--rate", "1"])
    assert settings.photos == ("/home/ada/a.jpg", "/home/ada", "~b.jpg", "c/~/d.jpg", "")


def test_what_is_no_file_of_flags(tmp_path):
    assert parse_settings(Example, ["@a.jpg", "--rate", "1"]).photos == ("@a.jpg",)
    path = tmp_path / "flags.txt"
    path.write_text(r"--photo C:\data\x  # a backslash is none of a shell's")
    assert utils.expand_files([f"@{path}"]) == ["--photo", r"C:\data\x"]
    for content in ("--cell don't", None):
        path.unlink() if content is None else path.write_text(content)
        with pytest.raises(InputError, match=r"flags\.txt: "):
            utils.expand_files([f"@{path}"])


@pytest.mark.parametrize("arguments", [["a", "--rat", "1"], ["a", "--rate", "x"], ["--hidden", "4"]])
def test_wrong_flags_are_one_line_and_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_settings(Example, arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rate": 0.0}, "--rate 0.0: must be above 0"),
        ({"rate": float("nan")}, "--rate nan: must be above 0"),
        ({"rate": 1.5}, "--rate 1.5: must be at most 1"),
        ({"warmup": 10}, "--warmup 10: must be below 10"),
        ({"sizes": (1, 0)}, "--sizes 0: must be at least 1"),
        ({"cell": "elman"}, "--cell elman: choose from lstm gru rnn"),
    ],
)
def test_values_out_of_range_are_refused_however_they_come(values, message):
    with pytest.raises(InputError, match=message):
        Example(photos=(), **values)
    with pytest.raises(InputError, match=message):
        Example(photos=()).replace(**values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "2", "--plain", "--groups", "2"], "--sizes 2 cannot be combined with --plain: remove one of them"),
        (["--plain"], "--plain requires --groups above 1"),
        (["--plain", "--cell", "rnn", "--no-fast"], "--plain requires --cell lstm or gru or --fast"),
        (["--groups", "2", "--no-fast"], "--groups 2 requires --fast"),
        (["--rate", "0.5", "--plain", "--groups", "2"], "--rate 0.5 cannot be combined with --plain"),
        (["--warmup", "1"], "--warmup 1 requires --cell gru"),
        (["--decay", "0"], "--decay 0.0 requires --cell gru"),  # not off: its default is another
    ],
)
def test_a_flag_without_effect_is_refused(arguments, message):
    with pytest.raises(InputError) as caught:
        require_needs(parse_settings(Example, arguments))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--no-plain"],
        ["--warmup", "0"],  # off
        ["--plain", "--groups", "2"],
        ["--plain", "--groups", "2", "--cell", "rnn"],  # one of two alternatives holds
        ["--cell", "gru", "--warmup", "2", "--plain", "--groups", "2"],
    ],
)
def test_flags_with_effect_pass(arguments):
    require_needs(parse_settings(Example, arguments))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rates": 0.5}, "rates is not a setting: did you mean rate? choose from rate hidden warmup decay photos cell"),
        ({"num_size": 2}, "did you mean sizes?"),
        ({"xyz": 2}, "xyz is not a setting: choose from rate"),
        ({"rate": "0.5"}, "rate='0.5': must be of type float"),
        ({"sizes": ["1", 2]}, "must be of type tuple"),
        ({"warmup": 2}, "--warmup 2 requires --cell gru"),
    ],
)
def test_keyword_arguments_are_checked_as_flags_are(values, message):
    with pytest.raises(InputError) as caught:
        make_settings(Example, {"photos": (), **values})
    assert message in str(caught.value)
    assert make_settings(Example, {"photos": (), "rate": 1}).given == {"photos", "rate"}
    assert make_settings(Example, {"photos": [], "sizes": [2], "groups": np.int64(2)}).groups == 2


def test_random_state_comes_back():
    saved = state.get_rng_state(torch.device("cpu"))
    first = torch.rand(3)
    state.set_rng_state(saved, torch.device("cpu"))
    assert torch.equal(first, torch.rand(3))


def test_the_random_state_is_that_of_the_device_of_the_run(monkeypatch):
    generators = {torch.device("cuda:0"): torch.tensor(0), torch.device("cuda:1"): torch.tensor(1)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device="cuda": generators[torch.device(device)])
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda new, device="cuda": generators.update({torch.device(device): new})
    )
    saved = state.get_rng_state(torch.device("cuda:1"))
    assert saved["cuda"] == 1
    state.set_rng_state(saved, torch.device("cuda:0"))  # resumed on another device
    assert generators[torch.device("cuda:0")] == 1
    assert "cuda" not in state.get_rng_state(torch.device("cpu"))
    state.set_rng_state(saved, torch.device("cpu"))


@pytest.mark.parametrize(
    ("capabilities", "faster"),
    [
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, True),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, False),
        ({"cpu_name": "AMD EPYC 9654", "avx512_bf16": True}, True),
        ({"cpu_name": "AMD EPYC 7763", "avx2": True}, False),
        ({}, False),  # as on other architectures
    ],
)
def test_auto_precision_is_bfloat16_where_it_is_faster(capabilities, faster, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert utils.choose_runtime("cpu", "auto").dtype == (torch.bfloat16 if faster else torch.float32)
    assert utils.choose_runtime("cpu", "bf16").dtype == torch.bfloat16


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other processors name themselves otherwise")
def test_torch_names_the_processor():
    assert torch.cpu.get_capabilities()["cpu_name"]


def test_unknown_devices_are_refused():
    with pytest.raises(utils.InputError, match="--device nowhere"):
        utils.choose_device("nowhere")


def script(main):
    """A script of this main function, as the fixture `command` runs it."""
    return SimpleNamespace(__name__="script", main=main, Settings=Example)


@pytest.mark.parametrize("allocate", [lambda: bytearray(2**62), lambda: np.empty(2**50), lambda: torch.empty(2**58)])
def test_too_little_memory_is_one_line(command, allocate):
    status, _, error = command(script(lambda settings: allocate()), "a.jpg")
    assert status == 2 and error.startswith("script.py: error: out of memory (") and error.count("\n") == 1


def test_other_errors_of_the_program_are_not_hidden(command):
    def main(settings):
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        command(script(main), "a.jpg")


def test_words_that_a_terminal_cannot_show_are_escaped(monkeypatch, command):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True))
    output, errors = sys.stdout, sys.stderr

    def main(settings):
        print("一只狗")
        raise utils.InputError("猫.jpg: no such file \udcff")

    assert command(script(main), "a.jpg")[0] == 2
    assert output.buffer.getvalue() == rb"\u4e00\u53ea\u72d7" + b"\n"
    assert errors.buffer.getvalue() == rb"script.py: error: \u732b.jpg: no such file \udcff" + b"\n"


@pytest.mark.parametrize(
    ("device", "arguments", "status", "error"),
    [
        ("pipe", ["a.jpg"], 141, ""),
        ("pipe", ["--help"], 141, ""),
        ("/dev/full", ["a.jpg"], 2, "script.py: error: [Errno 28] No space left on device\n"),
    ],
)
def test_output_that_nobody_takes_ends_without_a_traceback(
    monkeypatch, capsys, command, device, arguments, status, error
):
    if device == "pipe":
        reading, writing = os.pipe()
        os.close(reading)
    else:
        writing = os.open(device, os.O_WRONLY)
    with os.fdopen(writing, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert command(script(lambda settings: print("caption")), *arguments) == (status, "", error)
