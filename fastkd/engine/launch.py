"""How steps are launched: each operation from the host, or as CUDA graphs; `--graph` decides."""

from collections.abc import Callable

import torch

from ..errors import UserError
from .graph import LARGEST, CudaGraph, GraphedStep
from .optim import can_skip
from .segments import SegmentedStep, paths
from .step import Step


def graphed(step: Step, wanted: str, device: torch.device, processes: int, say) -> Step | GraphedStep | SegmentedStep:
    """The step as `--graph` wants it. UserError for "on" where it cannot be."""
    if wanted == "off":
        return step
    reason = why_not(step, device, processes)
    if reason and wanted == "on":
        raise UserError(f"--graph on: {reason}; use --graph auto or off")
    if reason:
        if device.type == "cuda":
            say(f"steps run eagerly: {reason}")
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


def why_not(step: Step, device: torch.device, processes: int) -> str:
    """Why the steps cannot be captured, or the empty string."""
    if device.type != "cuda":
        return "there is no CUDA device"
    if processes > 1:
        return "several processes exchange gradients, which stays outside of a graph"
    if not can_skip(step.optimizer):
        return "the optimizer reads its learning rate on the host"
    if step.options.compile and paths(step.method) > LARGEST:
        return f"a step takes one of {paths(step.method)} paths, whose parts are captured, which --compile cannot see"
    return ""
