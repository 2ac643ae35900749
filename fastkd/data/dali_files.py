"""What DALI cannot do with files by itself: decode every format, and tell a damaged file.

DALI decodes some damaged files without an error: a BMP without its end, a JPEG with a piece of another one. A header
with a huge size fills the memory: 65,535 x 65,535 pixels took 12 GB. So `FirstPass` checks each file once, in threads,
shortly before DALI decodes it for the first time.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError, count_of
from .decode import MAX_PIXELS, inspect
from .scan import Split
from .walk import HOW

KINDS = ("jpeg", "png", "webp", "bmp")  # that DALI decodes to the pixels of Pillow; TIFF: not turned, damage not seen
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB")  # the same in Pillow's words
REMEDY = "convert or remove it, or start a new run with --loader folder, which decodes it"
AHEAD = 4  # batches that are checked while another is waited for


class Place(NamedTuple):
    """A batch: the numbers of its images, int64 [B]."""

    epoch: int
    step: int
    numbers: Tensor


def undecodable(splits: tuple[Split, ...]) -> str:
    """Why DALI cannot read these files, with their number and one name; "" if it can."""
    others: dict[str, int] = {}
    example = ""
    for split in splits:
        for kind, (count, file) in split.formats.items():
            if kind not in KINDS:
                others[kind] = others.get(kind, 0) + count
                example = example or file
    counts = " and ".join(count_of(count, f"{kind.upper()} file") for kind, count in others.items())
    return f"DALI cannot decode {counts}, such as {example!r}" if others else ""


class FirstPass:
    """Checks the files of the batches that go through it, each file once, `AHEAD` batches before they leave.

    A file counts as checked when its batch leaves, so that the files of an epoch that was left are checked again.
    side: the shorter side of the pictures after resizing, if they are resized as a whole.
    """

    def __init__(self, files: list[str], side: int | None, rank: int, threads: Executor, max_pixels: int = MAX_PIXELS):
        self.files, self.side, self.rank, self.threads, self.max_pixels = files, side, rank, threads, max_pixels
        self.checked = torch.zeros(len(files), dtype=torch.bool)

    def ahead(self, batches: Iterator[Place]) -> Iterator[Place]:
        """The same batches. `batches` has no end. Raises UserError before it gives one with a bad file."""
        waiting: deque[tuple[Place, Future[str] | None]] = deque()
        begun = torch.zeros_like(self.checked)  # files whose check was begun here
        for batch in batches:
            waiting.append((batch, self._submit(batch, begun)))
            if len(waiting) > AHEAD:
                sound, check = waiting.popleft()
                if check is not None and (problem := check.result()):
                    raise UserError(problem)
                self.checked[sound.numbers] = True
                yield sound

    def _submit(self, batch: Place, begun: Tensor) -> "Future[str] | None":
        fresh = batch.numbers[~(self.checked[batch.numbers] | begun[batch.numbers])]
        begun[fresh] = True
        where = f"epoch {batch.epoch}, batch {batch.step}, rank {self.rank}"
        return self.threads.submit(self._check, fresh.tolist(), where) if len(fresh) else None

    def _check(self, numbers: list[int], where: str) -> str:
        """What is wrong with the first bad file, or ""."""
        for file in (self.files[number] for number in numbers):
            kind, reason = inspect(file, self.side, max_pixels=self.max_pixels)
            if reason:
                return f"{file!r} cannot be decoded ({reason}; {where}): repair or remove it{HOW}"
            if kind not in FORMATS:
                return f"{file!r} is a {kind}, which DALI cannot decode ({where}): {REMEDY}"
        return ""
