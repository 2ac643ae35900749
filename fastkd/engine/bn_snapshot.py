"""BatchNorm's running statistics in one block of memory, so that a bad step can be undone without a host sync.

A batch that holds an infinity makes running means NaN for good, even if the weights are not updated. So a skipped step
restores the statistics too.
"""

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # elements: each buffer starts at a multiple of 256 bytes, as a separate tensor would


class BatchNormSnapshot:
    """The float32 buffers of `net` become views of one tensor: saving and restoring them takes three launches.

    Move `net` to its device first: `to()` would give it separate buffers again, which this class does not see.
    """

    def __init__(self, net: nn.Module):
        found = [(module, name, buffer) for module in net.modules() for name, buffer in module._buffers.items()]
        places = [(module, name, buffer) for module, name, buffer in found if buffer is not None and _is_saved(buffer)]
        sizes = [-(-buffer.numel() // ALIGNMENT) * ALIGNMENT for *_, buffer in places]
        self.flat = torch.zeros(sum(sizes), device=places[0][2].device if places else None)
        for (module, name, buffer), block in zip(places, self.flat.split(sizes), strict=True):
            module._buffers[name] = block[: buffer.numel()].view(buffer.shape).copy_(buffer)
        self.saved = self.flat.clone()

    def save(self) -> None:
        """Remember the buffers as they are now."""
        self.saved.copy_(self.flat)

    def restore_if(self, bad: Tensor) -> None:
        """Restore the saved buffers if `bad`, a bool scalar on the device, is true. The host does not wait."""
        self.flat.copy_(torch.where(bad, self.saved, self.flat))


def _is_saved(buffer: Tensor) -> bool:
    return buffer.dtype == torch.float32 and buffer.numel() > 0
