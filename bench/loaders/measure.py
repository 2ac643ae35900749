"""`fastkd bench data`: images/s of every loader that can read the user's images, and of the training step.

A loader is first compared with the others on the same batches: order, labels, and pixels where both crop alike. One
that differs gets no time. The others are timed in turns, from files to normalised batches on the device, each built
anew in every round. The consumer does nothing with the batches, so that no queue hides a loader's pace.
"""

import copy
import gc
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor

from fastkd.bench import Record, about_run, first_line, load_average, summary
from fastkd.bench.steps.baselines import Fastkd, Way, as_graph, best_form
from fastkd.bench.steps.workload import Workload, cycle
from fastkd.bench.timing import interleaved
from fastkd.data import DataOptions, create_loaders
from fastkd.data.base import EpochLoader, rewound
from fastkd.data.options import LoaderName
from fastkd.engine.backends import backends
from fastkd.engine.precision import Precision
from fastkd.errors import UserError
from fastkd.methods import METHODS

Log = Callable[[str], None]
ROUNDS = 3
SINGLE = ("resident",)  # has no workers: other numbers of them would be the same measurement
COMPARED = 2  # batches
WARM = 0.3  # part of a window before anything is counted: workers start, queues fill
LARGEST_DIFFERENCE = 8.0  # mean of a batch in steps of 1/255: decoders and resizers differ by about 1, crops by 40
ALONE, TAUGHT = "without a teacher's forward (as from a cache)", "with the teacher"


class Taken(NamedTuple):
    """What one window has found."""

    img_per_s: float
    cpu_ms: float  # milliseconds of CPU time per image, of this process and its children


def measure_data(
    options: DataOptions, workload: Workload, workers: tuple[int, ...], device: torch.device, seconds: float, log: Log
) -> Record:
    """The record of all loaders with each number of `workers`, and of the step. `seconds`: about, for both together."""
    record = about_run(device, load_average()) | {"data": options.data, "batch_size": options.batch_size}
    options = replace(options, image_size=build(options, device).image_size)  # small images keep their own
    found, alike = compare_loaders(options, device, log)
    workload = replace(workload, image_size=alike["image_size"], classes=max(2, alike["classes"]))
    step = measure_steps(workload.filled(device), device, 0.3 * seconds, log)  # first: a wrong network is an error
    names = [name for name, each in found.items() if each["status"] == "right"]
    pairs = list(itertools.product(names, workers))
    pairs = [(name, count) for name, count in pairs if name not in SINGLE or count == min(workers)]
    window = 0.7 * seconds / max(1, len(pairs) * ROUNDS)
    taken: dict[tuple[str, int], list[Taken]] = {pair: [] for pair in pairs}
    for turn in range(ROUNDS):
        log(f"loaders: round {turn + 1} of {ROUNDS}")
        for name, count in pairs[turn % len(pairs) :] + pairs[: turn % len(pairs)]:
            taken[name, count].append(pace(build(named(options, name, count), device), window))
    for name in names:
        found[name]["workers"] = {
            str(count): _summaries(taken[name, count]) for count in workers if (name, count) in taken
        }
    return record | alike | {"loaders": found, "rounds": ROUNDS, "window_s": window, "step": step}


def _summaries(windows: list[Taken]) -> Record:
    return {name: summary([getattr(each, name) for each in windows]) for name in Taken._fields}


def named(options: DataOptions, loader: str, workers: int) -> DataOptions:
    return replace(options, loader=cast(LoaderName, loader), workers=workers)


def build(options: DataOptions, device: torch.device) -> EpochLoader:
    """The training loader. Raises UserError if these options cannot be."""
    gc.collect()  # the workers of the loader before end now, and not within a window
    train, _ = create_loaders(options, device, dtype=Precision("auto", device).dtype, log=lambda line: None)
    assert isinstance(train, EpochLoader)
    return train


def compare_loaders(options: DataOptions, device: torch.device, log: Log) -> tuple[dict[str, Record], Record]:
    """By name, whether a loader is there and gives what the first one gives; and what the images are.

    `options` have the image size that training would take. Raises UserError if no loader can read the data.
    """
    found: dict[str, Record] = {}
    first: tuple[EpochLoader, list[tuple[Tensor, Tensor]]] | None = None
    names = [name for name in get_args(LoaderName) if name not in ("auto", "folder")]
    for name in ("folder", *names, "auto"):  # "auto" finds those that have no name of their own, as of packed images
        try:
            loader = build(named(options, name, options.workers), device)
            with rewound(loader):
                batches = list(itertools.islice(loader, COMPARED))
        except UserError as error:
            found[name] = {"status": "unavailable", "reason": str(error)}
            continue
        if name == "auto" and loader.name in found:
            continue
        log(f"{loader.name}: checking its first batches")
        first = first or (loader, batches)
        found[name] = {"status": "right", "name": loader.name, "difference": None} | judge(*first, loader, batches)
    if first is None:
        raise UserError(f"no loader can read {options.data!r}: {found['auto']['reason']}")
    loader = first[0]
    return found, {"images": loader.samples, "classes": len(loader.classes), "image_size": loader.image_size}


def judge(
    known: EpochLoader, wanted: list[tuple[Tensor, Tensor]], loader: EpochLoader, batches: list[tuple[Tensor, Tensor]]
) -> Record:
    """Whether `loader` gives the labels and images of `known`; a "wrong" one has a reason."""
    shapes, others = ([list(images.shape) for images, _ in each] for each in (batches, wanted))
    if [target.tolist() for _, target in batches] != [target.tolist() for _, target in wanted]:
        return {"status": "wrong", "reason": f"its order or labels are not those of {known.name}"}
    if any(not bool(images.isfinite().all()) for images, _ in batches):
        return {"status": "wrong", "reason": "its images hold NaN or infinite numbers"}
    if crop_of(loader) != crop_of(known):
        return {"note": f"crops by {crop_of(loader)}, {known.name} by {crop_of(known)}: labels alone were compared"}
    if shapes != others:
        return {"status": "wrong", "reason": f"its batches are {shapes[0]}, those of {known.name} {others[0]}"}
    std = torch.tensor(loader.std, device=batches[0][0].device).view(3, 1, 1)
    pairs = zip(batches, wanted, strict=True)
    difference = max(float(((a.float() - b.float()).abs() * std * 255).mean()) for (a, _), (b, _) in pairs)
    if difference > LARGEST_DIFFERENCE:
        reason = f"its pixels differ from those of {known.name} by {difference:.1f} of 255 on average"
        return {"status": "wrong", "difference": difference, "reason": reason}
    return {"difference": difference}


def crop_of(loader: EpochLoader) -> str:
    """How a loader crops training images: rrc, pad-crop or none."""
    return str(getattr(getattr(loader, "augmentation", None), "kind", "rrc"))


def pace(loader: EpochLoader, seconds: float) -> Taken:
    """Images/s and CPU time of a loader over a window of about so many seconds, epoch after epoch."""
    begin, images, start, cpu = time.perf_counter(), 0, 0.0, 0.0
    for number, (batch, _) in enumerate(forever(loader)):
        if batch.is_cuda:
            torch.cuda.synchronize(batch.device)
        now = time.perf_counter()
        images += len(batch)
        if not start and number and now - begin > WARM * seconds:
            images, start, cpu = 0, now, cpu_seconds()
        elif start and now - start > (1 - WARM) * seconds:
            break
    return Taken(images / (now - start), 1e3 * (cpu_seconds() - cpu) / images)


def forever(loader: EpochLoader) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader


def cpu_seconds() -> float:
    """CPU time of this process and of its living children."""
    ticks = 0
    for child in multiprocessing.active_children():
        with suppress(OSError):
            fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])  # user and system
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def measure_steps(workload: Workload, device: torch.device, seconds: float, log: Log) -> Record:
    """Images/s of the training step on noise, with the teacher and without it (as from a cache of its logits)."""
    log(f"step: {workload.name}, {workload.batch_size} images of {workload.image_size} pixels")
    notes: list[str] = []
    record: Record = {"pair": workload.name, "batch_size": workload.batch_size, "img_per_s": {}, "notes": notes}
    try:
        with backends(device):
            ways = step_ways(workload, device, notes)
            for name, times in time_ways(ways, workload, device, seconds).items():
                record["img_per_s"][name] = 1e3 * workload.batch_size / summary(times)["median"]
    except UserError:
        raise
    except Exception as error:  # memory, a network that cannot take this size: the loaders' figures stay
        record["reason"] = first_line(error)
    return record


def step_ways(workload: Workload, device: torch.device, notes: list[str]) -> dict[str, Way]:
    """The step as training runs it: graphs on CUDA, the teacher's fastest form."""
    method, (images, _) = workload.build(device), workload.batch(device)
    make: Any = as_graph if device.type == "cuda" else best_form
    taught = workload.kind.needs_teacher
    ways: dict[str, Way] = {TAUGHT if taught else ALONE: Fastkd(make(method, images, notes))}
    if taught:
        ways[ALONE] = Fastkd(make(METHODS["ce"](copy.deepcopy(method.student)), images, notes))
    return ways


def time_ways(ways: dict[str, Way], workload: Workload, device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each step, in turns. The first steps warm up: graphs are captured."""
    batch = workload.batch(device)

    def step(way: Way) -> None:
        method = way.step.method if isinstance(way, Fastkd) else None
        for plan in cycle(method)[0] if method else (None,):
            way(*batch, plan)

    def milliseconds(way: Way) -> float:
        start = time.perf_counter()
        step(way)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1e3 * (time.perf_counter() - start)

    for way in ways.values():
        for _ in range(6 if device.type == "cuda" else 0):
            step(way)
    found = interleaved(ways, milliseconds, seconds, least=1)
    for way in ways.values():
        way.close()
    return found
