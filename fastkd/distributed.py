"""Several processes under torchrun; everything here is the identity when there is only one."""

import inspect
import os
from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import UserError


def device_for(name: str) -> torch.device:
    """The device of this process; starts the process group when torchrun started us."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cuda", "cpu") or not (index == "" or kind == "cuda" and index.isdigit() and not several):
        raise UserError(f"--device {name!r}: use auto, cuda, cpu, or with one process cuda:0, cuda:1, ...")
    device = torch.device(kind) if kind == "cpu" else _cuda_device(int(index or os.environ.get("LOCAL_RANK", 0)))
    if several and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return device


def _cuda_device(index: int) -> torch.device:
    if index >= torch.cuda.device_count():
        raise UserError(
            f"--device cuda:{index}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices here; "
            "use --device cpu or fewer processes"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def destroy() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Until every process has come here."""
    if world_size() > 1:
        dist.barrier()


def all_reduce_sum(counts: Tensor) -> Tensor:
    """The sum over all processes."""
    counts = counts.clone()
    if world_size() > 1:
        dist.all_reduce(counts)
    return counts


def gather(thing: object) -> list:
    """Every process's `thing`, in rank order."""
    things = [thing]
    if world_size() > 1:
        things = [None] * world_size()
        dist.all_gather_object(things, thing)
    return things


def from_rank_zero(function: Callable, *arguments):
    """What `function` gives on rank 0, which alone calls it."""
    return gather(function(*arguments) if rank() == 0 else None)[0]


@torch.no_grad()
def average_buffers(net: nn.Module) -> None:
    """Give every process the mean of the BatchNorm statistics, which each has collected from its own images."""
    if world_size() > 1:
        for buffer in net.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= world_size()


def parallel(module: nn.Module, device: torch.device, partial: bool = False) -> nn.Module:
    """DDP around a method. The teacher is outside of its module tree, so it is neither wrapped nor sent around.

    `partial`: weights that no process has used in a step keep no gradient.
    """
    if world_size() == 1:
        return module
    ids = [device.index] if device.type == "cuda" else None
    ddp = nn.parallel.DistributedDataParallel
    old = "forward_sync_buffers" not in inspect.signature(ddp).parameters  # torch before 2.15
    settings = {"broadcast_buffers" if old else "forward_sync_buffers": False, "gradient_as_bucket_view": True}
    return ddp(module, device_ids=ids, find_unused_parameters=partial, **settings)


@contextmanager
def rank_zero_first():
    """Rank 0 does the block, then the others: what it writes is there for them."""
    if rank() == 0:
        yield
    barrier()
    if rank() != 0:
        yield
