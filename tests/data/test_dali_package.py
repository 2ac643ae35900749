"""Which DALI fits torch, and what is said of one that does not; no DALI is needed."""

import importlib.metadata
import runpy
from pathlib import Path

import pytest
import setuptools
import torch

from fastkd.data import dali_package
from fastkd.data.dali_package import EXTRAS, PACKAGES, import_problem, install_command, mismatch

SETUP = Path(__file__).parents[2] / "setup.py"


@pytest.fixture
def machine(monkeypatch):
    """machine(CUDA of torch, {package: version}): what is installed."""

    def make(cuda, packages):
        def version(package):
            if package not in packages:
                raise importlib.metadata.PackageNotFoundError(package)
            return packages[package]

        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(importlib.metadata, "version", version)

    return make


@pytest.mark.parametrize(
    "cuda, extra",
    [("12.6", "dali-cuda12"), ("12.10", "dali-cuda12"), ("13.0", "dali-cuda13"), (None, "dali"), ("14.1", "dali")],
)
def test_the_extra_follows_the_cuda_of_torch(machine, cuda, extra):
    machine(cuda, {})
    assert install_command() == f"pip install 'fastkd[{extra}]'"


def test_every_extra_is_in_setup_with_its_package(monkeypatch):
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    runpy.run_path(str(SETUP))
    extras = given["extras_require"]
    for cuda in ("12", "13"):
        (requirement,) = extras[EXTRAS[cuda]]
        assert requirement.startswith(PACKAGES[cuda] + ">=")
    assert extras["dali"] == extras["dali-cuda13"]


DALI12, DALI13 = {PACKAGES["12"]: "1.52.0"}, {PACKAGES["13"]: "2.4.0"}


@pytest.mark.parametrize(
    "cuda, packages",
    [("12.8", DALI12), ("13.0", DALI13), ("13.0", {}), (None, DALI12), (None, DALI13), ("14.0", DALI13)],
)
def test_a_dali_that_fits_is_no_mismatch(machine, cuda, packages):
    machine(cuda, packages)
    assert mismatch() == ""


@pytest.mark.parametrize(
    "cuda, packages, words",
    [
        ("12.8", DALI13, ["CUDA 12.8, nvidia-dali-cuda130 is not", "pip uninstall nvidia-dali-cuda130, ", "cuda12]"]),
        ("13.0", DALI12, ["CUDA 13.0, nvidia-dali-cuda120 is not", "pip uninstall nvidia-dali-cuda120, ", "cuda13]"]),
        ("13.0", DALI12 | DALI13, ["pip uninstall nvidia-dali-cuda120 nvidia-dali-cuda130, ", "dali-cuda13]"]),
    ],
)
def test_a_dali_for_another_cuda_is_named_with_the_remedy(machine, cuda, packages, words):
    machine(cuda, packages)
    assert all(word in mismatch() for word in words), mismatch()


@pytest.mark.parametrize("error", [ImportError("no symbol x\n in y"), OSError("libcufft.so.12: no such file")])
def test_a_broken_dali_is_a_problem_in_one_line(monkeypatch, error):
    def broken(name):
        raise error

    monkeypatch.setattr(dali_package, "find_spec", lambda name: name)
    monkeypatch.setattr(dali_package.importlib, "import_module", broken)
    problem = import_problem()
    assert type(error).__name__ in problem and str(error).split()[0] in problem and "\n" not in problem


def test_a_missing_dali_is_a_problem_with_the_remedy(monkeypatch):
    monkeypatch.setattr(dali_package, "find_spec", lambda name: None)
    assert import_problem() == f"is not installed: {install_command()}"
