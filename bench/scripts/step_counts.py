"""Counts of a training step on the CPU. (`fastkd bench step` shows the operators of a step.)

    python bench/scripts/step_counts.py files

files: one eager step of KD, resnet20 -> resnet8, after WARM_UP steps, under sys.setprofile. The sequence has the file
of each Python call in fastkd/ and kernels/, in the order of the calls; a call in the same file as the entry before it
adds nothing. "files" are the distinct entries; "returns" are the entries whose file occurred earlier in the sequence.
"""

import functools
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch

from fastkd.bench import ROOT, script_parser
from fastkd.bench.steps.baselines import options
from fastkd.bench.steps.workload import Workload
from fastkd.engine import Step

CPU = torch.device("cpu")
WARM_UP = 3
OURS = ("fastkd", "kernels")


def trace(call: Callable[[], object]) -> list[str]:
    """The files that `call` enters, relative to the repository, without consecutive repeats."""
    sequence: list[str] = []

    def profile(frame: FrameType, event: str, argument: object) -> None:
        name = _relative(frame.f_code.co_filename) if event == "call" else None
        if name and (not sequence or sequence[-1] != name):
            sequence.append(name)

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return sequence


@functools.cache
def _relative(file: str) -> str | None:
    """The path below the repository if the file is one of OURS, without symbolic links; else None."""
    path = Path(file).resolve()
    ours = any(path.is_relative_to(ROOT / folder) for folder in OURS)
    return str(path.relative_to(ROOT)) if ours else None


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("what", choices=["files"], nargs="?", default="files")
    parser.parse_args()
    workload = Workload("kd", "resnet20", "resnet8", batch_size=8).filled(CPU)
    batch = workload.batch(CPU)
    step = Step(workload.build(CPU), options(), CPU)
    for _ in range(WARM_UP):
        step(*batch)
    found = trace(lambda: step(*batch))
    for number, name in enumerate(found):
        print("return" if name in found[:number] else "enter ", name)
    print(f"{len(set(found))} files, {len(found) - len(set(found))} returns")


if __name__ == "__main__":
    main()
