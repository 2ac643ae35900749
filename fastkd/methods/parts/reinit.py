"""A copy of a module with new random weights, for bridges (SOKD) and auxiliary heads (DCM).

Ours: convolutions start as in fastkd's networks (`he_init`), all other layers as in torch, however the network was
initialised. ConvNeXt's layer scale starts at 1e-6, as in its paper (arXiv:2201.03545), and V2's response norm at 0.
"""

import copy

import torch
from torch import nn

from ...errors import UserError
from ...models.nets.resnet import he_init

CONSTANTS = {  # (class, parameter): the initial value, for modules of timm and torchvision without reset_parameters()
    ("CNBlock", "layer_scale"): 1e-6,
    ("ConvNeXtBlock", "gamma"): 1e-6,
    ("GlobalResponseNorm", "weight"): 0.0,
    ("GlobalResponseNorm", "bias"): 0.0,
}
SHOWN = 5  # names per error message


def reinit(module: nn.Module) -> nn.Module:
    """A deep copy of `module` with new random weights, all trainable, in train mode, on the same device.

    Batch normalisation starts with weight 1, bias 0 and empty running statistics. Other buffers are copied. The random
    numbers come from torch's global generator. Raises UserError for parameters that no `reset_parameters()` sets.
    """
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.fill_(torch.nan)  # to find the parameters that no reset sets
        for inner in reversed(list(twin.modules())):  # inner modules first: an outer one may set them differently
            if callable(reset := getattr(inner, "reset_parameters", None)):
                reset()
            for name, parameter in inner.named_parameters(recurse=False):
                if (constant := CONSTANTS.get((type(inner).__name__, name))) is not None:
                    parameter.fill_(constant)
        he_init(twin)
    if left := [name for name, parameter in twin.named_parameters() if parameter.isnan().any()]:
        more = [f"+{len(left) - SHOWN} more"] if len(left) > SHOWN else []
        raise UserError(
            f"{type(twin).__name__} cannot get new random weights: no reset_parameters() sets "
            f"{', '.join(left[:SHOWN] + more)}; add such a method to the module that owns them"
        )
    return twin.requires_grad_(True).train()
