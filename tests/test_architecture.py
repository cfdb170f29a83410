"""The house: folders import in one direction only, and nothing runs at import."""

import ast
from pathlib import Path

import pytest

from count_imports import LIMITS, imported_files

ROOT = Path(__file__).parent.parent
# What each script or folder may import, itself aside.
BOTTOM = {"utils", "common", "text"}
MODEL = BOTTOM | {"preparation", "modules", "decoding", "models"}
DATA = MODEL | {"datasets", "features"}
ALLOWED = {
    "utils": set(),
    "common": {"utils"},
    "text": {"utils", "common"},
    "preparation": BOTTOM,
    "create_input_files": BOTTOM | {"preparation"},
    "datasets": BOTTOM | {"preparation"},
    "modules": BOTTOM,
    "decoding": BOTTOM | {"modules"},
    "models": BOTTOM | {"preparation", "modules", "decoding"},
    "features": MODEL | {"datasets"},
    "scores": BOTTOM | {"preparation", "modules"},
    "training": DATA,
    "evaluation": DATA | {"scores", "visualization"},
    "visualization": DATA | {"scores"},
    "eval": DATA | {"training", "scores", "evaluation", "visualization"},
    "train": DATA | {"training", "evaluation", "visualization"},
    "caption": MODEL | {"evaluation", "visualization"},
    "tools": DATA | {"training", "evaluation", "visualization", "train", "caption"},
}
FILES = sorted(path for name in ALLOWED for path in [*ROOT.glob(f"{name}.py"), *(ROOT / name).glob("*.py")])


TYPE_ONLY = {"Settings", "ModelSettings"}  # classes of a script above, for type hints


def is_type_only(node):
    """True for `if TYPE_CHECKING:` with imports of settings classes alone."""
    if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
        return False
    return all(isinstance(line, ast.ImportFrom) and {a.name for a in line.names} <= TYPE_ONLY for line in node.body)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not is_type_only(node)]
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    room = path.relative_to(ROOT).with_suffix("").parts[0]
    imported = {module.split(".")[0] for module in modules} & set(ALLOWED)
    assert imported - {room} <= ALLOWED[room]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_at_import(path):
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    for node in ast.parse(path.read_text()).body:
        guard = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        constant = isinstance(node, ast.Assign) and not any(isinstance(part, ast.Call) for part in ast.walk(node))
        type_variable = isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("TypeVar(")
        unrolled = isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("range(")
        optional = isinstance(node, ast.Try) and all(isinstance(part, ast.Import) for part in node.body)
        # A command in a folder must find the others.
        search_path = path.parent.name == "tools" and ast.unparse(node).startswith("sys.path.insert(0, ")
        fine = guard or docstring or constant or type_variable or unrolled or optional or search_path
        assert fine or is_type_only(node) or isinstance(node, allowed), f"{path}, line {node.lineno}"


def test_the_top_level_holds_the_seven_scripts_and_modules():
    assert {path.stem for path in ROOT.glob("*.py")} == {
        "create_input_files", "datasets", "models", "train", "eval", "caption", "utils",
    }  # fmt: skip


def test_every_folder_is_known():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages <= set(ALLOWED) and all(not (ROOT / name / "__init__.py").read_text() for name in packages)


@pytest.mark.parametrize("script", LIMITS)
@pytest.mark.slow
def test_a_script_imports_few_files_and_draws_later(script):
    files = imported_files(script)
    assert len(files) <= LIMITS[script], files
