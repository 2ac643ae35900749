"""What every measurement here shares: where it ran, how its numbers are summed up, how they are kept."""

import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "torchvision", "triton", "timm", "liger-kernel", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
PACKAGES += ("pillow", "numpy")


def environment() -> dict:
    """Machine, versions and command line, as strings and numbers that JSON takes."""
    cuda = torch.cuda.is_available()
    return {
        "command": " ".join([_program(), *sys.argv[1:]]),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        **{name: found for name in PACKAGES if (found := _version(name))},
    }


def commit() -> str | None:
    """Of the tree that this file lies in, with "-dirty" where it has changed since; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() or None


def load_average() -> float:
    """Processes that wanted a CPU in the last minute: more than this one means company."""
    return os.getloadavg()[0]


def summary(values: list[float]) -> dict:
    """n, median, and the 20th and 80th percentile."""
    if len(values) == 1:
        return {"n": 1, "median": values[0], "p20": values[0], "p80": values[0]}
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"n": len(values), "median": statistics.median(values), "p20": fifths[0], "p80": fifths[3]}


def write_json(path: str | Path, record: dict) -> None:
    """All of the file or none of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(part, path)


def _program() -> str:
    """As it is typed in a clone: `fastkd`, `python bench/gpu_gate.py`."""
    name = Path(sys.argv[0]).name
    return "fastkd" if name in ("fastkd", "__main__.py") else f"python bench/{name}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
