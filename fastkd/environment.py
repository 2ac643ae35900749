"""The software and the devices that a run depends on."""

import importlib.metadata
import importlib.util
import platform
import sys

import torch

DALI = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")
PACKAGES = ("fastkd", "torch", "torchvision", "triton", "timm", *DALI, "safetensors", "tensorboard")


def version(package: str) -> str | None:
    """The installed version of a package, or None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def has(module: str) -> bool:
    """True if a module is installed. It is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def environment() -> dict[str, object]:
    """The content of environment.json: command, versions, devices and the number of CPU threads."""
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
