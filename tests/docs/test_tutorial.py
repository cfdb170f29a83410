"""What the tutorial says is so: its code runs, its references and links exist, its figures are drawn by one script."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
REFERENCES = re.findall(r"\[`([^`]+\.py)`\]\(([^)]+)\) `([\w.]+)`", TUTORIAL)


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("figures")


def defined_names(path):
    """The functions and classes of a file, and the methods of its classes as Class.method."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names.update(f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef))
    return names


def test_the_code_runs_and_learns_to_attend(capsys):
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", TUTORIAL, re.DOTALL):
        exec(compile(block, "docs/tutorial.md", "exec"), namespace)
    assert namespace["accuracy"] > 0.95
    alpha = namespace["alpha"].mean(dim=0)  # (T, R)
    assert alpha[:4].argmax(dim=1).tolist() == [0, 1, 2, 3]
    assert "BLEU-4: 0.595" in capsys.readouterr().out


@pytest.mark.parametrize(("shown", "target", "name"), REFERENCES)
def test_every_reference_names_what_its_file_defines(shown, target, name):
    path = (ROOT / "docs" / target).resolve()
    assert path == ROOT / shown
    assert name in defined_names(path)


def test_no_file_is_named_without_one_of_its_functions():
    named = re.findall(r"\[`([^`]+\.py)`\]", TUTORIAL)
    assert len(named) == len(REFERENCES) + 1  # docs/figures.py draws what the page shows


def test_links_exist():
    for target in re.findall(r"\]\(([^)#]+)", TUTORIAL):
        assert target.startswith("http") or (ROOT / "docs" / target).exists(), target


@pytest.mark.slow
def test_one_script_draws_every_figure_of_the_tutorial(figures, command, monkeypatch, shapes, run_folder, tmp_path):
    monkeypatch.setattr(figures, "has_java", lambda: False)  # METEOR takes most of the time
    checkpoint = run_folder / "best.pt"
    arguments = ("--output_folder", tmp_path, "--checkpoint", checkpoint, "--shapes_checkpoint", checkpoint)
    status, _, _ = command(figures, *arguments, "--data_folder", shapes)
    assert status == 0
    drawn = {path.name for path in tmp_path.iterdir()}
    assert set(re.findall(r"\(figures/(\w+\.png)\)", TUTORIAL)) <= drawn


def test_figures_without_a_model_are_skipped_in_a_line_each(figures, command, monkeypatch, tmp_path):
    monkeypatch.setattr(figures, "draw_diagrams", lambda folder: None)
    missing = tmp_path / "missing"
    status, out, _ = command(figures, "--shapes_checkpoint", missing, "--data_folder", missing)
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == ["skipped", "skipped"]


def test_figures_are_small():
    for path in (ROOT / "docs" / "figures").glob("*.png"):
        assert path.stat().st_size < 250_000, path
