"""SPICE with a program that stands for its own, whose parts are not installed here."""

import sys

import pytest
from pycocoevalcap.spice import spice

from scores.spice import compute_spice, require_spice
from utils import InputError

FAKE = """#!{python}
import json, os, sys
assert os.environ["JDK_JAVA_OPTIONS"] == "--add-opens=java.base/java.lang=ALL-UNNAMED"
items = json.load(open(sys.argv[sys.argv.index("spice-1.0.jar") + 1]))
found = [(item["image_id"], {{"f": len(item["test"].split()) / 10}}) for item in reversed(items)]
scores = [{{"image_id": image_id, "scores": {{"All": each}}}} for image_id, each in found]
json.dump(scores, open(sys.argv[sys.argv.index("-out") + 1], "w"))
"""


def test_scores_are_in_the_order_of_the_ids(monkeypatch, tmp_path):
    (tmp_path / "java").write_text(FAKE.format(python=sys.executable))
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    captions = {i: [" ".join("a" * (i % 7))] for i in range(12)}  # as text, 10 comes before 2
    assert compute_spice(captions, captions).tolist() == [i % 7 / 10 for i in range(12)]


def test_missing_parts_are_named(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="--spice needs Java"):
        require_spice(java=False)
    monkeypatch.setattr(spice, "__file__", str(tmp_path / "spice.py"))
    (tmp_path / "lib").mkdir()
    jars = ["spice-1.0.jar", "lib/stanford-corenlp-3.6.0.jar", "lib/stanford-corenlp-3.6.0-models.jar"]
    for i, jar in enumerate(jars):
        with pytest.raises(InputError) as error:
            require_spice(java=True)
        assert f"--spice lacks {' and '.join(jars[i:])} in {tmp_path}: copy the jars from https://" in str(error.value)
        (tmp_path / jar).touch()
    require_spice(java=True)
