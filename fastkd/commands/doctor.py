"""`fastkd doctor`: what this machine has, and which paths fastkd will take on it."""

import os
import platform
from dataclasses import dataclass, make_dataclass

import torch

from ..data import dali_package
from ..environment import has, version
from ..errors import count_of
from ..parser import run_parser
from ..report import show_table


@dataclass(frozen=True)
class DoctorOptions:
    """What this machine has, and which paths fastkd will take on it; for a method and its networks, how a step runs.

    With one of the options: whether all convolutions run in the fast layout, host syncs, operators or kernels of a
    step, the teacher's forms, and whether steps become CUDA graphs.
    """

    method: str = ""
    """As in training; kd where only a network is given."""
    teacher: str = ""
    """A network by name; resnet56 where another option is given."""
    student: str = ""
    """A network by name; resnet20 where another option is given."""
    peers: tuple[str, ...] = ()
    """Networks that learn beside the student, by default one of its kind."""


def run(arguments: list[str]) -> None:
    """The command: a table of the machine and, with an option, one of a training step."""
    kind = make_dataclass("Doctor", [("doctor", DoctorOptions)], frozen=True)
    given = vars(run_parser(kind, arguments, "fastkd doctor").doctor)
    workload = {name: value for name, value in given.items() if value}
    step = []
    if workload:
        from .step_doctor import examine_step

        step = examine_step(workload)  # an error comes before the first table
    show_table(["", "here", "what fastkd does with it"], _machine())
    if workload:
        show_table(["a training step", "here", ""], step)


def _machine() -> list[list[str]]:
    """Rows for the devices, the packages, and the options that choose between them."""
    rows = [
        ["python", platform.python_version(), ""],
        ["cpu", f"{os.cpu_count()} cores", f"{count_of(torch.get_num_threads(), 'thread')} for the networks"],
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}"
        rows.append([f"cuda:{index}", properties.name, memory])
    cuda = torch.cuda.is_available()
    if not cuda:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        rows.append(["cuda", "no device", f"{built}; everything runs on the CPU"])
    dali, dali_row = _dali()
    apex = "installed" if has("apex.optimizers") else "not installed"
    decode = "JPEGs decoded on the GPU" if cuda and dali else "JPEGs decoded on the CPU"
    return [
        *rows,
        *([name, version(name) or "missing", "needed"] for name in ("torch", "torchvision", "timm", "safetensors")),
        ["triton", version("triton") or "missing", "compiles the kernels on CUDA devices"],
        dali_row,
        ["apex", apex, "only for --opt fusedsgd, fusedlamb, fusedadam"],
        ["tensorboard", version("tensorboard") or "not installed", "only for --log tensorboard"],
        ["--device auto", "cuda" if cuda else "cpu", ""],
        ["--amp-dtype auto", "bfloat16" if cuda else "float32", "no gradient scaler"],
        ["--loader auto", "dali" if dali else "folder (torchvision)", decode],
        ["several processes", "nccl" if cuda else "gloo", "torchrun --nproc-per-node N -m fastkd train ..."],
    ]


def _dali() -> tuple[bool, list[str]]:
    """(can it be imported, its row)"""
    packages = [f"{number} ({package})" for package, number in dali_package.installed().items()]
    problem, mismatch = dali_package.import_problem(), dali_package.mismatch()
    if not packages and problem:
        return False, ["DALI", "not installed", f"{dali_package.install_command()} for the faster loader"]
    advice = "; ".join(text for text in (f"DALI {problem}" if problem else "", mismatch) if text)
    return not problem, ["DALI", ", ".join(packages) or "installed", f"warning: {advice}" if advice else ""]
