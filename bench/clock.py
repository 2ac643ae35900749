"""How long a call takes, on the CPU by the wall clock, on CUDA by events, called or replayed as a CUDA graph.

Before every timed call on CUDA 256 MB are written, so that what the call reads is not in the L2 cache. A call (`call`)
starts from an idle queue and so includes the time to launch its kernels; a replay (`graph`) is queued behind that
writing and is the time of the device alone.
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Clock = Callable[["Work"], float]
BOUT = 0.02
"""Seconds"""


class Work(NamedTuple):
    """What is timed: `run` of what `prepare` gives, whose own time does not count."""

    prepare: Callable[[], object]
    run: Callable[[object], object]


def works(function: Callable[..., Tensor], tensors: list[Tensor], learners: int) -> dict[str, Work]:
    """By mode: forward, and where there is a gradient backward and both."""

    def forward(_=None):
        return function(*tensors)

    def backward(loss):
        return torch.autograd.grad(loss, tensors[:learners])

    modes = {"forward": Work(lambda: None, forward)}
    if learners:
        modes |= {"backward": Work(forward, backward), "both": Work(lambda: None, lambda _: backward(forward()))}
    return modes


def wall_ms(work: Work) -> float:
    given = work.prepare()
    start = time.perf_counter()
    work.run(given)
    return (time.perf_counter() - start) * 1e3


def event_clock(device: torch.device) -> dict[str, Clock]:
    """`call` and `graph` of the module's docstring, in milliseconds."""
    cache = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)

    def timed(work: Work, idle: bool) -> float:
        given = work.prepare()
        cache.fill_(1)
        if idle:
            torch.cuda.synchronize(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work.run(given)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return {"call": lambda work: timed(work, idle=True), "graph": lambda work: timed(work, idle=False)}


def clocks(device: torch.device) -> dict[str, Clock]:
    return event_clock(device) if device.type == "cuda" else {"call": wall_ms}


def graphed(work: Work) -> Work:
    """The same as replays of CUDA graphs. RuntimeError where the work cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work.run(work.prepare())
    torch.cuda.current_stream().wait_stream(side)
    before, graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(before):
        # an empty graph makes torch warn; the copy is not timed
        kept = [torch.zeros(1, device="cuda"), work.prepare()]
    before.replay()
    with torch.cuda.graph(graph, pool=before.pool()):
        kept.append(work.run(kept[1]))
    return Work(before.replay, lambda _: (graph.replay(), kept)[0])


def interleaved(calls: dict[str, Work], clock: Clock, seconds: float, least: int = 3) -> dict[str, list[float]]:
    """Milliseconds of each, in bouts that take turns: for `seconds`, at least `least` bouts of each.

    A bout is as many calls of one as fit into BOUT: a call right after another's work takes up to twice its time.
    """
    for work in calls.values():
        clock(work)
    found, names, start, turn = {name: [] for name in calls}, list(calls), time.perf_counter(), 0
    while turn < least or time.perf_counter() < start + seconds:
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name] += bout(calls[name], clock)
        turn += 1
    return found


def bout(work: Work, clock: Clock) -> list[float]:
    times, end = [clock(work)], time.perf_counter() + BOUT
    while time.perf_counter() < end:
        times.append(clock(work))
    return times


def kernels(work: Work) -> int:
    """Kernels, copies and fills on the GPU in one call, as torch's profiler counts them."""
    given = work.prepare()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work.run(given)
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def copy_rate(device: torch.device, megabytes: int = 512) -> float:
    """Bytes per second, read and written, of copying random numbers."""
    source = torch.randint(256, (megabytes * 10**6,), dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    clock = clocks(device)["call"]
    work = Work(lambda: None, lambda _: copy.copy_(source))
    return 2 * source.nbytes / (statistics.median(interleaved({"": work}, clock, seconds=0, least=7)[""]) / 1e3)
