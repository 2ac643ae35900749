"""Several processes under torchrun. With one process, every function here does nothing or gives its input."""

import inspect
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import UserError

T = TypeVar("T")


def device_for(name: str) -> torch.device:
    """The device of this process for `--device name`; starts the process group under torchrun.

    `name`: "auto", "cpu", "cuda", or with one process "cuda:1". Raises UserError for other names and missing devices.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cuda", "cpu") or not (index == "" or kind == "cuda" and index.isdigit() and not several):
        raise UserError(f"--device {name!r}: use auto, cuda, cpu, or with one process cuda:0, cuda:1, ...")
    device = torch.device("cpu")
    if kind == "cuda":
        number, found = int(index or os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if number >= found:
            raise UserError(
                f"--device cuda:{number}: torch {torch.__version__} sees {found} CUDA devices here; "
                "use --device cpu or fewer processes"
            )
        torch.cuda.set_device(number)
        device = torch.device("cuda", number)
    if several and not dist.is_initialized():
        if kind == "cuda":  # with its device NCCL connects at once, and a barrier needs not guess the device
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    return device


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def earlier_failure(status: int) -> int:
    """The exit status of the process of this job that failed first, or 0 if this one is the first.

    The first one tells the user why the job ends. Its peers fail as well, because they wait for it: they are silent and
    end with its status. `status` is that of this process. torchrun's store holds the note; it is there before the
    process group and after it. If it cannot be reached within 5 seconds, every process is the first.
    """
    key = f"fastkd/failure/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    note = f"{os.environ.get('RANK')} {status}"
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))
        first = store.compare_set(key, "", note).decode()
    except (KeyError, ValueError, RuntimeError):
        return 0
    return 0 if first == note else int(first.split()[1])


def is_lost_peer(error: Exception) -> bool:
    """True if gloo or NCCL cannot reach another process. gloo's errors have no class, but name its source file."""
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo/transport" in str(error)


def barrier() -> None:
    """Wait until every process has called this."""
    if world_size() > 1:
        dist.barrier()


def all_reduce_sum(counts: Tensor) -> Tensor:
    """The sum of `counts` over all processes, as a new tensor."""
    counts = counts.clone()
    if world_size() > 1:
        dist.all_reduce(counts)
    return counts


def all_reduce_(tensor: Tensor) -> None:
    """Replace `tensor` by the sum over all processes."""
    if world_size() > 1:
        dist.all_reduce(tensor)


@torch.no_grad()
def broadcast(net: nn.Module) -> None:
    """Give every process the weights and buffers of rank 0, as DDP does."""
    if world_size() > 1:
        for tensor in (*net.parameters(), *net.buffers()):
            dist.broadcast(tensor, 0)


def gather(thing: T) -> list[T]:
    """The `thing` of every process, in rank order; it must be picklable."""
    if world_size() == 1:
        return [thing]
    things: list = [None] * world_size()
    dist.all_gather_object(things, thing)
    return things


def from_rank_zero(function: Callable[..., T], *arguments: Any) -> T:
    """What `function(*arguments)` gives on rank 0. The other processes do not call it."""
    result = function(*arguments) if rank() == 0 else None
    return cast(T, gather(result)[0])


@torch.no_grad()
def average_buffers(net: nn.Module) -> None:
    """Give every process the mean of the BatchNorm statistics, which differ because each sees other images."""
    if world_size() > 1:
        for buffer in net.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= world_size()


def parallel(module: nn.Module, device: torch.device, find_unused_parameters: bool = False) -> nn.Module:
    """DDP around a method. The teacher is outside of its module tree, so DDP neither wraps nor broadcasts it.

    With `find_unused_parameters`, weights that no process used in a step keep no gradient.
    """
    if world_size() == 1:
        return module
    ddp = nn.parallel.DistributedDataParallel
    old = "forward_sync_buffers" not in inspect.signature(ddp).parameters  # torch before 2.15
    settings: dict[str, Any] = {"broadcast_buffers" if old else "forward_sync_buffers": False}
    settings["device_ids"] = [device.index] if device.type == "cuda" else None
    return ddp(module, find_unused_parameters=find_unused_parameters, gradient_as_bucket_view=True, **settings)
