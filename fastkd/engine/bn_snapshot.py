"""BatchNorm's running statistics in one block of memory, so that a bad step can be undone without a host sync.

A batch that holds an infinity makes running means NaN for good, even if the weights are not updated. So a skipped step
restores the statistics too.
"""

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # elements: each buffer starts at a multiple of 256 bytes, as a separate tensor would


def join_buffers(net: nn.Module, device: torch.device) -> Tensor:
    """One tensor of which the float32 buffers of `net` become views: one launch saves or restores all of them.

    Move `net` to its device first: `to()` would give it separate buffers again, which the tensor does not see. It has
    no elements if there are no such buffers.
    """
    places = [
        (module, name, buffer)
        for module in net.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.dtype == torch.float32 and buffer.numel()
    ]
    sizes = [-(-buffer.numel() // ALIGNMENT) * ALIGNMENT for *_, buffer in places]
    joined = torch.zeros(sum(sizes), device=device)
    for (module, name, buffer), block in zip(places, joined.split(sizes), strict=True):
        module._buffers[name] = block[: buffer.numel()].view(buffer.shape).copy_(buffer)
    return joined
