"""Sums over all programs of a launch, without a second launch and without atomic additions.

Every program stores its sums and draws a ticket. The program with the last ticket adds up all sums in the order of the
programs, so the result is the same in every run. It also sets the ticket counter back to zero.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_tickets: dict[tuple[int, int], Tensor] = {}


def ticket(device: torch.device) -> Tensor:
    """A zeroed int32 counter that no kernel running at the same time uses.

    Kernels of one stream run one after another, so they share one. A captured graph may be replayed on any stream and
    gets its own, at the cost of one memset in the graph.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = (device.index, torch.cuda.current_stream(device).cuda_stream)
    if key not in _tickets:
        _tickets[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _tickets[key]


@triton.jit
def total(sums, partials, ticket, SLOTS: tl.constexpr, ROWS: tl.constexpr):
    """(is this the last program, the sum [SLOTS] over all programs if so); partials: scratch [programs, SLOTS]."""
    slot = tl.arange(0, SLOTS)
    tl.store(partials + tl.program_id(0) * SLOTS + slot, sums)
    tl.debug_barrier()  # all threads have stored before one of them draws the ticket
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == tl.num_programs(0) - 1
    everything = tl.zeros([SLOTS], tl.float32)
    if last:
        row = tl.arange(0, ROWS)
        while tl.min(row) < tl.num_programs(0):
            place = partials + row[:, None] * SLOTS + slot[None, :]
            # .cg: from L2, where the other programs' sums are, past this multiprocessor's own L1
            everything += tl.sum(
                tl.load(place, mask=row[:, None] < tl.num_programs(0), other=0.0, cache_modifier=".cg"), 0
            )
            row += ROWS
        tl.store(ticket, 0)
    return last, everything
