"""docs/reliability.md names tests that exist, and says which of them take long."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs/reliability.md"
NAMED = re.findall(r"\[`(\w+)`\]\(([\w./]+)\)( †)?", PAGE.read_text())


@cache
def marks_of(path: Path) -> dict[str, bool]:
    """By name of a test, also in a class: whether it has the marker `every`."""
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    marks = {each.name: [ast.unparse(mark) for mark in each.decorator_list] for each in functions}
    return {name: any(mark.startswith("pytest.mark.every") for mark in found) for name, found in marks.items()}


@pytest.mark.parametrize("name, file, is_long", NAMED, ids=[name for name, _, _ in NAMED])
def test_a_named_test_exists(name, file, is_long):
    found = marks_of((PAGE.parent / file).resolve())
    assert name in found, f"{file} has no {name}"
    assert found[name] == bool(is_long), "† stands for the marker every"


def test_each_promise_names_a_test():
    rows = [line for line in PAGE.read_text().split("\n## What was measured")[0].splitlines() if line.startswith("| ")]
    promises = [row for row in rows if row != "| promise | test |"]
    assert len(promises) > 40
    assert [row for row in promises if not re.search(r"\[`test_\w+`\]\(", row.split("|")[2])] == []
