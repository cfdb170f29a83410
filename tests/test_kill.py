"""kill -9 at random moments of a run: it always goes on, and ends as if nothing had happened.

python -m pytest tests/test_kill.py --kills 20
"""

import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

from test_resume import assert_same_run

import train
from conftest import SMALL, flags
from utils import read_log


def test_a_run_killed_at_random_moments_ends_as_the_whole_one(shapes, tmp_path, request):
    settings = replace(SMALL, data_folder=str(shapes), epochs=30, patience=30)
    train.main(replace(settings, run_folder=str(tmp_path / "whole")))
    start = [*flags(shapes, tmp_path / "parts"), "--epochs", "30", "--patience", "30", "--save_minutes", "0"]
    last, log = tmp_path / "parts" / "last.pt", tmp_path / "parts" / "log.jsonl"
    generator = random.Random(0)
    kills = request.config.getoption("--kills")
    for kill in range(kills + 1):
        arguments = ["--resume", str(last)] if last.exists() else start
        process = subprocess.Popen([sys.executable, train.__file__, *arguments], stderr=subprocess.PIPE, text=True)
        if kill < kills:  # within a span of the run that leaves something to the later kills
            goal = 30 * (kill + 1) / (kills + 2)
            while len(read_log(log)) < goal and process.poll() is None:
                time.sleep(0.01)
            time.sleep(generator.random() / 2)
            process.kill()
        _, err = process.communicate()
        assert process.returncode == (-signal.SIGKILL if kill < kills else 0), err
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    files = {path.name for path in last.parent.iterdir() if not path.name.startswith(".")}  # a kill may leave a part
    assert files - {"tensorboard"} == {"last.pt", "best.pt", "log.jsonl", "curves.png"}
