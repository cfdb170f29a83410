"""Print how many files of the repository each script imports, all told: python tests/count_imports.py"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMITS = {"train": 45, "caption": 40}  # files, without empty __init__.py
CODE = """
import sys
sys.path.insert(0, {root!r})
import {script}
paths = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
print(*sorted(p for p in paths if p.startswith({root!r}) and "/.venv/" not in p and not p.endswith("__init__.py")))
"""


def imported_files(script: str) -> list[str]:
    """Return the files of the repository that importing a script loads, itself included."""
    code = CODE.format(root=f"{ROOT}/", script=script)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return [str(Path(path).relative_to(ROOT)) for path in found.split()]


if __name__ == "__main__":
    for script in ("create_input_files", "train", "eval", "caption"):
        files = imported_files(script)
        print(f"{script}.py: {len(files)} files: {' '.join(files)}")
