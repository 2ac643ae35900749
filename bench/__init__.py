"""Benchmarks, installed as fastkd.bench. This file is what they share: where they ran, summaries, tables, files.

timing.py    how long a call takes, what it asks of the machine      bench_losses.py    `pytest bench/`
losses/      `fastkd bench loss`      steps/      `fastkd bench step`
loaders/     `fastkd bench data`      scripts/    run by path
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastkd.environment import version
from fastkd.errors import UserError

PACKAGES = "torch torchvision triton timm liger-kernel nvidia-dali-cuda130 nvidia-dali-cuda120 pillow numpy".split()
ROOT = Path(__file__).resolve().parent.parent
Record = dict[str, Any]  # what a benchmark has found, as JSON takes it

try:
    from fastkd.report import log_rank0, show_table
except ImportError:  # rich is not installed

    def log_rank0(message: str) -> None:
        print(message, flush=True)

    def show_table(columns: list[str], rows: list[list[str]], numbers: int = 0, whole: int = 0) -> None:
        widths = [max(len(row[place]) for row in [columns, *rows]) for place in range(len(columns))]
        for row in [columns, *rows]:
            cells = [cell.rjust if place >= len(columns) - numbers else cell.ljust for place, cell in enumerate(row)]
            log_rank0("  ".join(align(width) for align, width in zip(cells, widths, strict=True)))


def default_device() -> torch.device:
    """CUDA if there is a device, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def about_run(device: torch.device, load: float) -> Record:
    """The head of a record. `load`: load_average() before the measurement."""
    return {
        "environment": environment(),
        "commit": commit(),
        "load_average": load,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": "bfloat16" if device.type == "cuda" else "float32",
        "threads": torch.get_num_threads(),
    }


def environment() -> Record:
    """Machine, versions and the command line as it is typed in a clone."""
    cuda, name = torch.cuda.is_available(), Path(sys.argv[0]).name
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    program = "fastkd" if name in ("fastkd", "__main__.py") else f"python bench/scripts/{name}"
    return {
        "command": " ".join([program, *sys.argv[1:]]),
        "python": platform.python_version(),
        "cpu": cpu[1] if cpu else platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        **{name: found for name in PACKAGES if (found := version(name))},
    }


def commit() -> str | None:
    """The commit of this file's tree, with "-dirty" if the tree has changed since; None without git.

    A tree without .git may lie inside another repository, whose commit is not asked for.
    """
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() or None


def load_average() -> float:
    """Processes that wanted a CPU, mean of the last minute: more than one means that other work is running."""
    return os.getloadavg()[0]


def load_notes(record: Record) -> list[str]:
    """A line if more processes wanted a CPU than there are."""
    load, cpus = record["load_average"], record["environment"]["cpus"]
    return [f"Other work disturbed these figures: the load before was {load:.1f} on {cpus} CPUs"] * (load > cpus)


def summary(values: Sequence[float]) -> dict[str, float]:
    """n, median, and the 20th and 80th percentile."""
    p20, median, p80 = np.percentile(values, [20, 50, 80]).tolist()
    return {"n": len(values), "median": median, "p20": p20, "p80": p80}


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def markdown_table(columns: list[str], rows: list[list[str]], numbers: int = 0) -> str:
    """A Markdown table; the last `numbers` columns are aligned to the right."""
    rule = ["---"] * (len(columns) - numbers) + ["---:"] * numbers
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, rule, *rows))


def write_json(path: str | Path, record: Record) -> None:
    """Write the whole file or nothing; makes its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(part, path)


def script_parser(about: str | None) -> argparse.ArgumentParser:
    """The parser of a script with the docstring `about`."""
    return argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)


def make_room(files: dict[str, str]) -> None:
    """Make the folders of the files, by option; "" is no file.

    Raises UserError if one cannot be written, or two are the same: before the measurement, not after.
    """
    given = {flag: Path(file) for flag, file in files.items() if file}
    if "--plot" in given and given["--plot"].suffix != ".png":
        raise UserError(f"--plot must be a .png file, got {files['--plot']!r}")
    names = list(map(str, given.values()))
    if len(names) > len(set(names)):
        raise UserError(f"two of {', '.join(files)} name one file, {max(names, key=names.count)!r}; give each its own")
    for flag, file in given.items():
        if file.is_dir():
            raise UserError(f"{flag} must be a file, {str(file)!r} is a folder")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{flag}: {str(file.parent)!r} cannot be made: {error.strerror}") from None
        if not os.access(file.parent, os.W_OK):
            raise UserError(f"{flag}: {str(file.parent)!r} cannot be written to")


def results_folder(gpu: str | None) -> Path:
    """bench/results/<device>: NVIDIA H100 80GB HBM3 -> h100-80gb-hbm3, None -> cpu."""
    name = gpu.lower().removeprefix("nvidia ").replace(" ", "-") if gpu else "cpu"
    return ROOT / "bench" / "results" / name
