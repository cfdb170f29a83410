"""Settings as flags, random state, device and precision."""

import io
import os
import platform
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch

import utils
from training import state


@dataclass(frozen=True)
class Example:
    """An example."""

    photos: tuple[str, ...]  # the photos
    rate: float = 0.5  # a share, 100% at most
    cell: Literal["lstm", "gru"] = "lstm"  # the cell
    sizes: tuple[int, ...] = (1, 3)  # some sizes
    fast: bool = True  # whether to hurry


def test_every_field_becomes_a_flag():
    arguments = ["a.jpg", "b.jpg", "--rate", "1", "--cell", "gru", "--sizes", "2", "4", "--no-fast"]
    assert utils.parse_settings(Example, arguments) == Example(("a.jpg", "b.jpg"), 1.0, "gru", (2, 4), False)
    assert utils.parse_settings(Example, ["a.jpg"]) == Example(("a.jpg",))
    assert utils.parse_settings(Example, ["--rate", "1", "--fast"]) == Example((), 1.0)


def test_help_shows_comment_default_and_choices(capsys):
    with pytest.raises(SystemExit):
        utils.parse_settings(Example, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in ("a share, 100% at most (default: 0.5)", "{lstm,gru}", "(default: 1 3)", "--no-fast", "the photos"):
        assert part in text


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    photos = ("~/a.jpg", "~", "~b.jpg", "c/~/d.jpg", "")
    settings = utils.parse_settings(Example, [*photos, "--rate", "1"])
    assert settings.photos == ("/home/ada/a.jpg", "/home/ada", "~b.jpg", "c/~/d.jpg", "")


@pytest.mark.parametrize("arguments", [["a", "--rat", "1"], ["a", "--cell", "rnn"], ["a", "--rate", "x"]])
def test_wrong_flags_are_one_line_and_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        utils.parse_settings(Example, arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_require_at_least_names_the_setting(value):
    with pytest.raises(utils.InputError, match=f"--rate {value}: must be at least 0"):
        utils.require_at_least(Example(("a",), rate=value), 0, "rate")


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
