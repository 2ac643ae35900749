"""What is kept of the teacher's logits of an image: all of them, or the k largest with the logit of all others."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, check_number
from ..kernels import topk_of

Precision = Literal["fp16", "fp32"]
TYPES: dict[str, tuple[str, torch.dtype]] = {"fp16": ("<f2", torch.float16), "fp32": ("<f4", torch.float32)}


@dataclass(frozen=True)
class Rows:
    """`classes` logits per image, each rounded to `precision`: fp16 keeps 11 bits, a relative error of 0.0005 at most.

    `topk` k: the k largest, and one logit for all other classes together, which holds for one `temperature`; 0: all.
    Raises UserError unless k is below the number of classes.
    """

    classes: int
    precision: Precision = "fp16"
    topk: int = 0
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.topk < self.classes:
            raise UserError(
                f"--teacher-cache-topk {self.topk}: there are {self.classes} classes; give a number from 1 to "
                f"{self.classes - 1}, or 0 for all logits"
            )
        if self.topk:
            check_number("temperature", self.temperature, above_zero=True)

    @property
    def dtype(self) -> np.dtype:
        """Of a row in a file: a record of `values`, and of `classes` with top-k."""
        value, width = TYPES[self.precision][0], self.topk + 1 if self.topk else self.classes
        fields: list[Any] = [("values", value, (width,))]
        if self.topk:
            fields.append(("classes", "<u2" if self.classes <= 65536 else "<u4", (self.topk,)))
        return np.dtype(fields)

    def encode(self, logits: Tensor) -> tuple[Tensor, ...]:
        """Logits [N, C] -> (values,) or (values, classes), in the precision of the file and on the logits' device."""
        kept = topk_of(logits, self.topk, self.temperature) if self.topk else (logits,)
        return (kept[0].to(TYPES[self.precision][1]), *kept[1:])

    def taught(self, encoded: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What a step gets of it (`methods.forwards.Taught`): values in fp32, classes int64."""
        return (encoded[0].float(), *(each.long() for each in encoded[1:]))

    def pack(self, encoded: tuple[Tensor, ...]) -> np.ndarray:
        """Records [N] of what `encode` gave. Raises UserError if a value is not finite."""
        values, *classes = (each.cpu().numpy() for each in encoded)
        if not np.isfinite(values).all():
            hint = " beyond 65,504, the largest number of fp16" if self.precision == "fp16" else ""
            raise UserError(
                f"the teacher's logits are NaN, infinite or{hint or ' too large'}; try --teacher-cache-precision fp32"
            )
        rows = np.empty(len(values), self.dtype)
        rows["values"] = values
        if self.topk:
            rows["classes"] = classes[0]
        return rows

    def unpack(self, rows: np.ndarray) -> tuple[Tensor, ...]:
        """Records [N] -> what `taught` gives, on the CPU."""
        values = torch.from_numpy(rows["values"].astype(np.float32))
        return (values, torch.from_numpy(rows["classes"].astype(np.int64))) if self.topk else (values,)

    def example(self, count: int) -> tuple[Tensor, ...]:
        """What a step might get for `count` images, to try a step with."""
        logits = torch.randn(count, self.classes, generator=torch.Generator().manual_seed(0))
        return self.taught(self.encode(logits))
