"""`fastkd bench step`: where the time of a training step goes, and how many images a second each way to run it takes.

Data are noise that lies on the device. A contender whose loss is not fastkd's, at its first step or after some more,
gets no time.
"""

import copy
from pathlib import Path

import torch

from fastkd.bench.command import make_room
from fastkd.bench.common import commit, environment, load_average, write_json
from fastkd.bench.contenders import makers, options
from fastkd.bench.pair import Pair, cycle
from fastkd.bench.parts import breakdown
from fastkd.bench.screen import log_rank0
from fastkd.bench.step_report import draw_step, show_step
from fastkd.bench.step_times import compare, crowded, prepared, release, time_steps
from fastkd.engine import Step
from fastkd.engine.mixup import Mixup
from fastkd.engine.precision import Precision
from fastkd.errors import UserError
from fastkd.methods.base import Method

QUICK, FULL = 2.0, 20.0  # seconds, of all contenders together


def measure_step(pair: Pair, device: torch.device, quick: bool, compiled: bool, tell=lambda line: None) -> dict:
    """The record of a run; `compiled`: torch.compile takes part."""
    pair, load = pair.filled(device), load_average()
    torch.backends.cudnn.benchmark = True  # as fastkd train does: one image size
    torch._dynamo.reset()
    method, batch = pair.build(device), pair.batch(device)
    steps, record = cycle(method), about(pair, device, load)
    record |= {"quick": quick, "compiled": compiled, "steps_in_turn": len(steps)}
    tell(f"{pair.name}: parts of a step")
    mixup = Mixup(0.0, 0.0, 0.0, pair.classes)
    record["parts"] = breakdown(own_step(method, device), mixup, batch, steps, 3 if quick else 10)
    ways = makers(method, batch, compiled)
    with torch._dynamo.config.patch(recompile_limit=64):  # a method that draws has as many graphs as paths
        record["contenders"] = measure_ways(ways, batch, steps, QUICK if quick else FULL, pair.name, tell)
    return record


def measure_ways(ways: dict, batch, steps: list[tuple], seconds: float, title: str, tell) -> dict[str, dict]:
    """The record of each contender. Those that the memory does not hold beside the others are timed by themselves."""
    found, runs, alone, device = {}, {}, [], batch[0].device
    for name, make in ways.items():
        tell(f"{title}: {name}")
        found[name], runs[name] = prepared(make, batch, steps)
        if runs[name] and crowded(found, device):
            alone.append(name)
            release(runs.pop(name))
    compare(found, batch[0].dtype)
    right = [name for name in found if found[name]["status"] == "right"]
    time_steps(found, {name: runs[name] for name in right if name in runs}, batch, steps, seconds)
    while runs:
        release(runs.popitem()[1])
    for name in (name for name in alone if name in right):
        found[name]["notes"].append("timed by itself: the memory does not hold it beside the others")
        _, run = prepared(ways[name], batch, steps)
        time_steps(found, {name: run} if run else {}, batch, steps, seconds / len(ways))
        release(run)
        run = None
    return found


def own_step(method: Method, device: torch.device) -> Step:
    return Step(copy.deepcopy(method), options(), device)


def about(pair: Pair, device: torch.device, load: float) -> dict:
    shape = {name: getattr(pair, name) for name in ("method", "student", "batch_size", "image_size", "classes")}
    return {
        "environment": environment(),
        "commit": commit(),
        "load_average": load,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(Precision("auto", device).dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "pair": pair.name,
        **shape,
        "teacher": pair.teacher if pair.kind.needs_teacher else None,
        "peers": list(pair.peers),
    }


def trace(pair: Pair, device: torch.device, path: Path) -> None:
    """A few eager steps of fastkd for chrome://tracing or perfetto.dev."""
    pair = pair.filled(device)
    method, batch = pair.build(device), pair.batch(device)
    step, plans = own_step(method, device), [plan for plans in cycle(method) for plan in plans]
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] * (device.type == "cuda")
    step(*batch, plans[0])
    with torch.profiler.profile(activities=kinds) as profiler:
        for plan in (plans * 3)[:3]:
            step(*batch, plan)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    profiler.export_chrome_trace(str(path))


def run(pair: Pair, quick: bool, compiled: bool, json: str, plot: str, trace_file: str) -> None:
    """The command: measure, show, write the files."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if plot and Path(plot).suffix != ".png":
        raise UserError(f"--plot must be a .png file, got {plot!r}")
    files = {"--plot": plot, "--json": json, "--trace": trace_file}
    if len(given := [file for file in files.values() if file]) > len(set(given)):
        raise UserError(f"two of {', '.join(files)} name one file, {max(given, key=given.count)!r}; give each its own")
    for flag, file in files.items():
        if file:
            make_room(flag, Path(file))
    measured = measure_step(pair, device, quick, compiled or device.type == "cuda" and not quick, log_rank0)
    show_step(measured)
    if plot:
        draw_step(measured, Path(plot))
    if json:
        write_json(json, measured)
    if trace_file:
        trace(pair, device, Path(trace_file))
