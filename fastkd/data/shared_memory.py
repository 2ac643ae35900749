"""The shared memory (/dev/shm) through which worker processes hand over their batches. Docker gives 64 MB of it."""

import os

from ..errors import UserError

PLACE = "/dev/shm"


def check_shared_memory(workers: int, ahead: int, batch_bytes: int, remedy: str) -> None:
    """Raise UserError unless the batches of all workers fit: `ahead` of each worker, and the one that is used.

    batch_bytes: of the largest batch. remedy: the options that need less. Too little of it would show as a worker that
    dies or as a wait for a batch that never comes. Under torchrun each process of this machine takes as much.
    """
    try:
        room = os.statvfs(PLACE)
    except OSError:  # not Linux, or no such place: torch keeps its batches elsewhere
        return
    free = room.f_bavail * room.f_frsize
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    need = (workers * ahead + 1) * batch_bytes * processes if workers else 0
    if need > free:
        each = f"{processes} processes x " if processes > 1 else ""
        raise UserError(
            f"the batches of {each}{workers} workers need {need / 1e6:,.0f} MB of shared memory, and {PLACE} has "
            f"{free / 1e6:,.0f} MB free: start the container with --shm-size={need // 2**20 + 64}m (or --ipc=host), or "
            f"{remedy}; --workers 0 needs none"
        )
