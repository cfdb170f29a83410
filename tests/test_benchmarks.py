"""The benchmarks at a tiny size: both sides agree, and the last line is JSON with a ratio."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("bench_train.py", "--encoder resnet18 --image_size 64 --batch_size 3 --vocabulary 50 --steps 2"),
        ("bench_caption.py", "--images 6 --max_length 5 --region_size 32 --hidden_size 32 --vocabulary 50 --repeats 1"),
    ],
)
def test_benchmark(script, arguments):
    command = [sys.executable, str(BENCHMARKS / script), *arguments.split(), "--device", "cpu"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    numbers = json.loads(result.stdout.splitlines()[-1])
    assert numbers["ratio"] > 0
    if script == "bench_train.py":
        assert numbers["captions_per_second"] > 0 and 0 < numbers["share_of_limit"] < 1
