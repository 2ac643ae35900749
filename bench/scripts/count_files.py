"""How many of fastkd's files one training step enters, and how often it returns to a file that it has left.

    python bench/scripts/count_files.py [--file FILE.json]

One eager step of KD on the CPU, resnet20 -> resnet8, after WARM_UP steps, is run under sys.setprofile. The sequence
has the file of each Python call in fastkd/ and kernels/, in the order of the calls; a call in the same file as
the call before it adds no entry. Files: distinct entries. Returns: entries whose file occurred earlier. Calls of the
autograd engine's threads are counted too. What is called through torch.compile or C++ adds its Python frames alone.
"""

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch

from fastkd.bench.record import ROOT, commit, environment, file_argument, write_json
from fastkd.bench.steps.baselines import options
from fastkd.bench.steps.workload import Workload
from fastkd.engine import Step

CPU = torch.device("cpu")
WARM_UP = 3
OURS = ("fastkd", "kernels")


class Trace(NamedTuple):
    """The files of one call, relative to the repository, without consecutive repeats."""

    sequence: list[str]

    @property
    def files(self) -> int:
        return len(set(self.sequence))

    @property
    def returns(self) -> int:
        return len(self.sequence) - self.files


def trace(call: Callable[[], object]) -> Trace:
    """The sequence of files that `call` enters."""
    sequence: list[str] = []
    names: dict[str, str | None] = {}

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event != "call":
            return
        code = frame.f_code
        if code.co_filename not in names:
            names[code.co_filename] = _relative(code.co_filename)
        name = names[code.co_filename]
        if name and (not sequence or sequence[-1] != name):
            sequence.append(name)

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return Trace(sequence)


def _relative(file: str) -> str | None:
    """The path below the repository if the file is one of OURS, without symbolic links; else None."""
    path = Path(file).resolve()
    if not path.is_relative_to(ROOT):
        return None
    relative = path.relative_to(ROOT)
    return str(relative) if relative.parts[0] in OURS else None


def trace_step() -> Trace:
    """The trace of the step that the module's docstring describes."""
    workload = Workload("kd", "resnet20", "resnet8", batch_size=8).filled(CPU)
    batch = workload.batch(CPU)
    step = Step(workload.build(CPU), options(), CPU)
    for _ in range(WARM_UP):
        step(*batch)
    return trace(lambda: step(*batch))


def main() -> None:
    path = file_argument(__doc__ or "")
    found = trace_step()
    for number, name in enumerate(found.sequence):
        print(f"{'return' if name in found.sequence[:number] else 'enter ':6}  {name}")
    print(f"{found.files} files, {found.returns} returns")
    if path:
        figures = {"files": found.files, "returns": found.returns, "sequence": found.sequence}
        write_json(path, {"environment": environment(), "commit": commit(), **figures})


if __name__ == "__main__":
    main()
