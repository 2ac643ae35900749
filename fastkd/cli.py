"""The commands: fastkd train | eval | doctor | methods. Bad input is one line and exit status 2, never a traceback."""

import os
import sys
from dataclasses import asdict, dataclass, make_dataclass
from pathlib import Path
from typing import Literal

import yaml

from .errors import UserError, nearest

USAGE = """\
usage: fastkd COMMAND [OPTIONS]

  train     distill a student; with no option at all: handwritten digits, a few minutes on two CPU cores
  eval      top-1, top-5, loss and images/s of trained weights
  bench     how long losses and whole training steps take here, beside other ways: fastkd bench loss | step
  doctor    what this machine has, and which paths fastkd will take on it
  methods   the methods by name, with their papers and what they need

`fastkd COMMAND --help` explains the options. Several GPUs: torchrun --nproc-per-node N -m fastkd train ...
"""


def main() -> None:
    """The `fastkd` command."""
    # Before torch is loaded. OpenMP's threads wait by spinning otherwise, and as soon as another program wants a core
    # they wait for each other: on two shared cores the digits took 6 minutes that way, 2 this way. What is measured by
    # itself is measured as torch is.
    if sys.argv[1:2] != ["bench"]:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        dispatch(sys.argv[1:])
    except UserError as error:
        print(f"fastkd: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt as stop:  # job.run says how to go on
        print("; ".join(["fastkd: stopped", *stop.args]), file=sys.stderr)
        sys.exit(130)
    finally:
        if "torch" in sys.modules:
            from . import distributed

            distributed.destroy()


def dispatch(arguments: list[str]) -> None:
    commands = {"train": train, "eval": eval_, "bench": bench, "doctor": doctor, "methods": methods}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    if arguments[0] == "--version":
        from . import __version__

        print(__version__)
        return
    if arguments[0] not in commands:
        near = nearest(arguments[0], [*commands, "--version", "--help"])
        raise UserError(f"unknown command {arguments[0]!r}{near}; see `fastkd --help`")
    commands[arguments[0]](arguments[1:])


def train(arguments: list[str]) -> None:
    from .config import flat, parse

    notes = []  # said when it is known which process prints
    config = parse(arguments, notes.append)
    if config.run.print_config:
        print(*(f"# {note}\n" for note in notes), yaml.safe_dump(flat(config), sort_keys=False), sep="", end="")
        return
    from .job import run

    run(config, notes)


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
    from .data import DataOptions
    from .job import evaluate_weights
    from .parser import run_parser
    from .report import show_table

    kind = make_dataclass("Eval", [("eval", EvalOptions), ("data", DataOptions)], frozen=True)
    tokens = _as_trained(arguments, kind)
    notes = [f"as in training: {' '.join(tokens)}"] if tokens else []
    scores = evaluate_weights(run_parser(kind, arguments, "fastkd eval", tokens), notes)
    show_table(["network", "images", "top-1 %", "top-5 %", "loss", "inference img/s"], [scores], numbers=5)


def _as_trained(arguments: list[str], kind: type) -> list[str]:
    """The image size and normalisation that the weights' file holds, unless given; the digits have their own."""
    from . import checkpoint
    from .parser import groups, last_value, name_of, tokens_of

    weights, given = last_value("weights", arguments), {name_of(flag) for flag, _ in groups(arguments)}
    if last_value("data", arguments) in ("", "digits"):
        return []
    noted = checkpoint.read_about(Path(weights)).get("input", {})
    return tokens_of({name: noted[name] for name in noted if name not in given}, kind, f"--weights {weights}")


BENCH_USAGE = """\
usage: fastkd bench TARGET [OPTIONS]

  loss      every loss of fastkd beside the same in torch, eager and compiled: checked first, then timed
  step      where the time of a method's training step goes, and images/s beside other ways to run it

`fastkd bench loss --help` explains the options.
"""


def bench(arguments: list[str]) -> None:
    if arguments and arguments[0] in ("-h", "--help"):
        print(BENCH_USAGE, end="")
        return
    targets = {"loss": bench_loss, "step": bench_step}
    if not arguments or arguments[0] not in targets:
        asked = f"unknown target {arguments[0]!r}{nearest(arguments[0], targets)}" if arguments else "which target?"
        raise UserError(f"bench: {asked}; there are: {', '.join(targets)}; see `fastkd bench --help`")
    targets[arguments[0]](arguments[1:])


def bench_loss(arguments: list[str]) -> None:
    from .bench.options import LossOptions
    from .parser import run_parser

    kind = make_dataclass("Bench", [("bench", LossOptions)], frozen=True)
    options = run_parser(kind, arguments, "fastkd bench loss").bench
    from .bench.command import run

    run(options.cases, options.quick, options.plot, options.json)


def bench_step(arguments: list[str]) -> None:
    from .bench.options import StepOptions
    from .parser import run_parser

    kind = make_dataclass("Bench", [("bench", StepOptions)], frozen=True)
    o = run_parser(kind, arguments, "fastkd bench step").bench
    from .bench.pair import Pair
    from .bench.step import run

    pair = Pair(o.method, o.teacher, o.student, o.peers, o.batch_size, o.image_size, o.classes)
    run(pair, o.quick, o.compile, o.json, o.plot, o.trace)


def doctor(arguments: list[str]) -> None:
    from .doctor import DoctorOptions, findings
    from .parser import run_parser
    from .report import show_table

    kind = make_dataclass("Doctor", [("doctor", DoctorOptions)], frozen=True)
    given = asdict(run_parser(kind, arguments, "fastkd doctor").doctor)
    pair = {name: value for name, value in given.items() if value}
    if pair:
        from .bench.examine import examine

        rows = examine(pair)  # an error comes before the first table
    show_table(["", "here", "what fastkd does with it"], findings())
    if pair:
        show_table(["a training step", "here", ""], rows)


SUMS = """\
Sums: --method iekd+kd adds the losses of both, on one teacher and one forward pass of each network.
The options then begin with the method's name (--kd-temperature); --kd-weight is kd's factor.
In a sum the cross-entropy with the labels is counted once, as its first method has it.
Staged: one of fastkd's own networks, or a ResNet, MobileNet, VGG, ... of timm or torchvision.
Peers: networks that learn beside the student, by default one of its kind.
`fastkd train --method NAME --help` explains the options."""


def methods(arguments: list[str]) -> None:
    from .methods import METHODS
    from .report import log_rank0, show_table

    _take_none(arguments, "methods", "The methods by name, with their papers and what they need. No options.")
    rows = [[name, kind.__doc__.splitlines()[0], kind.paper or "-", _needs(kind)] for name, kind in METHODS.items()]
    show_table(["method", "what it is", "paper", "needs"], rows)
    log_rank0(SUMS)


def _needs(kind: type) -> str:
    wanted = [(kind.needs_teacher, "teacher"), (kind.needs_peers, "peers"), (kind.needs_stages, kind.needs_stages)]
    return "; ".join(text for needed, text in wanted if needed) or "-"


def _take_none(arguments: list[str], command: str, about: str) -> None:
    """Help for --help, UserError for anything else: what is typed is never ignored."""
    from .parser import run_parser

    run_parser(make_dataclass("Nothing", [], namespace={"__doc__": about}), arguments, f"fastkd {command}")
