"""How long calls take on the device, to choose the fastest.

On a GPU the clock is that of CUDA events, around replays of a graph of the call: the time of a call by the host is
mostly that of its launches, which a captured step does not have. On the CPU it is the host's clock.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

ROUNDS = 5
REPLAYS = 3  # of a graph between two events

Call = Callable[[], object]


class Timing(NamedTuple):
    milliseconds: float  # of a call, the median of ROUNDS
    reason: str = ""  # why the launches of the host are in it: the call cannot be captured


def time_calls(calls: Mapping[str, Call], device: torch.device, repeat: int = 1) -> dict[str, Timing]:
    """The time of each call: the calls take turns, after one round of warm-up. `repeat`: calls in one graph."""
    if device.type != "cuda":
        return {name: Timing(ms) for name, ms in _by_host(calls).items()}
    before = torch.cuda.current_stream(device)
    stream, graphs, reasons = torch.cuda.Stream(device), {}, dict.fromkeys(calls, "")
    for name, call in calls.items():
        try:
            graphs[name] = _captured(call, repeat, stream, before)
        except RuntimeError as error:  # as the operation that cannot be captured says
            reasons[name] = str(error.__context__ or error).splitlines()[0][:160]
    runs = {name: graphs[name].replay if name in graphs else call for name, call in calls.items()}
    times = _by_events(runs)
    for graph in graphs.values():
        graph.reset()
    torch.cuda.empty_cache()  # what the graphs had
    return {name: Timing(ms / (repeat if name in graphs else 1), reasons[name]) for name, ms in times.items()}


def _captured(call: Call, repeat: int, stream: torch.cuda.Stream, before: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """A graph of `repeat` calls, with memory of its own. RuntimeError if it cannot be captured."""
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        call()  # algorithms are chosen and kernels compiled
    before.wait_stream(stream)
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            for _ in range(repeat):
                call()
    except RuntimeError:
        torch.cuda.set_stream(before)
        release_failed_capture(pool, before.device)
        raise
    return graph


def release_failed_capture(pool: Any, device: torch.device) -> None:
    """Let the allocator and the random generator leave a capture that has failed, and free its pool.

    torch 2.14 does so itself, 2.11 does not: memory that another stream has used is then never given out again, and
    random numbers raise until a capture succeeds, so one follows at once.
    """
    try:
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
    except RuntimeError:  # "not currently recording"
        return
    zero = torch.zeros((), device=device)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
        zero.zero_()


def _by_events(runs: Mapping[str, Call]) -> dict[str, float]:
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
    for _ in range(ROUNDS + 1):
        for name, run in runs.items():
            marks[name].append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            start, end = marks[name][-1]
            start.record()
            for _ in range(REPLAYS):
                run()
            end.record()
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs[1:]) / REPLAYS for name, pairs in marks.items()}


def _by_host(calls: Mapping[str, Call]) -> dict[str, float]:
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(ROUNDS + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number:
                found[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(times) for name, times in found.items()}
