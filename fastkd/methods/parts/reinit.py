"""A network's architecture with a new random start: bridges (SOKD) and auxiliary heads (DCM) begin from it.

Ours: convolutions start as in our own nets (`he_init`), all other layers as torch has it, whatever the network at hand
began from; ConvNeXt's layer scale starts from the 1e-6 of its paper (arXiv:2201.03545), its V2's response norm from 0.
"""

import copy

import torch
from torch import nn

from ...errors import UserError
from ...models.nets.init import he_init

CONSTANTS = {  # (class, parameter): the start of parameters whose module in timm or torchvision has no reset
    ("CNBlock", "layer_scale"): 1e-6,
    ("ConvNeXtBlock", "gamma"): 1e-6,
    ("GlobalResponseNorm", "weight"): 0.0,
    ("GlobalResponseNorm", "bias"): 0.0,
}
SHOWN = 5  # names per complaint


def reinit(module: nn.Module) -> nn.Module:
    """A deep copy of `module` with a new random start, all of it trainable, in train mode, on the same device.

    Batch normalisation starts from weight 1, bias 0 and empty running statistics. UserError that names the parameters
    which no `reset_parameters()` reaches: they would keep what the module has learned. Buffers of other kinds are
    copied as they are. The random numbers are those of torch's global generator.
    """
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.fill_(torch.nan)  # what is still NaN after the resets was reached by none
        for part in reversed(list(twin.modules())):  # inner modules first: an outer one may set them its own way
            _reset(part)
        he_init(twin)
    _check_reached(twin)
    return twin.requires_grad_(True).train()


def _reset(part: nn.Module) -> None:
    if callable(reset := getattr(part, "reset_parameters", None)):
        reset()
    for name, parameter in part.named_parameters(recurse=False):
        constant = CONSTANTS.get((type(part).__name__, name))
        if constant is not None:
            nn.init.constant_(parameter, constant)


def _check_reached(twin: nn.Module) -> None:
    left = [name for name, parameter in twin.named_parameters() if parameter.isnan().any()]
    if left:
        more = [f"+{len(left) - SHOWN} more"] if len(left) > SHOWN else []
        raise UserError(
            f"a fresh {type(twin).__name__} is not possible, no reset_parameters() reaches "
            f"{', '.join(left[:SHOWN] + more)}: give the module that owns them such a method"
        )
