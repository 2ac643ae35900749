"""How steps are launched: each operation from the host, or as CUDA graphs; `--graph` decides."""

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
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
    kind = SegmentedStep if paths(step.method) > LARGEST else GraphedStep
    return kind(step, lambda: CudaGraph(pool, stream))


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
