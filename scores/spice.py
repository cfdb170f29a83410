"""SPICE (Anderson et al., 2016) with pycocoevalcap's Java program, whose jars the user installs; downloads nothing."""

import json
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from pycocoevalcap.spice import spice

from utils import InputError

CORENLP = "https://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip"


def require_spice(java: bool) -> None:
    """Raise InputError if SPICE cannot run; it names what is missing and where to get it."""
    folder = Path(spice.__file__).parent
    if not java:
        raise InputError("--spice needs Java: install a Java runtime (such as openjdk)")
    jars = [f"lib/stanford-corenlp-3.6.0{kind}.jar" for kind in ("", "-models")]
    if missing := [jar for jar in (spice.SPICE_JAR, *jars) if not (folder / jar).is_file()]:
        raise InputError(
            f"--spice lacks {' and '.join(missing)} in {folder}: copy the jars from {CORENLP} into its lib"
        )


def compute_spice(references: dict[int, list[str]], predictions: dict[int, list[str]]) -> np.ndarray:
    """Compute SPICE of each image's caption (N,), in the order of the ids. Raises InputError if its program fails."""
    items = [{"image_id": i, "test": predictions[i][0], "refs": references[i]} for i in sorted(references)]
    # Java 16 and later forbid the reflection that SPICE's libraries need. Java 8 does not read this variable.
    environment = os.environ | {"JDK_JAVA_OPTIONS": "--add-opens=java.base/java.lang=ALL-UNNAMED"}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "captions.json", Path(folder) / "scores.json"
        source.write_text(json.dumps(items))
        command = ["java", "-Xmx8G", "-jar", spice.SPICE_JAR, str(source), "-out", str(target), "-subset", "-silent"]
        try:
            subprocess.run(command, cwd=Path(spice.__file__).parent, env=environment, capture_output=True, check=True)
            scores = {item["image_id"]: item["scores"]["All"]["f"] for item in json.loads(target.read_text())}
            return np.array([scores[item["image_id"]] for item in items], float)
        except (OSError, subprocess.CalledProcessError, ValueError, KeyError, TypeError):
            raise InputError("SPICE's Java program failed: it needs 8 GB of memory") from None
