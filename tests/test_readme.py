"""The README and the docs are true: commands and configs parse, flags, files and links exist, translations agree."""

import dataclasses
import importlib
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

from utils import parse_settings

ROOT = Path(__file__).parent.parent
README, TRANSLATION = "README.md", "README.zh-CN.md"
DOCUMENTS = [README, TRANSLATION, "CONTRIBUTING.md", "benchmarks/README.md"]
DOCUMENTS += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
FOLDERS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests")
FOLDERS += ["tools", "benchmarks", "docs"]
SCRIPTS = ["create_input_files.py", "train.py", "eval.py", "caption.py"]
SCRIPTS += [
    str(path.relative_to(ROOT))
    for folder in ("tools", "benchmarks", "docs")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "run_script(main" in path.read_text(encoding="utf-8")
]
WITHOUT_FLAGS = "docs/onnx_example.py"  # imports nothing from this repository
CONFIGS = sorted(f"configs/{path.name}" for path in (ROOT / "configs").glob("*.txt"))
# Flags of pytest, torchrun, srun and TensorBoard, and the name of --hflip when the results were measured.
FOREIGN_FLAGS = {"help", "durations", "kills", "mirror", "nodes", "ntasks", "nproc_per_node", "nnodes"}
FOREIGN_FLAGS |= {"rdzv_backend", "rdzv_endpoint", "logdir"}


def read(name):
    """Return the text of a file of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def code_blocks(text):
    """Return the fenced blocks, with continued lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [re.sub(r" \\\n\s*", " ", block) for block in blocks]


def prose(text):
    """Return the text without its fenced blocks."""
    return re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def inline_code(text):
    """Return the code between backticks, outside blocks."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(text))]


def commands(text):
    """Return the scripts called in blocks or inline, each with its arguments."""
    lines = [line for block in code_blocks(text) for line in block.splitlines()]
    script = re.compile(r"(?:^python|\btorchrun .*?) ((?:\w+/)?\w+\.py)(?: (.*))?$")
    found = [script.search(line) for line in lines + inline_code(text)]
    return [(match[1], match[2] or "") for match in found if match]


def import_script(script, monkeypatch):
    """Import a script from its folder."""
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    return importlib.import_module(Path(script).stem)


def table_rows(text):
    """Return the lines of all tables."""
    return re.findall(r"^\|.*\|$", text, re.MULTILINE)


def numbers(text):
    """Return all numbers except those in links, code and names (ResNet-50, Flickr8k)."""
    text = re.sub(r"\]\([^)]*\)|<img [^>]*>|`[^`]*`", " ", text)
    return re.findall(r"(?<![\w.,-])\d+(?:[.,]\d+)*(?:/\d+(?:[.,]\d+)*)*", text, re.ASCII)


def links(text):
    """Return the targets of all links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(text)) + re.findall(r'<img src="([^"]+)"', text)


def anchors(text):
    """Return the anchors that GitHub gives the headings."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    ("script", "arguments"),
    sorted({each for name in DOCUMENTS for each in commands(read(name)) if each[0] != WITHOUT_FLAGS}),
)
def test_every_command_parses(script, arguments, monkeypatch):
    monkeypatch.chdir(ROOT)  # for @configs/NAME.txt
    arguments = shlex.split(arguments, comments=True)
    settings_class = import_script(script, monkeypatch).Settings
    if arguments != ["--help"]:
        parse_settings(settings_class, arguments)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_parses(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings_class = import_script("train.py", monkeypatch).Settings
    assert parse_settings(settings_class, [f"@{name}"]) != settings_class()


def test_the_docs_use_every_config():
    named = {name for document in DOCUMENTS for name in re.findall(r"@(configs/\w+\.txt)", read(document))}
    assert named == set(CONFIGS)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_flag_exists(name, monkeypatch):
    known = {
        field.name for script in SCRIPTS for field in dataclasses.fields(import_script(script, monkeypatch).Settings)
    }
    flags = set(re.findall(r"(?<![\w-])--(?:no-)?([a-z]\w*)", read(name)))
    assert flags <= known | FOREIGN_FLAGS


def test_the_demo_is_what_the_readme_shows():
    makefile = re.sub(r" \\\n\s*", " ", read("Makefile"))
    demo = re.findall(r"^\t\$\(RUN\) ((?:create_input_files|train|eval|caption)\.py.*)$", makefile, re.MULTILINE)
    assert len(demo) == 4
    assert "\n".join(f"python {command}" for command in demo) + "\n" in code_blocks(read(README))


@pytest.mark.parametrize("name", [README, TRANSLATION])
def test_the_code_map_names_every_script_and_folder(name):
    named = [place for row in table_rows(read(name)) for place in re.findall(r"^ `(\w+(?:\.py|/))`", row.split("|")[1])]
    places = [path.name for path in ROOT.glob("*.py")]
    places += [f"{folder}/" for folder in {*FOLDERS, "benchmarks", "configs", "docs", "tests", "tools"}]
    assert sorted(named) == sorted(places)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`([\w.]+)` in \[([\w/.]+)\]", read(README)))))
def test_functions_that_the_readme_names_exist(path):
    name, file = path
    found = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    for part in name.split("."):
        found = getattr(found, part)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_anchors_and_pictures_exist(name):
    for target in links(read(name)):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            file = (ROOT / name).parent / path if path else ROOT / name
            assert file.exists(), target
            assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


def test_the_translation_has_the_same_commands():
    stripped = [
        [shlex.split(line, comments=True) for block in code_blocks(read(name)) for line in block.splitlines()]
        for name in (README, TRANSLATION)
    ]
    assert stripped[0] == stripped[1]


def test_the_translation_has_the_same_numbers_captions_and_code():
    original, translated = read(README), read(TRANSLATION)
    for row, translated_row in zip(table_rows(original), table_rows(translated), strict=True):
        assert numbers(translated_row) == numbers(row)
        assert re.findall(r'"[a-z ]+"', translated_row) == re.findall(r'"[a-z ]+"', row)
    assert Counter(numbers(prose(translated))) == Counter(numbers(prose(original)))
    assert Counter(inline_code(translated)) == Counter(inline_code(original))


def test_the_translation_has_the_same_links():
    original, translated = Counter(links(read(README))), Counter(links(read(TRANSLATION)))
    assert original - translated == Counter([TRANSLATION])
    assert translated - original == Counter([README])


def test_spelling_is_american():
    roots = "colour|neighbour|grey(?!hound)|licence|normalis|optimis|initialis|favour|centre"
    british = re.compile(rf"\w*(?:{roots})\w*", re.IGNORECASE)
    code = [str(path.relative_to(ROOT)) for folder in (".", *FOLDERS) for path in (ROOT / folder).glob("*.py")]
    texts = {name: read(name) for name in code} | {name: prose(read(name)) for name in DOCUMENTS}
    assert {name: found for name, text in texts.items() if (found := british.findall(text))} == {}
