"""The commands: fastkd train | eval | doctor | methods. Bad input is one line and exit status 2, never a traceback."""

import os
import sys
from dataclasses import dataclass, make_dataclass
from typing import Literal

import yaml

from .errors import UserError, nearest

USAGE = """\
usage: fastkd COMMAND [OPTIONS]

  train     distill a student; with no option at all: handwritten digits, a few minutes on two CPU cores
  eval      top-1, top-5, loss and images/s of trained weights
  doctor    what this machine has, and which paths fastkd will take on it
  methods   the methods by name, with their papers

`fastkd COMMAND --help` explains the options. Several GPUs: torchrun --nproc-per-node N -m fastkd train ...
"""


def main() -> None:
    """The `fastkd` command."""
    # Before torch is loaded. OpenMP's threads wait by spinning otherwise, and as soon as another program wants a core
    # they wait for each other: on two shared cores the digits took 6 minutes that way, 2 this way.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        dispatch(sys.argv[1:])
    except UserError as error:
        print(f"fastkd: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("fastkd: stopped; go on with --out FOLDER --resume", file=sys.stderr)
        sys.exit(130)
    finally:
        if "torch" in sys.modules:
            from . import distributed

            distributed.stop()


def dispatch(arguments: list[str]) -> None:
    commands = {"train": train, "eval": eval_, "doctor": doctor, "methods": methods}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    if arguments[0] == "--version":
        from . import __version__

        print(__version__)
        return
    if arguments[0] not in commands:
        raise UserError(f"unknown command {arguments[0]!r}{nearest(arguments[0], commands)}; see `fastkd --help`")
    commands[arguments[0]](arguments[1:])


def train(arguments: list[str]) -> None:
    from .config import flat, parse

    config = parse(arguments)
    if config.run.print_config:
        print(yaml.safe_dump(flat(config), sort_keys=False), end="")
        return
    from .job import run

    run(config)


@dataclass(frozen=True)
class EvalOptions:
    """What to evaluate."""

    weights: str
    """A .safetensors or .pth file, or `pretrained` or a tag of the network's library."""
    model: str = ""
    """The network's name; a student.safetensors of fastkd knows its own."""
    amp_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of the forward passes: auto is bfloat16 on CUDA, float32 on the CPU."""
    channels_last: bool = True
    """Memory layout of the network and the images."""
    device: str = "auto"
    """cuda, cpu, or auto: CUDA when there is one."""


def eval_(arguments: list[str]) -> None:
    from .config import run_parser
    from .data import DataOptions
    from .job import evaluate_weights
    from .report import show_table

    kind = make_dataclass("Eval", [("what", EvalOptions), ("data", DataOptions)], frozen=True)
    scores = evaluate_weights(run_parser(kind, arguments, "fastkd eval"))
    show_table(["network", "images", "top-1 %", "top-5 %", "loss", "inference img/s"], [scores], numbers=5)


def doctor(arguments: list[str]) -> None:
    from .doctor import findings
    from .report import show_table

    show_table(["", "here", "what fastkd does with it"], findings())


def methods(arguments: list[str]) -> None:
    from .methods import METHODS
    from .report import show_table

    rows = [
        [name, method.__doc__.splitlines()[0], method.paper, "teacher" if method.needs_teacher else "-"]
        for name, method in METHODS.items()
    ]
    show_table(["method", "", "paper", "needs"], rows)
