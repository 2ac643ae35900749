"""How steps are launched: each operation from the host, or as CUDA graphs; `--graph` decides."""

from collections.abc import Callable

import torch

from ..errors import UserError
from ..methods.base import Method
from .graph import LARGEST, CudaGraph, GraphedStep
from .optim import APEX
from .options import TrainOptions
from .partial_graphs import SegmentedStep, paths
from .step import Step


def graphed(step: Step, wanted: str, device: torch.device, processes: int, log) -> Step | GraphedStep | SegmentedStep:
    """The step as `--graph` wants it. UserError for "on" where it cannot be."""
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

    return SegmentedStep(step, new_pool) if paths(step.method) > LARGEST else GraphedStep(step, new_pool())


def capturable(step: Step) -> None:
    """AdamW asks for a mark in its groups, also where its step is fused; a resumed run has that of its file."""
    for group in step.optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = True


def check_graph(wanted: str, options: TrainOptions, device: torch.device, processes: int) -> None:
    """UserError where `--graph on` cannot be; known before anything is done."""
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
    """UserError where there are too many steps to compile; else torch is told how many there will be."""
    if not options.compile:
        return
    if paths(method) > LARGEST:
        raise UserError(
            f"--compile: a step takes one of {paths(method):,} paths and each would be compiled by itself, "
            f"{LARGEST} at most; use --gates stage, or leave --compile out"
        )
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 4 * paths(method))  # of a path: its batch sizes, its autocast
