"""Several processes under torchrun or srun. With one process, every function here does nothing or gives its input."""

import inspect
import os
import shlex
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import rendezvous, slurm
from .errors import UserError
from .signals import EXIT_AGAIN, exit_while_waiting

T = TypeVar("T")


PEER_TIMEOUT_S = 1800  # gloo's own; NCCL's is 600, and the first process may read a data set for longer


def device_for(name: str, timeout_s: int = PEER_TIMEOUT_S) -> torch.device:
    """The device of this process for `--device name`; starts the process group under torchrun or srun.

    timeout_s: a process that waits for another one for longer ends with an error.

    `name`: "auto", "cpu", "cuda", or with one process "cuda:1". Raises UserError for other names and missing devices.
    """
    slurm.join()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cuda", "cpu") or not (index == "" or kind == "cuda" and index.isdigit() and not several):
        raise UserError(f"--device {name!r}: use auto, cuda, cpu, or with one process cuda:0, cuda:1, ...")
    device = torch.device("cpu")
    if kind == "cuda":
        number, found = int(index or _local_rank()), torch.cuda.device_count()
        if number >= found:
            raise UserError(
                f"--device cuda:{number}: torch {torch.__version__} sees {found} CUDA devices here; "
                "use --device cpu or fewer processes"
            )
        torch.cuda.set_device(number)
        device = torch.device("cuda", number)
    if several and not dist.is_initialized():
        _check_variables()
        with exit_while_waiting(EXIT_AGAIN):
            _start(kind, device, timedelta(seconds=timeout_s))
    return device


def _start(kind: str, device: torch.device, timeout: timedelta) -> None:
    """Start the process group. A signal meanwhile ends the process at once: nothing is to be saved yet."""
    options: dict[str, Any] = {"timeout": timeout}
    if "TORCHELASTIC_RUN_ID" in os.environ:
        options["store"], options["rank"], options["world_size"] = rendezvous.store_of_this_start(timeout)
    if kind == "cuda":  # with its device NCCL connects at once, and a barrier needs not guess the device
        dist.init_process_group("nccl", device_id=device, **options)
    else:
        dist.init_process_group("gloo", **options)


def _local_rank() -> str:
    """The number of this process's CUDA device. With srun's --gpus-per-task each task sees one device, number 0."""
    has_own = slurm.tasks_of(os.environ) > 1 and torch.cuda.device_count() == 1
    return "0" if has_own else os.environ.get("LOCAL_RANK", "0")


def _check_variables() -> None:
    """Raise UserError if some of the variables are missing that tell the processes of a job from each other."""
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} not set: start the processes by "
            "torchrun or srun, which set them, or unset WORLD_SIZE for one process"
        )


def command(*words: str) -> str:
    """The command line `fastkd ...` as this process was started: by torchrun or srun, where it was used."""
    nodes, processes = os.environ.get("GROUP_WORLD_SIZE", "1"), os.environ.get("LOCAL_WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ("srun ... " if slurm.tasks_of(os.environ) > 1 else "") + shlex.join(["fastkd", *words])
    where = f"--nnodes {nodes} ..." if nodes != "1" else "--standalone"
    return f"torchrun {where} --nproc-per-node {processes} -m " + shlex.join(["fastkd", *words])


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
    start = rendezvous.prefix_of_this_start or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"fastkd/failure/{start}"
    note = f"{os.environ.get('RANK')} {status}"
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        socket.create_connection(address, timeout=5).close()  # torch prints a stack if the store is gone
        store = dist.TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))
        first = store.compare_set(key, "", note).decode()
    except (KeyError, ValueError, RuntimeError, OSError):
        return 0
    return 0 if first == note else int(first.split()[1])


def is_lost_peer(error: Exception) -> bool:
    """True if gloo or NCCL cannot reach another process. gloo's errors have no class, but name its source file."""
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo/transport" in str(error)


def why_lost(error: Exception) -> str:
    """One line for an error of `is_lost_peer`."""
    text = " ".join(str(error).split())
    if "Timed out waiting" in text or "operation timeout" in text:  # gloo's and NCCL's words
        return f"another process of this job has not answered within --peer-timeout, so this one stops: {text}"
    return f"another process of this job has ended, so this one stops: {text}"


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


def all_gather(tensor: Tensor) -> Tensor:
    """The `tensor` of every process, [processes, ...] in rank order. It has the same shape on all of them."""
    if world_size() == 1:
        return tensor[None]
    rows = tensor.new_empty((world_size(), *tensor.shape))
    dist.all_gather(list(rows.unbind()), tensor)
    return rows


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
