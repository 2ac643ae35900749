"""How steps are launched: each operation by the host, or as CUDA graphs; `--graph` decides."""

from collections.abc import Callable
from functools import partial

import torch
from torch.nn.parallel import DistributedDataParallel

from .. import distributed
from ..errors import UserError
from ..methods.base import Method
from .graph import LARGEST, GraphedStep, GraphMemory
from .optim import APEX
from .options import TrainOptions
from .partial_graphs import PartialGraphStep, count_paths
from .step import Step
from .teacher_forms import check_form
from .timm_optim import is_timms

Log = Callable[[str], None]
Runner = Step | GraphedStep | PartialGraphStep
"""Runs a step: `runner(images, target, plan, taught)`, and `runner.close()` at the end."""
IMAGE_SIZES = 8
COMPILE_PAYS = 100_000  # steps: compiling takes a minute or two and saves about a tenth of a step of 1 to 30 ms


def graphed(step: Step, wanted: str, device: torch.device, log: Log) -> Runner:
    """The step run as `--graph` wants it: "auto", "on" or "off". Raises UserError if "on" is not possible."""
    if wanted == "off":
        return step
    check_graph(wanted, step.options, device)
    reason = why_not(step.options, device)
    if isinstance(step.module, DistributedDataParallel):
        reason = reason or "DDP averages its gradients; make the Step with flat=True"
    if reason:
        if device.type == "cuda":
            log(f"steps run eagerly: {reason}")
        return step
    capturable(step)
    log(f"steps run as CUDA graphs{', compiled' if step.compiled else ''}")
    stop = partial(_stop, wanted, log)
    if count_paths(step.method) > LARGEST:
        stream = torch.cuda.Stream(device)
        return PartialGraphStep(step, lambda: GraphMemory(stream).graph, stop=stop)
    memory = GraphMemory(torch.cuda.Stream(device))
    return GraphedStep(step, memory.graph, memory=memory, stop=stop)


def _stop(wanted: str, log: Log, reason: str) -> None:
    if wanted == "on":
        raise UserError(f"--graph on: {reason}; use --graph auto or off")
    log(f"steps run eagerly from here on: {reason}")


def capturable(step: Step) -> None:
    """Mark AdamW's groups as capturable, which torch asks for; a resumed run has the mark of its file."""
    for group in step.optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = True


def check_graph(wanted: str, options: TrainOptions, device: torch.device) -> None:
    """Raise UserError if `--graph on` is not possible. Nothing is run."""
    reason = why_not(options, device)
    if reason and wanted == "on":
        raise UserError(f"--graph on: {reason}; use --graph auto or off")


def why_not(options: TrainOptions, device: torch.device) -> str:
    """Why steps cannot be captured, or the empty string."""
    if device.type != "cuda":
        return "there is no CUDA device"
    if options.opt in APEX or is_timms(options.opt):
        return f"--opt {options.opt} reads its learning rate on the host"
    if options.sync_bn and distributed.world_size() > 1:
        return "--sync-bn exchanges statistics within the forward pass"
    return ""


def uses_graphs(options: TrainOptions, device: torch.device) -> bool:
    """True if steps will be captured, unless a network turns out not to allow it."""
    return options.graph != "off" and not why_not(options, device)


def compiles(method: Method, options: TrainOptions, device: torch.device, steps: int, log: Log) -> bool:
    """Whether a run of so many steps compiles its networks and losses."""
    if options.compile != "auto":
        return options.compile == "on"
    if options.sync_bn and distributed.world_size() > 1:
        return False
    if device.type != "cuda" or steps < COMPILE_PAYS or count_paths(method) > LARGEST:
        return False
    _allow_recompiling(method)
    log(f"compiling networks and losses, which pays in {steps:,} steps; --compile off does without")
    return True


def check_method(method: Method, options: TrainOptions) -> None:
    """Raise UserError unless `method` can be trained with `options`. Nothing is run."""
    for what, kind, value in (("a method", Method, method), ("TrainOptions", TrainOptions, options)):
        if not isinstance(value, kind):
            raise UserError(
                f"the trainer needs {what}, got a {type(value).__name__}: "
                "Trainer(KD(student, teacher), train_loader, val_loader, TrainOptions(epochs=10))"
            )
    check_form(method, options.teacher_form)
    check_compile(method, options)


def check_compile(method: Method, options: TrainOptions) -> None:
    """Raise UserError if there are too many paths to compile; else allow torch to compile each of them."""
    if options.compile != "on":
        return
    paths = count_paths(method)
    if paths > LARGEST:
        raise UserError(
            f"--compile on: a step takes one of {paths:,} paths and each would be compiled by itself, "
            f"{LARGEST} at most; use --gates stage, or --compile off"
        )
    _allow_recompiling(method)


def _allow_recompiling(method: Method) -> None:
    limit = torch._dynamo.config.recompile_limit
    # per path: two batch sizes, with and without autocast, at a few image sizes (--train-size)
    torch._dynamo.config.recompile_limit = max(limit, 4 * IMAGE_SIZES * count_paths(method))
