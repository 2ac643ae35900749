"""The NVIDIA DALI that fits: one package for each major version of CUDA, all with the module nvidia.dali."""

import importlib
import importlib.metadata
from importlib.util import find_spec

import torch

EXTRAS = {"12": "dali-cuda12", "13": "dali-cuda13"}  # major version of torch's CUDA -> extra of fastkd, see setup.py
PACKAGES = {"12": "nvidia-dali-cuda120", "13": "nvidia-dali-cuda130"}


def install_command() -> str:
    """How to get the DALI for the CUDA of the installed torch. A torch without CUDA needs only DALI's CPU side."""
    return f"pip install 'fastkd[{EXTRAS.get(_cuda_of_torch(), 'dali')}]'"


def import_problem() -> str:
    """Why DALI cannot be imported, or "". The sentence has DALI as its subject: "is not installed: ..."."""
    if find_spec("nvidia") is None or find_spec("nvidia.dali") is None:
        return f"is not installed: {install_command()}"
    try:
        for module in ("nvidia.dali.fn", "nvidia.dali.types"):
            importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # OSError: a shared library is missing
        reason = " ".join(str(error).split())[:300]
        return f"is installed but cannot be imported ({type(error).__name__}: {reason})"
    return ""


def installed() -> dict[str, str]:
    """{package: version} of each DALI package that is installed."""
    found = {}
    for package in PACKAGES.values():
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def mismatch() -> str:
    """What is wrong if DALI is installed for another major version of CUDA than torch, else ""."""
    packages, fitting = installed(), PACKAGES.get(_cuda_of_torch())
    others = [package for package in packages if package != fitting]
    if fitting is None or not others:
        return ""
    remedy = f"pip uninstall {' '.join(packages)}, then {install_command()}"
    return f"torch is built for CUDA {torch.version.cuda}, {' and '.join(others)} is not: {remedy}"


def _cuda_of_torch() -> str:
    """The major version, "" for a torch without CUDA."""
    return (torch.version.cuda or "").partition(".")[0]
