"""`fastkd bench loss`, `step` and `data`: measure, show the tables, write the files."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any

from ..data import DataOptions
from ..data.options import default_workers
from ..errors import UserError, nearest

USAGE = """\
usage: fastkd bench TARGET [OPTIONS]

  loss      every loss of fastkd beside the same in torch, eager and compiled: checked first, then timed
  step      where the time of a method's training step goes, and images/s beside other ways to run it
  data      every loader on your own images beside the training step: fastkd bench data DIR

`fastkd bench loss --help` explains the options.
"""


@dataclass(frozen=True)
class LossOptions:
    """Losses of fastkd beside other ways to compute them, on CUDA where there is a device and else on the CPU.

    Each is first compared with the eager formulation in float64: what is wrong gets no time. The table has times as
    multiples of fastkd's, forward and backward; above 1, fastkd is faster. `eager` and `best baseline` are against
    eager fastkd, `compiled` is compiled torch against compiled fastkd.
    """

    cases: str = ""
    """Only the cases in whose name a word begins so: KD, "KD 256", IE-KD; in quotes if it is more than one word."""
    quick: bool = False
    """Few rounds, and without torch.compile, whose compiling takes minutes: a first look."""
    plot: str = ""
    """A .png file for a picture of the ratios."""
    json: str = ""
    """A file for everything measured, with the versions and the commit."""


@dataclass(frozen=True)
class StepOptions:
    """A training step of a method on noise: where its time goes, and images/s of several ways to run it, in one run.

    fastkd's eager step, with the teacher's fastest form, as a CUDA graph; the formulation of the papers' codes; a
    careful hand-written loop; torch.compile; timm's task. One whose loss is not fastkd's gets no time.
    """

    method: str = "kd"
    """As in training, with its default options."""
    teacher: str = "resnet56"
    """A network by name; not trained. Methods without a teacher leave it out."""
    student: str = "resnet20"
    """A network by name."""
    peers: tuple[str, ...] = ()
    """Networks that learn beside the student, by default one of its kind."""
    batch_size: int = 0
    """Images of a step; 0 is 128 (timm and torchvision 256) on CUDA and 32 (8) on the CPU."""
    image_size: int = 0
    """Pixels of a side; 0 is 32 (timm and torchvision 224)."""
    classes: int = 0
    """0 is 100 (timm and torchvision 1000)."""
    quick: bool = False
    """Few rounds, and on CUDA without torch.compile: a first look."""
    compile: bool = False
    """Let torch.compile take part in any case; on CUDA it does without --quick."""
    plot: str = ""
    """A .png file for the parts of a step as a stacked bar and images/s as bars."""
    json: str = ""
    """A file for everything measured, with the versions and the commit."""
    trace: str = ""
    """A file for a profiler trace of three eager steps, for chrome://tracing or perfetto.dev."""


@dataclass(frozen=True)
class DataBenchOptions:
    """Every loader that can read your images, with several numbers of workers, beside the images/s of a training step.

    Says which loader to take, with how many workers, and whether the loader or the step limits the run. A loader whose
    labels or pixels differ from the others' gets no time. The step is one of --method on noise.
    """

    data: str = "digits"
    """As in training; also given as `fastkd bench data DIR`."""
    data_dir: str = ""
    """As in training."""
    val_fraction: float = 0.0
    """As in training, for a folder without val/."""
    workers: tuple[int, ...] = ()
    """Numbers of workers to try; by default 1, 2, 4 and so on up to the number of cores."""
    batch_size: int = 0
    """Images per batch; also -b. 0: 32 of the loaders, and of the step as in `fastkd bench step`."""
    image_size: int = 0
    """As in training."""
    exif: bool = False
    """As in training."""
    method: str = "kd"
    """Of the step, with its default options."""
    teacher: str = "torchvision/resnet50"
    """A network by name; not trained. Methods without a teacher leave it out."""
    student: str = "torchvision/resnet18"
    """A network by name."""
    peers: tuple[str, ...] = ()
    """Networks that learn beside the student, by default one of its kind."""
    seconds: float = 30.0
    """Time to measure, about, without the start of the loaders."""
    json: str = ""
    """A file for everything measured, with the versions and the commit."""


def run(arguments: list[str]) -> None:
    """The command: parse the options of one of its targets, and run it."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    targets: dict[str, tuple[type, Callable[[Any], None]]]
    targets = {
        "loss": (LossOptions, bench_loss),
        "step": (StepOptions, bench_step),
        "data": (DataBenchOptions, bench_data),
    }
    if not arguments or arguments[0] not in targets:
        asked = f"unknown target {arguments[0]!r}{nearest(arguments[0], targets)}" if arguments else "which target?"
        raise UserError(f"bench: {asked}; there are: {', '.join(targets)}; see `fastkd bench --help`")
    from ..parser import run_parser

    name, *rest = arguments
    kind, target = targets[name]
    if name == "data" and rest and not rest[0].startswith("-"):
        rest = ["--data", *rest]
    section = make_dataclass("Bench", [("bench", kind)], frozen=True)
    target(run_parser(section, rest, f"fastkd bench {name}").bench)


def bench_loss(options: LossOptions) -> None:
    """`fastkd bench loss`."""
    from ..bench import default_device, log_rank0, make_room, write_json
    from ..bench.losses.cases import cases
    from ..bench.losses.measure import draw_losses, measure_losses, show_losses

    device = default_device()
    begins = re.compile(rf"(?<![\w-]){re.escape(options.cases)}", re.IGNORECASE)  # KD does not choose DKD
    chosen = [case for case in cases(device) if begins.search(case.name)]
    if not chosen:
        names = ", ".join(case.name for case in cases(device))
        raise UserError(f"--cases {options.cases!r} matches nothing; choose from: {names}")
    make_room({"--plot": options.plot, "--json": options.json})
    record = measure_losses(chosen, device, options.quick, log_rank0)
    show_losses(record)
    if options.plot:
        draw_losses(record, Path(options.plot))
    if options.json:
        write_json(options.json, record)


def bench_step(options: StepOptions) -> None:
    """`fastkd bench step`."""
    from ..bench import default_device, log_rank0, make_room, write_json
    from ..bench.steps.measure import measure_step, trace
    from ..bench.steps.report import draw_step, show_step
    from ..bench.steps.workload import Workload

    o, device = options, default_device()
    workload = Workload(o.method, o.teacher, o.student, o.peers, o.batch_size, o.image_size, o.classes)
    make_room({"--plot": options.plot, "--json": options.json, "--trace": options.trace})
    record = measure_step(workload, device, o.quick, o.compile or device.type == "cuda" and not o.quick, log_rank0)
    show_step(record)
    if options.plot:
        draw_step(record, Path(options.plot))
    if options.json:
        write_json(options.json, record)
    if options.trace:
        trace(workload, device, Path(options.trace))


def bench_data(options: DataBenchOptions) -> None:
    """`fastkd bench data`."""
    from ..bench import default_device, log_rank0, make_room, write_json
    from ..bench.loaders.advice import show_data
    from ..bench.loaders.measure import measure_data
    from ..bench.steps.workload import Workload

    if not (math.isfinite(options.seconds) and options.seconds > 0):
        raise UserError(f"--seconds must be above 0, got {options.seconds}")
    o = options
    counts = dict.fromkeys(o.workers or worker_counts())
    if min(counts) < 1:
        raise UserError(f"--workers must be 1 or more, got {min(counts)}; DALI decodes in threads, at least one")
    names = ("data", "data_dir", "val_fraction", "image_size", "exif")
    data = DataOptions(batch_size=o.batch_size or 32, **{name: getattr(o, name) for name in names})
    workload = Workload(o.method, o.teacher, o.student, o.peers, o.batch_size)
    make_room({"--json": o.json})
    record = measure_data(data, workload, tuple(counts), default_device(), o.seconds, log_rank0)
    show_data(record)
    if o.json:
        write_json(o.json, record)


def worker_counts() -> list[int]:
    """1, 2, 4, ... and the default number of workers."""
    most = default_workers()
    return sorted({2**power for power in range(most.bit_length()) if 2**power < most} | {most})
