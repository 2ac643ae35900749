"""BatchNorm's running statistics in one block of memory, so that a bad step can be undone without asking the device.

A batch with an infinity in it makes running means NaN for good, whatever happens to the weights: they go back as well.
"""

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # elements: each buffer starts on 256 bytes, as a tensor of its own would


class BatchNormSnapshot:
    """The float32 buffers of `net`, which become views of one tensor: three launches a step however many there are.

    Move the network to its device before: `to()` gives it buffers of its own again, which this no longer guards.
    """

    def __init__(self, net: nn.Module):
        places = [(module, name) for module in net.modules() for name in module._buffers]
        places = [(module, name) for module, name in places if _moves(module._buffers[name])]
        sizes = [-(-module._buffers[name].numel() // ALIGNMENT) * ALIGNMENT for module, name in places]
        device = places[0][0]._buffers[places[0][1]].device if places else None
        self.flat = torch.zeros(sum(sizes), device=device)
        for (module, name), part in zip(places, self.flat.split(sizes), strict=True):
            buffer = module._buffers[name]
            view = part[: buffer.numel()].view(buffer.shape)
            module._buffers[name] = view.copy_(buffer)
        self.kept = self.flat.clone()

    def keep(self) -> None:
        self.kept.copy_(self.flat)

    def put_back_if(self, bad: Tensor) -> None:
        """`bad`: bool scalar on the device."""
        self.flat.copy_(torch.where(bad, self.kept, self.flat))


def _moves(buffer: Tensor | None) -> bool:
    return buffer is not None and buffer.dtype == torch.float32 and buffer.numel() > 0
