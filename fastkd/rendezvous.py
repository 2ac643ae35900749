"""A store of its own for each start of a job: torchrun's restarts share one, and its entries outlive their processes.

A process that starts faster than another would read the address that the other one had before it was killed, and fail
to connect (pytorch issue 135712). torchrun's count of restarts does not help: each node has its own count.
"""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from .errors import UserError

POLL_S = 0.02
prefix_of_this_start = ""
"""Empty until the processes have found each other."""


def store_of_this_start(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """The store of torchrun, with a prefix that only the processes of this start know; the rank, and the world size.

    Rank 0 chooses the prefix. Another process asks for it under a name of its own, so that no old answer serves.
    Raises UserError if a process has not asked within `timeout`, or rank 0 not answered.
    """
    global prefix_of_this_start
    store, rank, processes = next(dist.rendezvous("env://", timeout=timeout))
    prefix = _ask(store, rank) if rank else uuid.uuid4().hex
    until = time.monotonic() + timeout.total_seconds()
    for other in range(1, processes if rank == 0 else 1):
        _answer(store, other, prefix, until)
    prefix_of_this_start = prefix
    return dist.PrefixStore(prefix, store), rank, processes


def _ask(store: dist.Store, rank: int) -> str:
    """The prefix that rank 0 has chosen."""
    own = uuid.uuid4().hex
    store.set(f"question of {rank}", own)
    try:
        prefix = store.get(f"answer to {own}").decode()
    except dist.DistStoreError:
        raise UserError("process 0 has not answered: see what it printed, and whether its node is there") from None
    store.set(f"{prefix} is known to {rank}", "")
    return prefix


def _answer(store: dist.Store, rank: int, prefix: str, until: float) -> None:
    """Answer to the questions of a rank, of which the first may be an old one, until it says that it knows."""
    while not store.check([f"{prefix} is known to {rank}"]):
        if store.check([f"question of {rank}"]):
            store.set(f"answer to {store.get(f'question of {rank}').decode()}", prefix)
        if time.monotonic() > until:
            raise UserError(f"process {rank} has not started: see what it printed, and whether its node is there")
        time.sleep(POLL_S)
