"""How steps are launched: each operation by the host, or as CUDA graphs; `--graph` decides."""

from collections.abc import Callable

import torch

from ..errors import UserError
from ..methods.base import Method
from .graph import LARGEST, CudaGraph, GraphedStep
from .optim import APEX
from .options import TrainOptions
from .partial_graphs import PartialGraphStep, count_paths
from .step import Step

Runner = Step | GraphedStep | PartialGraphStep
"""Runs a step: `runner(images, target, plan)`, and `runner.close()` at the end."""


def graphed(step: Step, wanted: str, device: torch.device, processes: int, log: Callable[[str], None]) -> Runner:
    """The step run as `--graph` wants it: "auto", "on" or "off". Raises UserError if "on" is not possible."""
    if wanted == "off":
        return step
    check_graph(wanted, step.options, device, processes)
    if reason := why_not(step.options, device, processes):
        if device.type == "cuda":
            log(f"steps run eagerly: {reason}")
        return step
    capturable(step)
    stream = torch.cuda.Stream(device)

    def new_pool() -> Callable[[], CudaGraph]:
        pool = torch.cuda.graph_pool_handle()
        return lambda: CudaGraph(pool, stream)

    if count_paths(step.method) > LARGEST:
        return PartialGraphStep(step, new_pool)
    return GraphedStep(step, new_pool())


def capturable(step: Step) -> None:
    """Mark AdamW's groups as capturable, which torch asks for; a resumed run has the mark of its file."""
    for group in step.optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = True


def check_graph(wanted: str, options: TrainOptions, device: torch.device, processes: int) -> None:
    """Raise UserError if `--graph on` is not possible. Nothing is run."""
    reason = why_not(options, device, processes)
    if reason and wanted == "on":
        raise UserError(f"--graph on: {reason}; use --graph auto or off")


def why_not(options: TrainOptions, device: torch.device, processes: int) -> str:
    """Why steps cannot be captured, or the empty string."""
    if device.type != "cuda":
        return "there is no CUDA device"
    if processes > 1:
        return "several processes exchange gradients, which stays outside of a graph"
    if options.opt in APEX:
        return f"--opt {options.opt} reads its learning rate on the host"
    return ""


def check_compile(method: Method, options: TrainOptions) -> None:
    """Raise UserError if there are too many paths to compile; else allow torch to compile each of them."""
    if not options.compile:
        return
    paths = count_paths(method)
    if paths > LARGEST:
        raise UserError(
            f"--compile: a step takes one of {paths:,} paths and each would be compiled by itself, "
            f"{LARGEST} at most; use --gates stage, or leave --compile out"
        )
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 4 * paths)  # per path: two batch sizes, with and without autocast
