"""Contenders for a training step: is the loss of each that of fastkd's, and how long does its step take."""

import gc
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fastkd.bench.clock import interleaved
from fastkd.bench.common import summary
from fastkd.bench.contenders import BOUNDS
from fastkd.bench.count import per_step
from fastkd.bench.measure import first_line

# Of the loss, relative (of 0.1 where it is below): at the first step, and after the steps that warm up. In bf16 the
# layouts round otherwise, and every update makes a difference grow.
FIRST = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
LATER = {torch.float32: 2e-2, torch.bfloat16: 1e-1}
WARM_UP = 6  # steps at least, of which fastkd's graph is captured and replayed
AT_ONCE = {"cuda": 10, "cpu": 1}  # rounds that are timed together, so that the host may run ahead as in training


def prepared(make: Callable, batch: tuple[Tensor, Tensor], steps: list[tuple]) -> tuple[dict, object]:
    """A contender's record so far, with its losses and memory, and what runs its steps; None where it cannot be."""
    notes, device, before = [], batch[0].device, memory(batch[0].device)
    try:
        run = make(notes)
        losses = [first_loss(run, batch, steps), later_loss(run, batch, steps)]
        found = {"status": "right", "losses": losses, "notes": notes}
        if device.type == "cuda":
            found["peak_mb"] = peak(run, batch, steps, device) - before
        return found, run
    except Exception as error:  # of a compiler that is missing, a net that does not fit: reported
        return {"status": "unavailable", "reason": first_line(error), "notes": notes}, None


def first_loss(run, batch: tuple[Tensor, Tensor], steps: list[tuple]) -> float:
    run(*batch, steps[0][0])
    return run.loss()


def later_loss(run, batch: tuple[Tensor, Tensor], steps: list[tuple]) -> float:
    """Of the last of some rounds, enough for graphs to be captured."""
    plans = [plan for plans in steps for plan in plans]
    for _ in range(max(3, math.ceil(WARM_UP / len(plans)))):
        for plan in plans:
            run.loss()
            run(*batch, plan)
    return run.loss()


def memory(device: torch.device) -> float:
    """MB that torch holds, without what it could give back."""
    if device.type != "cuda":
        return 0.0
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device) / 2**20


def peak(run, batch: tuple[Tensor, Tensor], steps: list[tuple], device: torch.device) -> float:
    """MB in a step, with the memory of its graphs."""
    memory(device)
    torch.cuda.reset_peak_memory_stats(device)
    for plan in steps[0]:
        run(*batch, plan)
    return torch.cuda.max_memory_reserved(device) / 2**20


def crowded(found: dict[str, dict], device: torch.device) -> bool:
    """Whether what is held now and the largest step beside it would fill the device's memory."""
    if device.type != "cuda":
        return False
    largest = max(record.get("peak_mb", 0.0) for record in found.values())
    return memory(device) + largest > 0.9 * torch.cuda.get_device_properties(device).total_memory / 2**20


def release(run) -> None:
    """Give back what a contender holds."""
    if run is not None:
        run.close()


def compare(found: dict[str, dict], dtype: torch.dtype) -> None:
    """Contenders whose losses are not those of fastkd's plain step become wrong."""
    right = found["fastkd eager"].get("losses")
    for name, contender in found.items():
        if contender["status"] != "right":
            continue
        reason = "" if all(map(math.isfinite, contender["losses"])) else "its loss is not finite"
        if not right:
            reason = reason or "fastkd's own step did not run, so there is nothing to compare with"
        elif name not in BOUNDS:
            reason = reason or difference(contender["losses"], right, dtype)
        if reason:
            contender |= {"status": "wrong", "reason": reason}


def difference(losses: list[float], right: list[float], dtype: torch.dtype) -> str:
    for when, loss, wanted, allowed in zip(("first", "last"), losses, right, (FIRST[dtype], LATER[dtype]), strict=True):
        error = abs(loss - wanted) / max(abs(wanted), 0.1)
        if not error <= allowed:
            return f"its {when} loss is {loss:.6g}, fastkd's {wanted:.6g}: off by {error:.2g}, {allowed:g} is allowed"
    return ""


def time_steps(found: dict, right: dict, batch: tuple[Tensor, Tensor], steps: list[tuple], seconds: float) -> None:
    """Write `times` (ms per step), `img_per_s` and the counts of a step into `found`."""
    device, plans = batch[0].device, [plan for plans in steps for plan in plans]
    at_once = AT_ONCE[device.type]

    def rounds(run, count: int) -> Callable[[], None]:
        def go():
            for plan in plans * count:
                run(*batch, plan)

        return go

    calls = {name: rounds(run, at_once) for name, run in right.items()}
    timed = interleaved(calls, lambda call: steady_ms(call, device), seconds) if calls else {}
    for name, times in timed.items():
        found[name]["times"] = summary([ms / (at_once * len(plans)) for ms in times])
        images = len(batch[0]) * len(steps) / len(plans)  # of a step: a batch may be several
        found[name]["img_per_s"] = 1e3 * images / found[name]["times"]["median"]
        if device.type == "cuda" or not name.startswith("compile"):
            found[name] |= per_step(rounds(right[name], 1), len(plans), device)


def steady_ms(call: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3
