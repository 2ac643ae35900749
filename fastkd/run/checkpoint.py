"""The states of a training on the disk: written by a thread, whole or not at all, with a checksum; read without code.

last.pt            the newest state
last-1.pt ...      the states before it, `keep` in all with last.pt
best.pt            the state after the epoch with the best accuracy
"""

import copy
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import UserError
from ..files import Sealer, cannot_write, second_name, sync_folder, write_new
from ..torch_files import Damaged, load_sealed
from . import lock

FORMAT = 2
State = dict[str, Any]
"""Tensors, numbers, strings and containers of them."""


@dataclass(frozen=True)
class Result:
    """What a run leaves: one row of figures per epoch, and the folder of its files."""

    history: list[dict[str, Any]]
    out: Path

    @property
    def top1(self) -> float:
        """Accuracy of the saved student after the last epoch, in per cent."""
        return self.history[-1]["top1"]

    @property
    def student(self) -> Path:
        """The student's weights, a safetensors file."""
        return self.out / "student.safetensors"


class Writer:
    """Writes states in a thread of its own. `save` copies the state, on its device, and returns.

    One state is written at a time: `save` waits for the one before. Without memory for the copy, `save` returns when
    the file is complete. What the thread could not write is raised by the next `save`, or at the end of the block.
    `seconds` is what all of this has cost the training so far.
    """

    def __init__(self, folder: Path, keep: int = 2, log: Callable[[str], None] = print):
        self.folder, self.keep, self.log, self.seconds, self.count = folder, keep, log, 0.0, 0
        self.is_full = False  # no memory for a copy
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def save(self, state: State) -> None:
        start = time.perf_counter()
        self.wait()
        snapshot = None if self.is_full else self._copy(state)
        if snapshot is None:
            self._write(state, None)
        else:
            ready = torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None
            self._pending = self._thread.submit(self._write, snapshot, ready)
        self.seconds += time.perf_counter() - start
        self.count += 1

    def _copy(self, state: State) -> State | None:
        """A copy on the same device, or None, now and later, if there is no memory for it."""
        try:
            return copy.deepcopy(state)  # tensors that share memory go on sharing it
        except (MemoryError, RuntimeError) as error:  # torch's error for a full memory of the host has no class
            if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
                raise
        self.is_full = True
        self.log("WARNING: there is no memory for a copy of the state: from here on the steps wait for the disk")
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # of the part that was copied
        return None

    def wait(self) -> None:
        """Wait until all is on the disk. Raises what went wrong there."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error: object) -> None:
        """Wait for the file, and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(self, state: State, ready: torch.cuda.Event | None) -> None:
        stream: AbstractContextManager = nullcontext()
        if ready:
            ready.synchronize()
            own = torch.cuda.Stream(ready.device)  # copies to the host do not queue behind the steps
            stream = torch.cuda.stream(own)
        lock.check(self.folder)
        start = time.perf_counter()
        try:
            with stream:
                save_run(self.folder, state, self.keep)
            epoch, step, seconds = state.get("epoch", 0), state.get("step", 0), time.perf_counter() - start
            place = f"step {step} of epoch {epoch + 1}" if step else f"epoch {epoch}"
            logging.getLogger("fastkd").debug(f"saved {self.folder / 'last.pt'} after {place}: {seconds:.2f} s")
        except UserError:
            raise
        except Exception as error:  # of torch or the system, such as no memory
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(
                f"cannot write {self.folder / 'last.pt'}: {reason}; what was saved before is untouched; go on with "
                "--resume"
            ) from error


def save_run(folder: Path, state: State, keep: int = 2) -> None:
    """Write last.pt; keep the states before it as last-1.pt and so on, `keep` files in all.

    After an epoch, when the last row of `state["history"]` has the best top1, it is best.pt too. Whatever moment the
    process is killed at, last.pt and best.pt are whole files.
    """
    new = folder / ".new.pt"
    accuracies = [row["top1"] for row in state["history"]]
    try:
        write_new(new, partial(_write_archive, state))
        if accuracies and state["step"] == 0 and accuracies[-1] >= max(accuracies):
            second_name(new, folder / "best.pt")
        _shift(folder, keep)
        new.replace(folder / "last.pt")
        sync_folder(folder)
    except OSError as error:
        raise cannot_write(folder / "last.pt", error) from None
    finally:
        with suppress(OSError):  # it is there only after an error, such as of a disk that is read-only now
            new.unlink(missing_ok=True)


def _write_archive(state: State, file: BinaryIO) -> None:
    sealer = Sealer(file)
    torch.save({"format": FORMAT, **state}, sealer)  # type: ignore[arg-type]
    sealer.finish()


def _shift(folder: Path, keep: int) -> None:
    """Give each state the name of an older one; last.pt keeps its name as well, until another takes it."""
    for path in generations(folder):
        if number_of(path) >= max(1, keep - 1):
            path.unlink()
    for path in reversed(generations(folder)):
        if number_of(path):
            path.replace(folder / f"last-{number_of(path) + 1}.pt")
        elif keep > 1:
            second_name(path, folder / "last-1.pt")


def generations(folder: Path) -> list[Path]:
    """The states in a run folder, the newest first."""
    named = [path for path in folder.glob("last*.pt") if number_of(path) >= 0]
    return sorted(named, key=number_of)


def candidates(folder: Path) -> list[Path]:
    """The states that a run may go on from: the newest first, best.pt last."""
    best = folder / "best.pt"
    return [*generations(folder), *([best] if os.path.lexists(best) else [])]


def number_of(path: Path) -> int:
    """0 of last.pt, 1 of last-1.pt, ...; -1 of other names."""
    number = path.stem.removeprefix("last-")
    return 0 if path.name == "last.pt" else int(number) if number.isdecimal() and number.isascii() else -1


def place_of_newest(folder: Path) -> tuple[int, int]:
    """(complete epochs, steps after them) of the newest state that can be read; zeros if there is none."""
    for path in candidates(folder):
        with suppress(UserError):
            state = load(path)
            epoch, step = state.get("epoch"), state.get("step")
            if isinstance(epoch, int) and isinstance(step, int):
                return epoch, step
    return 0, 0


def load(path: Path) -> State:
    """The state that `save_run` wrote, on the CPU. Raises UserError if the file is damaged or none of this format."""
    try:
        state = load_sealed(path)
    except Damaged as error:
        raise UserError(f"{path} is not a readable checkpoint: {error}") from None
    except OSError as error:
        raise UserError(f"{path} is not a readable checkpoint: {error.strerror}") from None
    except Exception as error:  # torch raises many kinds for a file that is no checkpoint
        raise UserError(f"{path} is not a readable checkpoint: {str(error).splitlines()[0]:.200}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is not a fastkd checkpoint of format {FORMAT}; start again in another --out")
    return state
