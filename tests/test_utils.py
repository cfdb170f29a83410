"""Settings as flags, random state, device and precision."""

from dataclasses import dataclass
from typing import Literal

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


@pytest.mark.parametrize("arguments", [["a", "--rat", "1"], ["a", "--cell", "rnn"], ["a", "--rate", "x"], []])
def test_wrong_flags_exit_with_2(arguments):
    with pytest.raises(SystemExit) as stop:
        utils.parse_settings(Example, arguments)
    assert stop.value.code == 2


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_require_at_least_names_the_setting(value):
    with pytest.raises(utils.InputError, match=f"--rate {value}: must be at least 0"):
        utils.require_at_least(Example(("a",), rate=value), 0, "rate")


def test_random_state_comes_back():
    saved = state.get_rng_state()
    first = torch.rand(3)
    state.set_rng_state(saved)
    assert torch.equal(first, torch.rand(3))


def test_auto_precision_is_float32_where_bfloat16_is_emulated():
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    assert utils.choose_runtime("cpu", "auto").dtype == (torch.bfloat16 if native else torch.float32)
    assert utils.choose_runtime("cpu", "bf16").dtype == torch.bfloat16


def test_unknown_devices_are_refused():
    with pytest.raises(utils.InputError, match="--device nowhere"):
        utils.choose_device("nowhere")
