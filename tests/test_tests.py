"""What holds for the tests themselves."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
MODULES = sorted(TESTS.rglob("test_*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_module_imports_another(path):
    """What two of them need is in a module without tests, so that each can be moved, run and deleted alone."""
    others = {module.stem for module in MODULES}
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            assert not others & set(name.split(".")), f"{path.name}, line {node.lineno} imports {name}"
