"""Copies of the kernels in which one line is spoilt, for the tests that must notice."""

import importlib
import re
import sys
import types
import unittest.mock
import uuid
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "kernels"


def load(folder: Path, name: str, *files: str):
    """Modules of `folder` as a package of their own, but for those that register ops: a second copy frees the first."""
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package
    for path in folder.glob("*.py"):
        if re.search(r"custom_op\(|= FusedOp\(", path.read_text()):
            sys.modules[f"{name}.{path.stem}"] = importlib.import_module(f"fastkd.kernels.{path.stem}")
    with unittest.mock.patch("torch.library.custom_op", side_effect=AssertionError("an op is registered again")):
        return {file: importlib.import_module(f"{name}.{file.replace('/', '.')}") for file in files}


def mutant(folder: Path, file: str, before: str, after: str, *files: str):
    """The modules, loaded, one of them spoilt."""
    source = (folder / f"{file}.py").read_text()
    assert source.count(before) >= 1, f"{file}.py has no {before!r}"
    (folder / f"{file}.py").write_text(source.replace(before, after))
    return load(folder, f"mutant_{uuid.uuid4().hex}", *files)
