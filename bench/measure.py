"""One case: is every contender right, and how long does it take. What is wrong gets no time.

Right means: value and gradients agree with the eager formulation in float64, on the first call and on the second,
which finds the tensors as the first has left them.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from fastkd.bench.cases import Case, contenders, least_bytes
from fastkd.bench.clock import clocks, graphed, interleaved, kernels, works
from fastkd.bench.common import summary

# Relative error in the L2 norm: of the value, of a gradient. A gradient in bf16 is rounded to 8 bits, and in fp32 the
# sign of a difference that is nearly 0 may be the other one.
TOLERANCE = {torch.float32: (1e-4, 2e-3), torch.bfloat16: (5e-3, 1e-2)}


def precision(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def autocast(device: torch.device) -> AbstractContextManager:
    """What surrounds a loss in a trainer: in bf16 torch's softmaxes, norms and sums are then computed in fp32."""
    dtype = precision(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False)


def leaves(tensors: list[Tensor], learners: int, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Copies; floating ones in `dtype` where it is given; the first `learners` require a gradient."""
    copies = [x.detach().to(dtype if x.is_floating_point() else None, copy=True) for x in tensors]
    return [x.requires_grad_(place < learners) for place, x in enumerate(copies)]


def results(function: Callable[..., Tensor], tensors: list[Tensor], learners: int) -> list[Tensor]:
    """The value, then the gradients."""
    value = function(*tensors)
    gradients = torch.autograd.grad(value, tensors[:learners]) if learners else ()
    return [value.detach(), *gradients]


def difference(found: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> str:
    """What is wrong with `found`, or the empty string."""
    for place, (x, right) in enumerate(zip(found, wanted, strict=True)):
        allowed = TOLERANCE[dtype][place > 0] if x.dim() == 0 or place else TOLERANCE[dtype][1]
        error = ((x.double() - right).norm() / right.norm()).item()
        if not error <= allowed:
            name = f"gradient {place}" if place else "value"
            return f"{name} is off by {error:.2g} of its norm, {allowed:g} is allowed"
    return ""


def judge(case: Case, functions: dict[str, Callable], tensors: list[Tensor]) -> dict[str, dict]:
    """For each contender its status: right, wrong or unavailable; and why not."""
    device, dtype = tensors[0].device, precision(tensors[0].device)
    wanted = results(case.eager, leaves(tensors, case.learners, torch.float64), case.learners)
    verdicts = {}
    with autocast(device):
        for name, function in functions.items():
            copies, reason = leaves(tensors, case.learners), ""
            try:
                for _ in range(2):
                    reason = reason or difference(results(function, copies, case.learners), wanted, dtype)
                verdicts[name] = {"status": "wrong", "reason": reason} if reason else {"status": "right"}
            except Exception as error:  # of a compiler that is missing, a package that does not fit: reported
                verdicts[name] = {"status": "unavailable", "reason": first_line(error)}
    return verdicts


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def measure(case: Case, device: torch.device, seconds: float, compiled: bool, copy_rate: float) -> dict:
    """The record of a case: every contender with its verdict, its times by mode and way, and what follows from them."""
    tensors = leaves(case.make(device, precision(device)), case.learners)
    functions = contenders(case, compiled)
    found = judge(case, functions, tensors)
    right = {name: works(functions[name], tensors, case.learners) for name in found if found[name]["status"] == "right"}
    record = {"case": case.name, "least_bytes": least_bytes(case, tensors), "contenders": found}
    if right:
        with autocast(device):
            time_all(found, right, device, seconds)
        add_rates(record, copy_rate)
    return record


def time_all(found: dict, right: dict, device: torch.device, seconds: float) -> None:
    """Write `times` [mode][way] and, on CUDA, the kernels of a call into `found`."""
    for mode in next(iter(right.values())):
        calls = {name: modes[mode] for name, modes in right.items()}
        for way, clock in clocks(device).items():
            ready = calls if way == "call" else captured(calls, found)
            for name, times in (interleaved(ready, clock, seconds) if ready else {}).items():
                found[name].setdefault("times", {}).setdefault(mode, {})[way] = summary(times)
    if device.type == "cuda":
        for name in right:
            found[name]["kernels"] = kernels(list(right[name].values())[-1])


def captured(calls: dict, found: dict) -> dict:
    """The calls as graphs; one that cannot be is left out, with the reason in `found`."""
    graphs = {}
    for name, work in calls.items():
        try:
            graphs[name] = graphed(work)
        except Exception as error:
            torch.cuda.synchronize()
            found[name]["no_graph"] = first_line(error)
    return graphs


def add_rates(record: dict, copy_rate: float) -> None:
    """% of the copy rate, by the least bytes that the whole operation moves."""
    for contender in record["contenders"].values():
        if "times" in contender:
            whole = list(contender["times"].values())[-1]
            seconds = (whole.get("graph") or whole["call"])["median"] / 1e3
            contender["copy_rate_percent"] = 100 * record["least_bytes"] / seconds / copy_rate
