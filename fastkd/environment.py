"""The software and the devices that a run depends on."""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

DALI = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")
OPTIONAL = ("mlflow", "wandb", "onnx", "onnxruntime", "torchao")  # where installed; they change no result
PACKAGES = ("fastkd", "torch", "torchvision", "triton", "timm", *DALI, "safetensors", "tensorboard", "numpy", "pillow")
VARIABLES = ("OMP_", "MKL_", "KMP_", "CUBLAS_", "CUDA_VISIBLE", "NVIDIA_TF32", "NCCL_", "TORCH_", "PYTORCH_", "TRITON_")
"""What the names of variables begin with that change results or speed. Others are not written: they may be secrets."""
FREE_TO_CHANGE = (
    "command",
    "variables",
    "platform",
)  # `changes` does not name these: they change no result by themselves


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


def environment(processes: int = 1) -> dict[str, Any]:
    """The content of environment.json: command, versions, code, devices, threads, and how torch computes."""
    cuda = torch.cuda.is_available()
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else ["cpu"],
        "cpu": torch.backends.cpu.get_cpu_capability(),  # the instructions that torch's kernels use, such as AVX2
        "cpu_threads": torch.get_num_threads(),
        "processes": processes,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
        "code": code_hash(),
        "packages": {name: found for name in (*PACKAGES, *OPTIONAL) if (found := version(name)) or name in PACKAGES},
    }


def continued(path: Path, now: dict[str, Any]) -> dict[str, Any]:
    """The content of environment.json for a run that goes on: `earlier` lists what the starts before have written."""
    try:
        first = json.loads(path.read_text())
        return now | {"earlier": [*first.pop("earlier", []), first]}
    except (OSError, ValueError, AttributeError, TypeError):  # not there, or edited to something else
        return now


def code_hash() -> str:
    """SHA-256 over the names and bytes of fastkd's .py files: a version number does not tell an edited copy."""
    folder, digest = Path(__file__).parent, hashlib.sha256()
    names = [os.path.join(top, name) for top, _, files in os.walk(folder, followlinks=True) for name in files]
    for name in sorted(name for name in names if name.endswith(".py")):
        content = Path(name).read_bytes()
        digest.update(f"{os.path.relpath(name, folder)} {len(content)} ".encode() + content)
    return digest.hexdigest()


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two environments and may change bits of a result, as "cpu_threads was 2, now 1".

    What an older environment lacks is left out.
    """
    found = []
    if before.get("code", now["code"]) != now["code"]:
        found.append(f"fastkd's own code has changed ({before['code'][:7]}, now {now['code'][:7]})")
    for name in (name for name in now if name in before and name not in (*FREE_TO_CHANGE, "code")):
        old, new = before[name], now[name]
        if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
            old, new, parts = {name: old}, {name: new}, [name]
        else:
            parts = [part for part in new if part in old and part not in OPTIONAL]
        found += [f"{part} was {old[part]}, now {new[part]}" for part in parts if old[part] != new[part]]
    return found
