"""`fastkd bench step`: where the time of a training step goes, and how many images a second each way to run it takes.

The data are noise on the device. A way whose loss differs from fastkd's, at the first step or some steps later, gets no
time.
"""

import gc
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from fastkd.bench import Record, about_run, first_line, load_average, summary
from fastkd.bench.steps.baselines import BOUNDS, EXTRA, Batch, Makers, Notes, Way, eager_step, makers
from fastkd.bench.steps.breakdown import breakdown
from fastkd.bench.steps.workload import Plans, Workload, cycle
from fastkd.bench.timing import interleaved, per_step
from fastkd.engine.backends import backends
from fastkd.engine.mixup import Mixup

Log = Callable[[str], None]
QUICK, FULL = 2.0, 20.0  # seconds, of all ways together

# Largest relative error of the loss (or of 0.1 if it is smaller): at the first step, and after the steps that warm up.
# In 16 bits the memory layouts round differently, and a difference grows with every update.
FIRST = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
LATER = {torch.float32: 2e-2, torch.float16: 1e-1, torch.bfloat16: 1e-1}
WARM_UP = 6  # steps at least, enough for fastkd's graphs to be captured and replayed
AT_ONCE = {"cuda": 10, "cpu": 1}  # rounds that are timed together: the host may run ahead, as in training


def measure_step(
    workload: Workload,
    device: torch.device,
    quick: bool,
    compiled: bool,
    log: Log = print,
    amp_dtype: str = "auto",
    only: tuple[str, ...] = (),
) -> Record:
    """The record of a run. `quick`: few rounds; `compiled`: with torch.compile; `only`: these ways."""
    with backends(device):  # as in training
        return _measure(workload.filled(device), device, quick, compiled, log, amp_dtype, only)


def _measure(
    workload: Workload,
    device: torch.device,
    quick: bool,
    compiled: bool,
    log: Log,
    amp_dtype: str,
    only: tuple[str, ...],
) -> Record:
    load = load_average()
    torch._dynamo.reset()
    method, batch = workload.build(device), workload.batch(device, amp_dtype)
    steps = cycle(method)
    record = about_run(device, load) | {"pair": workload.name} | asdict(workload)
    record["dtype"] = str(batch[0].dtype).removeprefix("torch.")
    if not workload.kind.needs_teacher:
        record["teacher"] = None
    record |= {"quick": quick, "compiled": compiled, "steps_in_turn": len(steps)}
    log(f"{workload.name}: parts of a step")
    mixup = Mixup(0.0, 0.0, 0.0, workload.classes)
    record["parts"] = breakdown(eager_step(method, device, amp_dtype), mixup, batch, steps, 3 if quick else 10)
    ways, seconds = makers(method, batch, compiled, amp_dtype), QUICK if quick else FULL
    ways = {name: make for name, make in ways.items() if (name in only if only else name not in EXTRA)}
    with torch._dynamo.config.patch(recompile_limit=64):  # one per path
        found = measure_ways(ways, batch, steps, seconds, lambda name: log(f"{workload.name}: {name}"))
    return record | {"contenders": found}


def measure_ways(ways: Makers, batch: Batch, steps: list[Plans], seconds: float, log: Log) -> dict[str, Record]:
    """The record of each way. A way that does not fit into the memory beside the others is timed by itself."""
    found: dict[str, Record] = {}
    runs: dict[str, Way] = {}
    alone, device = [], batch[0].device
    for name, make in ways.items():
        log(name)
        found[name], run = prepared(make, batch, steps)
        if run and crowded(found, device):
            alone.append(name)
            run.close()
        elif run:
            runs[name] = run
        run = None  # so that its memory can be freed
    compare(found, batch[0].dtype)
    right = [name for name in found if found[name]["status"] == "right"]
    time_steps(found, {name: runs[name] for name in right if name in runs}, batch, steps, seconds)
    while runs:
        runs.popitem()[1].close()
    for name in (name for name in alone if name in right):
        found[name]["notes"].append("timed by itself: the memory does not hold it beside the others")
        if run := prepared(ways[name], batch, steps)[1]:
            time_steps(found, {name: run}, batch, steps, seconds / len(ways))
            run.close()
        run = None
    return found


def trace(workload: Workload, device: torch.device, path: Path) -> None:
    """Write a profiler trace of three eager steps of fastkd, for chrome://tracing or perfetto.dev."""
    workload = workload.filled(device)
    method, batch = workload.build(device), workload.batch(device)
    step, plans = eager_step(method, device), [plan for plans in cycle(method) for plan in plans]
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] * (device.type == "cuda")
    with backends(device):
        step(*batch, plans[0])
    with backends(device), torch.profiler.profile(activities=kinds) as profiler:
        for plan in (plans * 3)[:3]:
            step(*batch, plan)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    profiler.export_chrome_trace(str(path))


def prepared(make: Callable[[Notes], Way], batch: Batch, steps: list[Plans]) -> tuple[Record, Way | None]:
    """A way's record so far, with its losses and memory, and the way itself, or None if it is not possible."""
    device, before = batch[0].device, memory(batch[0].device)
    notes: Notes = []
    try:
        run = make(notes)
        found: Record = {"status": "right", "losses": first_and_later_loss(run, batch, steps), "notes": notes}
        if device.type == "cuda":
            memory(device)
            torch.cuda.reset_peak_memory_stats(device)
            for plan in steps[0]:
                run(*batch, plan)
            found["peak_mb"] = torch.cuda.max_memory_reserved(device) / 2**20 - before  # with the memory of its graphs
        return found, run
    except Exception as error:  # a missing compiler, an unfit network: the reason is reported
        return {"status": "unavailable", "reason": first_line(error), "notes": notes}, None


def first_and_later_loss(run: Way, batch: Batch, steps: list[Plans]) -> list[float]:
    """The loss of the first step, and of the last step of some rounds, enough for graphs to be captured."""
    plans = [plan for plans in steps for plan in plans]
    run(*batch, plans[0])
    first = run.loss()
    for plan in plans * max(3, math.ceil(WARM_UP / len(plans))):
        run.loss()
        run(*batch, plan)
    return [first, run.loss()]


def memory(device: torch.device) -> float:
    """MB that torch holds and cannot give back; 0 on the CPU."""
    if device.type != "cuda":
        return 0.0
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device) / 2**20


def crowded(found: Record, device: torch.device) -> bool:
    """True if the memory in use now and that of the largest step would fill the device."""
    if device.type != "cuda":
        return False
    largest = max(record.get("peak_mb", 0.0) for record in found.values())
    return memory(device) + largest > 0.9 * torch.cuda.get_device_properties(device).total_memory / 2**20


def compare(found: dict[str, Record], dtype: torch.dtype) -> None:
    """Set the status of ways whose losses differ from those of fastkd's eager step to "wrong"."""
    right = found["fastkd eager"].get("losses")
    for name, way in found.items():
        if way["status"] != "right":
            continue
        reason = "" if all(map(math.isfinite, way["losses"])) else "its loss is not finite"
        if not right:
            reason = reason or "fastkd's own step did not run, so there is nothing to compare with"
        elif name not in BOUNDS:
            reason = reason or difference(way["losses"], right, dtype)
        if reason:
            way |= {"status": "wrong", "reason": reason}


def difference(losses: list[float], right: list[float], dtype: torch.dtype) -> str:
    """How two pairs of losses differ, or the empty string if they agree."""
    for when, loss, wanted, allowed in zip(("first", "last"), losses, right, (FIRST[dtype], LATER[dtype]), strict=True):
        error = abs(loss - wanted) / max(abs(wanted), 0.1)
        if not error <= allowed:
            return f"its {when} loss is {loss:.6g}, fastkd's {wanted:.6g}: off by {error:.2g}, {allowed:g} is allowed"
    return ""


def time_steps(found: Record, right: dict[str, Way], batch: Batch, steps: list[Plans], seconds: float) -> None:
    """Write `times` (ms per step), `img_per_s` and the counts of a step into `found`."""
    device, plans = batch[0].device, [plan for plans in steps for plan in plans]
    at_once = AT_ONCE[device.type]

    def rounds(run: Way, count: int) -> Callable[[], None]:
        def go() -> None:
            for plan in plans * count:
                run(*batch, plan)

        return go

    def milliseconds(call: Callable[[], None]) -> float:  # until the device has finished
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) * 1e3

    calls = {name: rounds(run, at_once) for name, run in right.items()}
    for name, times in interleaved(calls, milliseconds, seconds).items():
        found[name]["times"] = summary([ms / (at_once * len(plans)) for ms in times])
        images = len(batch[0]) * len(steps) / len(plans)  # per step: a batch may take several
        found[name]["img_per_s"] = 1e3 * images / found[name]["times"]["median"]
        if device.type == "cuda" or not name.startswith("compile"):
            found[name] |= per_step(rounds(right[name], 1), len(plans), device)
