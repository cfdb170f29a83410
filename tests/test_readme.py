"""What the README says is so: its commands parse, `make demo` runs what it shows, its file tree is the repository's."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from utils import parse_settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^python (?:benchmarks/)?(\w+)\.py ?(.*)$", re.sub(r" \\\n\s*", " ", README), re.MULTILINE)


@pytest.mark.parametrize(("script", "arguments"), COMMANDS)
def test_every_command_parses(script, arguments):
    module = importlib.import_module(script)
    parse_settings(module.Settings, shlex.split(arguments, comments=True))


def test_the_demo_is_what_the_readme_shows():
    makefile = re.sub(r" \\\n\s*", " ", (ROOT / "Makefile").read_text())
    demo = re.findall(r"^\t\$\(RUN\) ((?:create_input_files|train|eval|caption)\.py.*)$", makefile, re.MULTILINE)
    assert len(demo) == 4
    shown = re.sub(r" \\\n\s*", " ", README)
    for command in demo:
        assert f"python {command}\n" in shown


def test_the_file_tree_names_every_file():
    files = [path.name for path in ROOT.iterdir() if path.is_file() and path.suffix in (".py", ".txt", ".yml", ".toml")]
    files += [f"benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.py")]
    for name in files:
        assert re.search(rf"^{re.escape(name)} ", README, re.MULTILINE), name


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
