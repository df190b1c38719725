"""The house itself: what it imports, and how long and wide it is."""

import ast
import re

import pytest
from conftest import ROOT

TOWER = ("tokenizer", "mentor", "data", "sample", "train")  # each may import those before it
PAGES = (ROOT / "README.md", ROOT / "tests/README.md")
FILES = [*(ROOT / f"{name}.py" for name in TOWER), *sorted((ROOT / "tests").glob("*.py"))]


@pytest.mark.parametrize("name", TOWER)
def test_imports_point_down(name):
    """At the top of a file and inside its functions."""
    taken = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            taken |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            taken.add(node.module)
    assert not taken & set(TOWER[TOWER.index(name) :])
    assert taken & set(TOWER) or name in TOWER[:2]  # the test sees imports where there are some


@pytest.mark.parametrize("path", PAGES, ids=["README", "tests/README"])
def test_width_of_pages(path):
    wide = [f"{i}: {line}" for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 110]
    assert wide == []


def test_the_readme_counts_the_lines_of_each_file():
    counted = re.findall(r"^\| `(\w+)\.py` \| (\d+) \|", PAGES[0].read_text(), re.M)
    lengths = [(name, len((ROOT / f"{name}.py").read_text().splitlines())) for name in TOWER]
    assert [(name, int(lines)) for name, lines in counted] == lengths


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_length_and_width(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 850
    assert [f"{path.name}:{i}" for i, line in enumerate(lines, 1) if len(line) > 110] == []
    functions = [node for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, ast.FunctionDef)]
    long = [node.name for node in functions if node.end_lineno - node.lineno + 1 > 60]
    assert long == [] or path.parent.name == "tests"
