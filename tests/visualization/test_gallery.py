"""A command that draws nothing does not wait for the packages that draw."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_caption_imports_only_what_it_needs():
    code = "import caption, sys; print({'matplotlib', 'skimage', 'nltk', 'pycocoevalcap'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
