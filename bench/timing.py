"""How long a call takes, and what it asks of the machine: operators or kernels, host syncs, layouts.

The CPU is timed by the wall clock, CUDA by events. Before every timed call on CUDA 256 MB are written, so that the
call's inputs are not in the L2 cache. A call (`call`) starts on an idle device and so includes the time to launch its
kernels. A replay (`graph`) is queued behind the writing and shows the time of the device alone.
"""

import ctypes
import gc
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")
Times = dict[str, list[float]]  # milliseconds of each call, by name
Clock = Callable[["Work"], float]
BOUT = 0.02  # seconds that one function is called again and again before the next one has its turn


class Work(NamedTuple):
    """A call to be timed: `run(prepare())`. The time of `prepare` does not count."""

    prepare: Callable[[], Any]
    run: Callable[[Any], object]


def works(function: Callable[..., Tensor], tensors: list[Tensor], learners: int) -> dict[str, Work]:
    """By mode: forward, and with `learners` (how many of the tensors get a gradient) also backward and both.

    The works have leaves of their own. A leaf's node lives as long as a loss of it, and belongs to one stream: with
    shared leaves, one function's captured loss would draw the next one's backward pass to the stream of the capture.
    """
    tensors = [x.detach().requires_grad_(x.requires_grad) for x in tensors]

    def forward(_: object = None) -> Tensor:
        return function(*tensors)

    def backward(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, tensors[:learners])

    modes = {"forward": Work(lambda: None, forward)}
    if learners:
        modes |= {"backward": Work(forward, backward), "both": Work(lambda: None, lambda _: backward(forward()))}
    return modes


def wall_ms(work: Work) -> float:
    """Milliseconds of one run by the wall clock."""
    given = work.prepare()
    start = time.perf_counter()
    work.run(given)
    return (time.perf_counter() - start) * 1e3


def clocks(device: torch.device) -> dict[str, Clock]:
    """By name: `call`, and on CUDA `graph`; see the module's docstring. In milliseconds."""
    if device.type != "cuda":
        return {"call": wall_ms}
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


def graphed(work: Work) -> Work:
    """The same work as replays of CUDA graphs. Raises RuntimeError if it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work.run(work.prepare())
    torch.cuda.current_stream().wait_stream(side)
    gc.collect()  # losses of the side stream that a cycle holds
    before, graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(before):
        # without the zeros the graph may be empty, of which torch warns
        kept: list[object] = [torch.zeros(1, device="cuda"), work.prepare()]
    before.replay()
    with torch.cuda.graph(graph, pool=before.pool()):
        kept.append(work.run(kept[1]))

    def run(_: object) -> list[object]:
        graph.replay()
        return kept  # the graphs' memory lives as long as this function

    return Work(before.replay, run)


def interleaved(calls: dict[str, T], clock: Callable[[T], float], seconds: float, least: int = 3) -> Times:
    """Milliseconds of each call, in bouts that take turns: for `seconds`, and at least `least` bouts of each.

    A bout is as many calls of one function as fit into BOUT, at least one: a call right after another function's takes
    up to twice its time.
    """
    for work in calls.values():
        clock(work)
    found: Times = {name: [] for name in calls}
    names, start, turn = list(calls), time.perf_counter(), 0
    while calls and (turn < least or time.perf_counter() < start + seconds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name].append(clock(calls[name]))
            end = time.perf_counter() + BOUT
            while time.perf_counter() < end:
                found[name].append(clock(calls[name]))
        turn += 1
    return found


def copy_rate(device: torch.device, megabytes: int = 512) -> float:
    """Bytes per second, read and written, of copying random numbers."""
    source = torch.randint(256, (megabytes * 10**6,), dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    work = Work(lambda: None, lambda _: copy.copy_(source))
    times = interleaved({"": work}, clocks(device)["call"], seconds=0, least=7)[""]
    return 2 * source.nbytes / (statistics.median(times) / 1e3)


SYNCS = (
    *("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "allclose", "bincount"),
    *("_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"),
)
"""Operators for which the host waits for the device."""
FREE = (
    *("view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "split", "unbind", "detach"),
    *("alias", "as_strided", "unsqueeze", "squeeze", "reshape", "split_with_sizes", "lift_fresh", "_reshape_alias"),
)
"""Operators that compute nothing."""


class OpCounter(TorchDispatchMode):
    """Counts operators that compute something, forward and backward. An operator of fastkd is one, as on CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.operators, self.syncs, self.convolutions, self.slow = 0, 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, result = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(i is not None and i.dtype == torch.bool for i in indices)
        self.operators += name not in FREE
        self.syncs += name in SYNCS or by_mask
        if "convolution" in name:
            maps = [x for x in tree_leaves((args, result)) if isinstance(x, Tensor) and x.dim() == 4]
            self.convolutions += 1
            self.slow += not all(x.is_contiguous(memory_format=torch.channels_last) for x in maps)
        return result


def counted(step: Callable[[], object]) -> OpCounter:
    with OpCounter() as counter:
        step()
    return counter


def per_step(step: Callable[[], object], steps: int, device: torch.device) -> dict[str, float]:
    """Means over the `steps` training steps in one call: kernels and syncs on CUDA, operators and syncs on the CPU.

    On the CPU this is wrong for compiled steps: torch runs them eagerly under a dispatch mode.
    """
    if device.type == "cuda":
        found = {"kernels": kernels(Work(lambda: None, lambda _: step())), "syncs": cuda_syncs(step)}
    else:
        counter = counted(step)
        found = {"operators": counter.operators, "syncs": counter.syncs}
    return {name: number / steps for name, number in found.items()}


def cuda_syncs(step: Callable[[], object]) -> int:
    """How often torch warns that the host waited for the device."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def kernels(work: Work) -> int:
    """Kernels, copies and fills on the GPU in one run, as torch's profiler or the null device counts them."""
    given = work.prepare()
    torch.cuda.synchronize()
    if "NULL_DEVICE" in os.environ:
        return launches(lambda: work.run(given), ctypes.CDLL(os.environ["NULL_DEVICE"]))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work.run(given)
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def launches(call: Callable[[], object], null_device: ctypes.CDLL) -> int:
    """Launches of one call on a device that computes nothing (tests/null_device); a replay counts as its nodes."""
    null_device.null_reset()
    call()
    with tempfile.NamedTemporaryFile("r") as report:
        null_device.null_report(report.name.encode())
        lines = [line.split("\t", 1) for line in report]
    return sum(int(count) * (int(name.split()[-1]) if name.startswith("GRAPH of ") else 1) for count, name in lines)
