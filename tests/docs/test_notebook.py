"""The notebook runs from top to bottom, its captions are the model's, and the stored file is small and portable."""

import ast
import json
import re
from pathlib import Path

import pytest

from models import load_captioner

ROOT = Path(__file__).parent.parent.parent
PATH = ROOT / "docs" / "notebook.ipynb"
CELLS = json.loads(PATH.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
IMPORTED = {
    "os",
    "sys",
    "collections",
    "pathlib",
    "PIL",
    "models",
    "visualization.pictures",
    "visualization.photos",
}


def source(cell):
    return "".join(cell["source"])


def printed(cell):
    """What a cell printed."""
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


def test_the_file_is_a_notebook():
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(PATH, as_version=4))


def test_the_stored_file_is_small_and_says_nothing_of_a_machine():
    assert PATH.stat().st_size < 300_000
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    assert all(cell["metadata"] == {} and re.fullmatch(r"[a-z][a-z-]+", cell["id"]) for cell in CELLS)
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result"}
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)  # no warnings
    texts = [source(cell) for cell in CELLS] + [printed(cell) for cell in CODE]
    texts += ["".join(output["data"]["text/plain"]) for output in outputs if "data" in output]
    assert not re.search(r"(?<![\w.)])/(home|root|tmp|Users|usr|opt|mnt|work)\b|[A-Z]:\\", "\n".join(texts))


def test_it_imports_only_public_names():
    nodes = [node for cell in CODE for node in ast.walk(ast.parse(re.sub("(?m)^%.*", "", source(cell))))]
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    modules = {node.module for node in froms}
    modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert modules == IMPORTED
    names = [alias.name for node in froms for alias in node.names]
    names += [node.attr for node in nodes if isinstance(node, ast.Attribute)]
    assert not [name for name in names if name.startswith("_")]


def test_its_links_exist():
    for cell in CELLS:
        for target in re.findall(r"\]\(([^)#]+)", source(cell)):
            assert (ROOT / "docs" / target).exists(), target


@pytest.mark.slow
def test_it_runs_and_its_captions_are_the_models(shapes, run_folder, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for name, folder in (("data", shapes), ("runs", run_folder)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shapes").symlink_to(folder, target_is_directory=True)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(PATH, as_version=4)
    cells = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}
    for cell in cells.values():
        cell.outputs = []
    client = nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()  # raises where a cell fails
    photos = sorted((shapes / "photos").glob("test_*.png"))[:6]
    records = load_captioner(run_folder / "best.pt").caption_images(photos, beam_size=5)
    lines = printed(cells["caption-photos"]).splitlines()
    assert lines == [f"{photo.name}: {record.caption}" for photo, record in zip(photos, records, strict=True)]
    assert printed(cells["look-at-a-record"]).startswith(records[1].caption)
    assert "image/png" in cells["plot-attention"]["outputs"][0]["data"]
