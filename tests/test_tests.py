"""What holds for the tests themselves."""

import ast
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SCRIPTS = sorted(TESTS.rglob("*.py"))
MODULES = [path for path in SCRIPTS if path.name.startswith("test_")]
HELPERS = [path for path in SCRIPTS if path not in MODULES and path.name not in ("conftest.py", "__init__.py")]


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, module) of every import."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found.append((node.lineno, node.module or ""))
        elif isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
    return found


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(TESTS)))
def test_no_module_imports_a_test_module_or_a_conftest(path):
    """What two of them need is in a module without tests, so that each can be moved, run and deleted alone.

    There are several files conftest.py: which of them `import conftest` finds depends on what was imported before.
    """
    others = {module.stem for module in MODULES} | {"conftest"}
    for line, name in imports(path):
        assert not others & set(name.split(".")), f"{path.name}, line {line} imports {name}"


def test_helpers_are_found_by_names_of_their_own():
    """Their folders are searched together: of two files with one name, the second would never be found."""
    names = Counter(path.stem for path in HELPERS if path.parent.name != "null_device")  # a package: null_device.rules
    assert [name for name, times in names.items() if times > 1] == []
