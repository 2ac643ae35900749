"""What a run leaves that must not depend on kills, and where two runs differ in it."""

import json
from pathlib import Path
from typing import Any

import torch

from fastkd.run import checkpoint

TIMES = ("img_per_s", "train_s", "data_wait_ms", "data_wait_percent")  # of a row of the history


def content(place: Path) -> dict[str, Any]:
    """What a run leaves that must not depend on kills, by file."""
    found: dict[str, Any] = {}
    for path in sorted(file for file in place.rglob("*") if file.is_file()):
        name = str(path.relative_to(place))
        if path.name in ("last.pt", "best.pt"):
            found[name] = without_times(checkpoint.load(path) | {"identity": None})  # of a teacher that may be absent
        elif path.name == "history.jsonl":
            found[name] = without_times([json.loads(line) for line in path.read_text().splitlines()])
        elif path.suffix == ".safetensors" or name.startswith("cache/"):
            found[name] = path.read_bytes()
    return found


def without_times(part: Any) -> Any:
    if isinstance(part, dict):
        return {key: without_times(value) for key, value in part.items() if key not in TIMES}
    return [without_times(each) for each in part] if isinstance(part, (list, tuple)) else part


def difference(a: Any, b: Any, name: str) -> str:
    """Where two contents differ first, or ""."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return f"{name}: {sorted(map(str, a.keys() ^ b.keys()))} are on one side"
        return next(filter(None, (difference(a[key], b[key], f"{name}/{key}") for key in a)), "")
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return next(
            filter(None, (difference(*each, f"{name}/{n}") for n, each in enumerate(zip(a, b, strict=True)))), ""
        )
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return "" if a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b) else f"{name} differs"
    return "" if type(a) is type(b) and (a == b or a != a and b != b) else f"{name} differs"


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
