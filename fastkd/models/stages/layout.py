"""Outputs of stages as feature maps [N, C, H, W]: transformers give tokens [N, L, C], some networks NHWC."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ...errors import UserError
from ..own_input import plain_network

# networks whose stages give [N, H, W, C], by the name of the class; timm's say so themselves, in `output_fmt`
CHANNELS_LAST = {"torchvision.models.swin_transformer.SwinTransformer"}


class Layout(NamedTuple):
    """How the outputs of a network's stages are laid out."""

    channels_last: bool | None = None  # 4-d outputs are [N, H, W, C]; None: if their axes 1 and 2 alone are equal
    prefix: int = 0  # tokens before those of the image: class, distillation, registers

    def map(self, x: Tensor) -> Tensor:
        """The output of a stage as a map [N, C, H, W], a view of it. A map of tokens is square.

        Raises UserError for other outputs.
        """
        shape = x.shape if isinstance(x, Tensor) else ()
        if len(shape) == 4:
            return x.permute(0, 3, 1, 2) if self._is_channels_last(x) else x
        prefix = self._prefix_of(shape[1]) if len(shape) == 3 else None
        if prefix is None:
            given = list(shape) or f"a {type(x).__name__}"
            raise UserError(
                f"a stage gives {given}: maps need [N, C, H, W], [N, H, W, C] or the tokens [N, L, C] of a square "
                "image; name other stages (--student-stages, --teacher-stages)"
            )
        side = math.isqrt(x.shape[1] - prefix)
        return x[:, prefix:].transpose(1, 2).unflatten(2, (side, side))

    def _is_channels_last(self, x: Tensor) -> bool:
        if self.channels_last is None:
            return x.shape[1] == x.shape[2] != x.shape[3]
        return self.channels_last

    def _prefix_of(self, tokens: int) -> int | None:
        """The number of tokens to drop. Some networks add theirs late (CaiT), others do not say how many they have."""
        for prefix in (self.prefix, 0, 1, 2):
            rest = tokens - prefix
            if rest > 0 and math.isqrt(rest) ** 2 == rest:
                return prefix
        return None

    def maps(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs of stages as maps [N, C, H, W]."""
        return [self.map(x) for x in outputs]


CONVOLUTIONAL = Layout(channels_last=False)


def layout_of(model: nn.Module) -> Layout:
    """The layout of the outputs of the stages of `model`."""
    model = plain_network(model)
    stated = getattr(model, "output_fmt", None)  # a string or an enum, in timm
    channels_last = str(getattr(stated, "value", stated)) == "NHWC" if stated else None
    if any(f"{cls.__module__}.{cls.__name__}" in CHANNELS_LAST for cls in type(model).__mro__):
        channels_last = True
    registers = getattr(getattr(model, "config", None), "num_register_tokens", 0)  # transformers; beside a class token
    return Layout(channels_last, int(getattr(model, "num_prefix_tokens", registers + 1 if registers else 0)))
