"""The house: who imports whom, and nothing happens at import."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "utils": set(),
    "vocabulary": {"utils"},
    "photos": {"utils"},
    "prepared": {"utils", "vocabulary"},
    "formats": {"utils", "prepared", "vocabulary"},
    "shapes": {"utils"},
    "contact_sheet": {"utils", "prepared"},
    "create_input_files": {"utils", "contact_sheet", "formats", "photos", "prepared", "shapes", "vocabulary"},
    "datasets": {"utils", "prepared", "vocabulary"},
    "encoders": {"utils"},
    "layers": set(),
    "graph": {"layers"},
    "attention": {"layers"},
    "cells": {"layers"},
    "decoders": {"attention", "cells", "layers", "vocabulary"},
    "models": {"utils", "decoders", "encoders", "graph", "layers", "vocabulary"},
    "search": {"layers", "vocabulary"},
    "eval": {"utils", "datasets", "models", "search"},
    "optimization": {"vocabulary"},
    "rewards": set(),
    "runs": {"utils", "prepared", "models", "optimization", "vocabulary"},
    "train": {"utils", "datasets", "eval", "optimization", "rewards", "runs", "search", "vocabulary"},
    "caption": {"utils", "graph", "models", "photos", "search"},
}


@pytest.mark.parametrize("name", ALLOWED)
def test_imports_point_one_way(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported & set(ALLOWED) <= ALLOWED[name]


@pytest.mark.parametrize("name", ALLOWED)
def test_nothing_runs_at_import(name):
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    for node in ast.parse((ROOT / f"{name}.py").read_text()).body:
        guard = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        constant = isinstance(node, ast.Assign) and not any(isinstance(part, ast.Call) for part in ast.walk(node))
        unrolled = isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("range(")
        assert guard or docstring or constant or unrolled or isinstance(node, allowed), f"{name}.py, line {node.lineno}"
