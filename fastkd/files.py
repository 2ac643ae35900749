"""Files that are written whole or not at all, and their hashes."""

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from .errors import UserError

SEAL = b"fastkd blake2b "
SEALED_BYTES = len(SEAL) + 64


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a temporary file, flush it to the disk and rename it to `path`. Readers see the old file or the new one.

    A link at the temporary name is removed, not followed. Raises UserError if the file cannot be written; the old file
    is then untouched.
    """
    content = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write_new(temporary, content)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):  # it may be a folder, and a disk that is read-only now refuses even what is not there
            temporary.unlink(missing_ok=True)
        raise cannot_write(path, error, len(content)) from None


def cannot_write(path: Path, error: OSError, size: int = 0) -> UserError:
    """The error for a file, of so many bytes if that is known, that was to be replaced."""
    if not path.parent.is_dir():
        return UserError(
            f"cannot write {path}: its folder is gone, it was deleted or renamed; what was saved before is in the "
            "folder under its new name, if it has one"
        )
    named = f"{path} ({size:,} bytes)" if size else str(path)
    return UserError(
        f"cannot write {named}: {error.strerror}; what was there before is untouched; make room or permission and go "
        "on with --resume, or choose another --out"
    )


def write_new(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file that nobody else can have made, and flush it to the disk. What has its name is removed first.

    `content`: what it is to hold, or a function that writes it.
    """
    if path.is_symlink() or path.exists():
        path.unlink()
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            content(file)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk: without it a rename may be lost when the machine loses its power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems cannot
        pass
    finally:
        os.close(descriptor)


def second_name(path: Path, name: Path) -> None:
    """Let `name` be the file `path` as well: by a link, or by a copy where the file system has no links."""
    temporary = name.with_name(f".{name.name}.tmp")
    if temporary.is_symlink() or temporary.exists():
        temporary.unlink()
    try:
        os.link(path, temporary, follow_symlinks=False)
    except OSError:
        with path.open("rb") as file:
            _copy(file, temporary)
    os.replace(temporary, name)


def _copy(file: BinaryIO, path: Path) -> None:
    try:
        write_new(path, partial(shutil.copyfileobj, file))
    except OSError:
        path.unlink(missing_ok=True)  # half of it would keep a full disk full
        raise


class Sealer:
    """A file for torch.save. It gets the archive, and as the archive's comment the hash of its content.

    A comment is part of the zip format, so torch.load and unzip read the archive as before. The content is hashed as it
    goes by: 100 MB need no second copy in memory. `write` never fails, because torch's writer is in C++ and would end
    with an error of its own: `finish` raises the OSError.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.hash, self.last = file, hashlib.blake2b(digest_size=32), b""
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Keep the last two bytes back: those of a whole archive are the length of its comment."""
        if len(data) >= 2:
            self._pass(self.last)
            self._pass(data[:-2])
            self.last = bytes(data[-2:])
        else:
            joined = self.last + bytes(data)
            self._pass(joined[:-2])
            self.last = joined[-2:]
        return len(data)

    def flush(self) -> None:
        """torch.save calls it."""

    def finish(self) -> None:
        self._pass(SEALED_BYTES.to_bytes(2, "little"))
        if self.error:
            raise self.error
        self.file.write(SEAL + self.hash.hexdigest().encode())

    def _pass(self, data: bytes | memoryview) -> None:
        try:
            if not self.error:
                self.file.write(data)
                self.hash.update(data)
        except OSError as error:
            self.error = error


def has_seal(file: BinaryIO) -> bool:
    """True if the end of a file says that a `Sealer` wrote it, though the end may be damaged itself."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - SEALED_BYTES - 22))
    end = file.read(SEALED_BYTES + 22)
    has_place = end[:4] == b"PK\5\6" and end[20:22] == SEALED_BYTES.to_bytes(2, "little")  # of a zip file's last record
    return has_place or end[-SEALED_BYTES:].startswith(SEAL)


def broken_seal(file: BinaryIO) -> str:
    """Why the file is not what a `Sealer` wrote; empty if it is."""
    if not (size := file.seek(0, os.SEEK_END)):
        return "it is empty"
    if not has_seal(file):
        return "it is cut off, or it is not a checkpoint of this version of fastkd"
    digest, left = hashlib.blake2b(digest_size=32), size - SEALED_BYTES
    file.seek(0)
    while chunk := file.read(min(1 << 20, left)):
        digest.update(chunk)
        left -= len(chunk)
    if left or file.read() != SEAL + digest.hexdigest().encode():
        return "its checksum does not fit its content: it was damaged or changed"
    return ""


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal; of a folder, that of the weights files in it; else empty.

    Raises UserError if a file cannot be read.
    """
    if os.path.isfile(path):  # False for a name that is too long
        digest = hashlib.sha256()
        try:
            with open(path, "rb", buffering=0) as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        except OSError as error:
            raise UserError(f"the weights file {path} cannot be read: {error.strerror}") from None
        return digest.hexdigest()
    if not os.path.isdir(path):
        return ""
    files = sorted(file for kind in ("*.safetensors", "*.bin") for file in path.glob(kind))
    hashes = "".join(f"{file.name} {sha256_of(file)}\n" for file in files)
    return hashlib.sha256(hashes.encode()).hexdigest() if files else ""
