"""A command in a process of its own, without the seconds that its imports take: a fork of the tests' process."""

import ctypes
import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

NEW_USER, NEW_MOUNTS = 0x10000000, 0x00020000  # linux/sched.h
PRIVATE = 1 << 18 | 1 << 14  # linux/mount.h, of a mount and of all below it
libc = ctypes.CDLL(None, use_errno=True)


class Done(NamedTuple):
    """How a process ended."""

    status: int
    out: str
    err: str


def fork() -> int:
    """os.fork. The child frees nothing that was there before: a DALI pipeline would wait for threads it has not."""
    if not (child := os.fork()):
        gc.freeze()
    return child


def forked(folder: Path, work: Callable[[], object], seconds: float = 100) -> Done:
    """Run `work` as a command of fastkd does: what it raises is told on stderr, and gives the exit status."""
    files = [folder / f"{name}.txt" for name in ("out", "err")]
    if not (child := fork()):
        _be_command(files, work)
    until, done = time.monotonic() + seconds, (0, 0)
    while not done[0] and time.monotonic() < until:
        time.sleep(0.02)
        done = os.waitpid(child, os.WNOHANG)
    if not done[0]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail(f"not done after {seconds} s: {files[1].read_text()}")
    return Done(os.waitstatus_to_exitcode(done[1]), *(file.read_text() for file in files))


def _be_command(files: list[Path], work: Callable[[], object]) -> None:
    """In the child: its streams are files, and it never comes back to the tests."""
    status: object = 99
    try:
        for number, file in enumerate(files, 1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        from fastkd import cli
        from fastkd.commands import methods

        methods.run = lambda arguments: work()
        sys.argv = ["fastkd", "methods"]
        cli.main()
        status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    finally:
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 98)


def can_mount() -> bool:
    """True if a process here may mount a file system of its own."""
    if not (child := fork()):
        try:
            mounted(Path("/tmp"), 1 << 20)
            Path("/tmp/file").write_text("written")
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def mounted(folder: Path, size: int) -> None:
    """For a forked process: an empty disk of so many bytes at `folder`, which nobody else sees."""
    _check(libc.unshare(NEW_MOUNTS | (NEW_USER if os.getuid() else 0)))
    _check(libc.mount(b"none", b"/", None, ctypes.c_ulong(PRIVATE), None))
    _check(libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", ctypes.c_ulong(0), f"size={size}".encode()))


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
