"""One run at a time in a folder: a lock that the system takes back when the process ends, however it ends."""

import fcntl
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..errors import UserError

NAME = ".lock"
_held: dict[Path, int] = {}  # by folder: the open file of its lock; closing it gives the lock back


def hold(folder: Path, log: Callable[[str], None] = print) -> bool:
    """Lock `folder` for this process; gives whether that is new. The lock lasts until `release`, or the process's end.

    Raises UserError, which names the process, if another one holds it. Where the file system knows no locks, `log` says
    so. Worker processes do not inherit the lock.
    """
    folder = folder.resolve()
    if folder in _held:
        return False
    try:
        file = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"cannot use --out {folder}: {NAME} in it: {error.strerror}; choose another folder") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        holder = os.read(file, 200).decode(errors="replace").strip() or "another process"
        os.close(file)
        raise UserError(
            f"--out {folder} is in use by {holder}; wait for it or end it, or choose another --out"
        ) from None
    except OSError as error:
        log(f"WARNING: the file system of {folder} has no locks ({error.strerror}): start no second run in it")
    with suppress(OSError):  # a full disk: the lock holds, its file just does not say whose it is
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    _held[folder] = file
    return True


def check(folder: Path) -> None:
    """Raise UserError if a folder that this process has locked is gone, or if another folder has its name now.

    By the attributes of the lock's file: to open and close it would give the lock back.
    """
    if (file := _held.get(folder.resolve())) is None:
        return
    try:
        there, ours = os.stat(folder / NAME, follow_symlinks=False), os.fstat(file)
        is_ours = there.st_ino == ours.st_ino or there.st_mtime_ns == ours.st_mtime_ns  # some systems change numbers
    except OSError:
        is_ours = (folder / "config.yaml").exists()  # only the lock's file was removed
    if not is_ours:
        raise UserError(
            f"the run folder {folder} is gone: it was deleted or renamed while the run used it; what was saved is in "
            "it under its new name, if it has one: go on there with --out NEW_NAME --resume"
        )


def release(folder: Path) -> None:
    """Let other processes have the folder."""
    if (file := _held.pop(folder.resolve(), None)) is not None:
        os.close(file)
