"""setup.py installs every package of the tree, and every file that is not Python. The wheel works on its own."""

import ast
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.fixture
def setup_py(monkeypatch):
    """The names in setup.py, and its arguments of `setup` as "arguments"."""
    given = {}
    monkeypatch.setattr("setuptools.setup", lambda **arguments: given.update(arguments))
    return runpy.run_path(str(ROOT / "setup.py")) | {"arguments": given}


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", text)


def test_the_page_of_the_package_index_has_no_relative_links(setup_py):
    readme, page = (ROOT / "README.md").read_text(), setup_py["arguments"]["long_description"]
    assert any(not link.startswith("https://") for link in links(readme))
    assert all(link.startswith("https://") for link in links(page))
    assert "https://arxiv.org/abs/1503.02531" in page
    if not setup_py["REPOSITORY"]:
        assert "Guide (`docs/guide.md`): options" in page and "docs/images/run.png" not in page


def test_an_address_of_the_repository_makes_links_absolute(setup_py):
    text = "[Guide](docs/guide.md#data), ![Curves](docs/run.png), [paper](https://arxiv.org), [below](#below)"
    assert setup_py["for_package_index"](text, "https://example.org/fastkd").split(", ") == [
        "[Guide](https://example.org/fastkd/blob/main/docs/guide.md#data)",
        "![Curves](https://example.org/fastkd/raw/main/docs/run.png)",
        "[paper](https://arxiv.org)",
        "[below](#below)",
    ]


@pytest.mark.libraries
def test_the_wheel_trains_outside_of_the_clone(tmp_path):
    """Built from the sdist, as `python -m build` does. It shares the libraries of this environment."""
    pytest.importorskip("build")
    pytest.importorskip("twine")

    def python(*arguments: str) -> None:
        subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, check=True, timeout=300)

    python("build", "--outdir", str(tmp_path / "dist"), ".")
    (wheel,), (sdist,) = (list((tmp_path / "dist").glob(f"*{ending}")) for ending in (".whl", ".tar.gz"))
    python("twine", "check", "--strict", str(wheel), str(sdist))
    python("pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "lib"), str(wheel))
    options = (
        "--epochs 1 --teacher-epochs 1 --warmup-epochs 0 --no-baseline --student resnet8 --teacher resnet8".split()
    )
    command = [str(tmp_path / "lib/bin/fastkd"), "train", *options, "--out", str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "lib")}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=300)
    assert (tmp_path / "run/student.safetensors").exists()
    where = [sys.executable, "-c", "import fastkd; print(fastkd.__file__)"]
    shown = subprocess.run(where, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    assert shown.strip() == str(tmp_path / "lib/fastkd/__init__.py")
