"""The project on a pretend GPU (`pretend_gpu.py`): it computes what the CPU does, and rarely waits for the device."""

import json
import os
import subprocess
import sys
from pathlib import Path
from pprint import pformat

import pytest
import torch.utils.backend_registration

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
        reason="this torch has no devices that are written in Python",
    ),
]

# What makes the CPU wait for the GPU, "file function: operation" and how often: in any training step on one batch...
WAITS_OF_A_STEP = {"training/steps.py optimize: copy to the CPU": 1}
# ...and elsewhere.
WAITS = {
    "scst step, each word": {},
    "scst step, the rest": {
        "training/steps.py optimize: copy to the CPU": 1,
        "training/steps.py sample_captions: copy to the CPU": 1,
    },
    "beam search of two images, each word": {},
    "beam search of two images, the rest": {
        "decoding/captions.py caption_batch: copy to the CPU": 3,
        "decoding/captions.py find_candidates: copy to the CPU": 2,
        "decoding/contract.py drop_ended: count the nonzero elements": 1,
    },
    "beam search of nine words": {"decoding/contract.py drop_ended: count the nonzero elements": 3},  # at 4, 8 and 9
    "beam search of the transformer": {"decoding/contract.py drop_ended: count the nonzero elements": 1},
    "search with constraints and groups": {"decoding/contract.py drop_ended: count the nonzero elements": 1},
    "search of an ensemble": {"decoding/contract.py drop_ended: count the nonzero elements": 1},
    "truncated samples": {},
    "validation loss": {"training/steps.py validation_loss: copy to the CPU": 1},
}


def run(part, folder):
    """The result of a part of run_on_pretend_gpu.py, in a process of its own: torch keeps the device's name."""
    command = [sys.executable, str(Path(__file__).parent / "run_on_pretend_gpu.py"), part, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-5000:]
    return json.loads(result.stdout)


def test_the_scripts_compute_on_a_gpu_what_they_compute_on_the_cpu(tmp_path):
    results = run("program", tmp_path)
    rounded = results.pop("bf16")  # autocast has other rules on a CPU
    for rows in zip(rounded["cpu"]["log"], rounded["gpu"]["log"], strict=True):
        assert rows[0]["train/loss"] == pytest.approx(rows[1]["train/loss"], rel=1e-3)
    for name, result in results.items():
        assert result["cpu"] == result["gpu"], name  # to the last bit


def test_nothing_else_waits_for_the_gpu(tmp_path):
    waits = run("waits", tmp_path)
    steps = {name: waits.pop(name) for name in list(waits) if name.startswith("step, ")}
    assert steps and all(waits_of_a_step == WAITS_OF_A_STEP for waits_of_a_step in steps.values()), pformat(steps)
    assert waits == WAITS, f"WAITS = {pformat(waits, width=110, sort_dicts=False)}"


def test_the_pretend_gpu_knows_the_rules_of_cuda(tmp_path):
    assert run("rules", tmp_path) == []
