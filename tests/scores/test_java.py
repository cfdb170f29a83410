"""A Java program that fails is an error in one line."""

import pytest

from scores.metrics import compute_meteor
from scores.spice import compute_spice
from scores.tokenization import ptb_tokenize
from utils import InputError


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (compute_meteor, ({0: ["a"]}, {0: ["a"]}), "METEOR's Java program failed"),
        (compute_spice, ({0: ["a"]}, {0: ["a"]}), "SPICE's Java program failed"),
        (ptb_tokenize, (["a dog"],), "the Java program of --tokenizer ptb failed"),
    ],
)
def test_a_java_that_fails_is_an_error(monkeypatch, tmp_path, function, arguments, message):
    (tmp_path / "java").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(InputError, match=message):
        function(*arguments)
