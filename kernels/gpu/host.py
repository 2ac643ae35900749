"""What the launch functions share on the host: block sizes, number of programs and strides."""

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Within the block `device` is the current one, as a launch needs it. The interpreter has no GPU."""
    is_current = device.type != "cuda" or device.index == torch.cuda.current_device()
    return nullcontext() if is_current else torch.cuda.device(device)


def power_of_2(least: int) -> int:
    """The smallest power of 2 from `least` on. Triton's own takes 3 us on the host, three times a launch."""
    return 1 << (least - 1).bit_length()


def programs(rows: int, warps: int, device: torch.device) -> int:
    """The number of programs for `rows` rows: as many as are resident at once. Each then takes several rows."""
    if device.type != "cuda":
        return min(rows, 3)  # the interpreter runs them one by one; 3 lets a program have several rows
    return min(rows, _multiprocessors(device) * max(1, 64 // warps))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Asking torch takes a tenth of a launch's host time."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def contiguous_rows(x: Tensor) -> Tensor:
    """x [..., C], or a copy if the elements of a row are not next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def common_unit(*sizes: int) -> int:
    """8 if all sizes and strides are multiples of 8, else 1.

    Kernels get them divided by the unit, which is a constant: the compiler then knows that 128-bit accesses in 16 bits
    are aligned.
    """
    return 8 if all(size % 8 == 0 for size in sizes) else 1


def row_shape(classes: int, itemsize: int) -> tuple[int, int]:
    """(classes read at once, warps) for two rows read and one written, without spilled registers.

    8 classes a thread make 128-bit accesses in 16 bits; 16 warps have 128 registers a thread.
    """
    each, block = 32 // itemsize, max(16, power_of_2(classes))
    if block > each * 32 * 16:
        return 2048, 8  # in pieces
    return block, min(max(1, block // 256), 16)


def most_registers(warps: int) -> int:
    """Registers a thread may have if one program of so many warps fills a multiprocessor."""
    return min(255, 2048 // warps)
