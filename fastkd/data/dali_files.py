"""What DALI cannot do with files by itself: take any name, tell a damaged file, decode every format.

DALI decodes some damaged files without an error: a BMP without its end, a JPEG with a piece of another one. A header
with a huge size fills the memory: 65,535 x 65,535 pixels took 12 GB. So `FirstPass` checks each file once, in threads,
shortly before DALI decodes it for the first time.
"""

import os
import tempfile
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Executor, Future

from ..errors import UserError
from .decode import inspect
from .scan import Split

KINDS = ("jpeg", "png", "webp", "bmp")  # that DALI decodes to the pixels of Pillow; TIFF: not turned, damage not seen
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB")  # the same in Pillow's words
REMEDY = "convert or remove it, or start a new run with loader='folder', which decodes it"
AHEAD = 4  # batches; DALI decodes up to 3 while the first is waited for


def undecodable(splits: tuple[Split, ...]) -> str:
    """Why DALI cannot read these files, with their number and one name; "" if it can."""
    others: dict[str, int] = {}
    example = ""
    for split in splits:
        for kind, (count, file) in split.formats.items():
            if kind not in KINDS:
                others[kind] = others.get(kind, 0) + count
                example = example or file
    counts = " and ".join(f"{count} {kind.upper()}" for kind, count in others.items())
    return f"DALI cannot decode {counts} files, such as {example!r}" if others else ""


class DaliNames:
    """A name in UTF-8 for each file, for DALI takes no other. A file with another name gets a symbolic link."""

    def __init__(self, files: list[str]):
        self.files = files
        odd = [i for i, file in enumerate(files) if not _is_utf8(file)]
        self.names, self._real = list(files) if odd else files, {}
        if not odd:
            return
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="fastkd-names-")  # removed with this object
            for i in odd:
                self.names[i] = os.path.join(self._folder.name, str(i))
                self._real[self.names[i]] = files[i]
                os.symlink(os.path.abspath(files[i]), self.names[i])
        except OSError as error:
            raise UserError(
                f"{files[odd[0]]!r} is no name in UTF-8, and no link to it can be made in {tempfile.gettempdir()} "
                f"({error.strerror}): set TMPDIR to a writable folder, or rename the file, or take loader='folder'"
            ) from None

    def real(self, name: str) -> str:
        return self._real.get(name, name)


def _is_utf8(name: str) -> bool:
    """False for the names that Python holds with surrogates."""
    if name.isascii():
        return True
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


class FirstPass:
    """Checks the files of a process in the order in which DALI reads them, `AHEAD` batches before it does."""

    def __init__(self, batches: Iterable[list[str]], side: int | None, rank: int, threads: Executor):
        self.side, self.rank, self.threads = side, rank, threads
        self._batches = iter(batches)
        self._submitted: list[list[str]] = []
        self._waiting: deque[Future[str]] = deque()
        self._runs = self._checked = 0

    def before_run(self) -> None:
        """Wait until every file is checked that DALI may read in its next run. Raises UserError for a bad one."""
        self._runs += 1
        self._submit()
        while self._waiting and self._checked < self._runs + AHEAD - 1:
            problem = self._waiting.popleft().result()
            if problem:
                raise UserError(problem)
            self._checked += 1
            self._submit()

    def batch(self) -> list[str]:
        """The files of DALI's last run; none if the files themselves could not be read."""
        return self._submitted[self._runs - 1] if self._runs <= len(self._submitted) else []

    def _submit(self) -> None:
        while len(self._waiting) < 2 * AHEAD and (batch := next(self._batches, None)) is not None:
            self._waiting.append(self.threads.submit(self._check, batch, len(self._submitted)))
            self._submitted.append(batch)

    def _check(self, batch: list[str], run: int) -> str:
        """What is wrong with the first bad file, or ""."""
        where = f"epoch 0, batch {run}, rank {self.rank}"
        for file in batch:
            kind, reason = inspect(file, self.side)
            if reason:
                return f"{file!r} cannot be decoded ({reason}; {where}): repair or remove it"
            if kind not in FORMATS:
                return f"{file!r} is a {kind}, which DALI cannot decode ({where}): {REMEDY}"
        return ""
