"""What README.md and the docs say is so: commands, flags, files, links, sizes, names and the Chinese translation."""

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
SCRIPTS += [f"{name}/{path.name}" for name in ("tools", "benchmarks") for path in sorted((ROOT / name).glob("*.py"))]
SCRIPTS += ["docs/figures.py"]
WITHOUT_FLAGS = "docs/onnx_example.py"  # it knows nothing of this repository
# Flags of pytest, torchrun, srun and TensorBoard, and what --hflip was called when the results were measured.
FOREIGN_FLAGS = {"help", "durations", "kills", "mirror", "nodes", "ntasks", "nproc_per_node", "nnodes"}
FOREIGN_FLAGS |= {"rdzv_backend", "rdzv_endpoint", "logdir"}
# Names of the first version. The names that replaced them are the field's.
OLD_NAMES = """
add_up take_from_first set_random_state keep_freed_memory stop_signals written_whole append_log read_log write_log
draw_curves draw_runs draw_folder read_card made_from take_captions ends_of_captions ends_of_images open_split
place_of split_order epoch_order of_type with_boxes tell_format split_by_seed choose_training written_names
move_into_place NEVER_WRITTEN SPECIAL_WORDS start_linear start_words first_state _look_and_update hidden_output
LinearOverTime over_time restore_captioner train_from _dry_run number_of_regions region_graph edges_that_mattered
real_words WeightAverage settings_from draw_captions finish_epoch pointing_score _weigh LONGEST GREY
word_vectors freeze_word_vectors embedding_size attention_size graph_neighbours gradient_clip weight_average warm_up
fine_tune_from skip_bad max_words
"""
BRITISH = re.compile(
    r"\w*(?:colour|neighbour|grey(?!hound)|licence|normalis|optimis|initialis|favour|centre)\w*", re.IGNORECASE
)


def read(name):
    """The text of a file of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def code_blocks(text):
    """The fenced blocks, with continued lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [re.sub(r" \\\n\s*", " ", block) for block in blocks]


def prose(text):
    """The text without its fenced blocks."""
    return re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def inline_code(text):
    """The code between backticks, outside blocks."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(text))]


def commands(text):
    """The scripts that are called, in blocks or inline, each with its arguments."""
    lines = [line for block in code_blocks(text) for line in block.splitlines()]
    script = re.compile(r"(?:^python|\btorchrun .*?) ((?:\w+/)?\w+\.py)(?: (.*))?$")
    found = [script.search(line) for line in lines + inline_code(text)]
    return [(match[1], match[2] or "") for match in found if match]


def import_script(script, monkeypatch):
    """The module of a script, wherever it lies."""
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    return importlib.import_module(Path(script).stem)


def table_rows(text):
    """The lines of all tables."""
    return re.findall(r"^\|.*\|$", text, re.MULTILINE)


def numbers(text):
    """All numbers, but those in links, code and names (ResNet-50, Flickr8k)."""
    text = re.sub(r"\]\([^)]*\)|<img [^>]*>|`[^`]*`", " ", text)
    return re.findall(r"(?<![\w.,-])\d+(?:[.,]\d+)*(?:/\d+(?:[.,]\d+)*)*", text, re.ASCII)


def links(text):
    """The targets of all links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(text)) + re.findall(r'<img src="([^"]+)"', text)


def anchors(text):
    """The anchors that GitHub gives the headings."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    ("script", "arguments"),
    sorted({each for name in DOCUMENTS for each in commands(read(name)) if each[0] != WITHOUT_FLAGS}),
)
def test_every_command_parses(script, arguments, monkeypatch):
    arguments = shlex.split(arguments, comments=True)
    settings_class = import_script(script, monkeypatch).Settings
    if arguments != ["--help"]:
        parse_settings(settings_class, arguments)


def test_the_readme_has_commands_of_all_four_scripts():
    assert {script for script, _ in commands(read(README))} >= set(SCRIPTS[:4])


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
def test_the_code_map_names_every_file(name):
    named = set()
    for row in table_rows(read(name)):
        cells = row.split("|")
        folders = re.findall(r"`(\w+)/`", cells[1])
        if folders:
            named |= {f"{folders[0]}/{file}" for file in re.findall(r"`(\w+\.py)`", cells[2])}
        else:
            named |= set(re.findall(r"^ `(\w+\.py)` $", cells[1]))
    files = {path.name for path in ROOT.glob("*.py")}
    files |= {f"{folder}/{path.name}" for folder in FOLDERS for path in (ROOT / folder).glob("*.py")}
    assert named == {file for file in files if not file.endswith("__init__.py")}


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


def test_the_readme_is_short():
    text = read(README)
    assert len(text.splitlines()) <= 170
    assert len(text.split()) <= 1800


def test_the_readme_has_no_placeholder():
    assert not re.search(r"CAPTION\"|RIGHT OR WRONG|TODO", read(README) + read(TRANSLATION))


def test_the_translation_has_the_same_commands():
    stripped = [
        [shlex.split(line, comments=True) for block in code_blocks(read(name)) for line in block.splitlines()]
        for name in (README, TRANSLATION)
    ]
    assert stripped[0] == stripped[1]


def test_the_translation_has_the_same_numbers_in_its_tables():
    original, translated = table_rows(read(README)), table_rows(read(TRANSLATION))
    assert [numbers(row) for row in translated] == [numbers(row) for row in original]


def test_the_translation_has_the_same_numbers_and_code_in_its_text():
    original, translated = prose(read(README)), prose(read(TRANSLATION))
    assert Counter(numbers(translated)) == Counter(numbers(original))
    assert Counter(inline_code(translated)) == Counter(inline_code(original))


def test_the_translation_quotes_the_same_captions():
    quotes = [[re.findall(r'"[a-z ]+"', row) for row in table_rows(read(name))] for name in (README, TRANSLATION)]
    assert quotes[0] == quotes[1]


def test_the_translation_has_the_same_links():
    original, translated = Counter(links(read(README))), Counter(links(read(TRANSLATION)))
    assert original - translated == Counter([TRANSLATION])
    assert translated - original == Counter([README])


@pytest.mark.parametrize(
    "path",
    sorted(path for place in (".", *FOLDERS, "tests", "tests/*") for path in ROOT.glob(f"{place}/*.py")),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_code_has_only_the_names_of_today(path):
    if path == Path(__file__):
        return
    text = path.read_text(encoding="utf-8")
    assert not set(OLD_NAMES.split()) & set(re.findall(r"\w+", text))
    assert not BRITISH.findall(text)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_are_in_american_spelling(name):
    assert not BRITISH.findall(prose(read(name)))
