"""Versions of packages, devices, and whether optional packages are installed."""

import importlib.metadata
import importlib.util
import platform
import sys

import torch

PACKAGES = ("fastkd", "torch", "torchvision", "triton", "timm", "nvidia-dali-cuda130", "safetensors", "tensorboard")


def version(package: str) -> str | None:
    """The installed version of a distribution, or None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def has(module: str) -> bool:
    """Return True if a module can be found. The module itself is not imported; its parent packages are."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def environment() -> dict[str, object]:
    """The content of environment.json: command, versions and devices, as values that JSON can hold."""
    cuda = torch.cuda.is_available()
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else ["cpu"],
        "cpu_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "packages": {package: version(package) for package in PACKAGES},
    }
