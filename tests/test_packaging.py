"""setup.py installs every package of the tree, and every file that is not Python."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = {"fastkd.kernels": "kernels", "fastkd.bench": "bench"}  # what the links in fastkd/ point to


def setup_argument(name: str):
    calls = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call)]
    call = next(call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "setup")
    return ast.literal_eval(next(keyword.value for keyword in call.keywords if keyword.arg == name))


def packages() -> set[str]:
    found = {"fastkd"}
    for package, folder in {"fastkd": "fastkd", **FOLDERS}.items():
        for file in (ROOT / folder).rglob("*.py"):
            inner = file.parent.relative_to(ROOT / folder).parts
            if package != "fastkd" or inner[:1] not in [("kernels",), ("bench",)]:
                found.add(".".join([package, *inner]))
    return found


def test_every_package_is_installed():
    assert set(setup_argument("packages")) == packages()


def test_the_links_exist():
    for package, folder in FOLDERS.items():
        assert (ROOT / package.replace(".", "/")).resolve() == ROOT / folder


def test_other_files_are_installed():
    patterns = setup_argument("package_data")
    for file in (ROOT / "fastkd").rglob("*"):
        if file.is_file() and file.suffix not in (".py", ".pyc"):
            package = ".".join(file.relative_to(ROOT).parts[:-1])
            if not package.startswith(tuple(FOLDERS)):
                assert any(file.match(pattern) for pattern in patterns.get(package, [])), file
