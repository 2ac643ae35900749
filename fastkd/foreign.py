"""Small files that anybody may have written: configurations and notes, as YAML and JSON.

Reading one takes neither long nor much memory, whatever it holds: no pipe is waited for, the length and the depth are
bounded, and an alias stands for one word, since aliases of lists multiply ("billion laughs").
"""

import errno
import io
import json
import os
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import yaml

LONGEST = 1 << 16  # bytes of a configuration; PyYAML reads 100 kB/s
DEEPEST = 4  # lists and mappings within one another; our files have 2
LARGEST = 1 << 64  # of whole numbers; Python refuses to print those of more than 4,300 digits
TAGS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map"))


def open_file(path: str | os.PathLike[str]) -> io.FileIO:
    """Open a file for reading, without a buffer. Raises OSError if it is a folder, a pipe, a socket or a device."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # else it would wait for a pipe's writer
    kind = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(kind):
        os.close(descriptor)
        code = errno.EISDIR if stat.S_ISDIR(kind) else errno.EINVAL
        reason = os.strerror(code) if stat.S_ISDIR(kind) else "it is a pipe, a socket or a device, not a file"
        raise OSError(code, reason, os.fspath(path))
    return io.FileIO(descriptor)


def read_text(path: str | os.PathLike[str], longest: int = LONGEST) -> str:
    """The text of a file. Raises OSError as `read_bytes`, and ValueError if it is not UTF-8."""
    return read_bytes(path, longest).decode()


def read_bytes(path: str | os.PathLike[str], longest: int) -> bytes:
    """The content of a file. Raises OSError, also if it is no regular file or has more than `longest` bytes."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > longest:  # a file with holes may claim any length
            reason = f"it has {size:,} bytes, and such a file has {longest:,} at most"
            raise OSError(errno.EFBIG, reason, os.fspath(path))
        return file.read()


def check_stored(file: BinaryIO | io.FileIO) -> None:
    """Raise ValueError if a zip file, such as a .npz of ours, has compressed members: they unpack to any length."""
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        wrong = [each.filename for each in archive.infolist() if each.compress_type != zipfile.ZIP_STORED]
    if wrong:
        raise ValueError(f"its member {wrong[0]:.60} is compressed, and we write none such")
    file.seek(0)


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; {} of an empty file.

    Raises ValueError with the reason if the file cannot be read or holds something else.
    """
    try:
        values, _ = parse_yaml(read_text(path))
    except OSError as error:
        raise ValueError(error.strerror) from None
    if not isinstance(values or {}, dict):
        raise ValueError(f"it holds a {type(values).__name__} in the place of options")
    return {str(name): value for name, value in (values or {}).items()}


def parse_yaml(text: str) -> tuple[Any, yaml.Node | None]:
    """(the values, the node that they were made from). Raises ValueError, in one line, for YAML that we do not read.

    Options of older versions have today's names in the values.
    """
    try:
        for problem in _problems(text):
            raise ValueError(problem)
        values, node = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    for value in _numbers(values):
        if abs(value) >= LARGEST:
            raise ValueError("it holds a whole number of more than 64 bits")
    return _renamed(values), node


def _renamed(values: Any) -> Any:
    """`tensorboard: true` is `log: [tensorboard]` now."""
    if isinstance(values, dict) and "log" not in values and isinstance(values.get("tensorboard"), bool):
        values["log"] = ["tensorboard"] if values.pop("tensorboard") else []
    return values


def _problems(text: str) -> Iterator[str]:
    """What safe_load would take and we do not, found without building anything."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            yield f"it has more than {DEEPEST} lists or mappings within one another"
        if isinstance(event, yaml.CollectionStartEvent) and event.anchor:
            yield f"the anchor &{event.anchor:.40} is at a list or a mapping; anchors may be at single words alone"
        if isinstance(event, yaml.ScalarEvent) and event.value == "<<":
            yield "merge keys (<<) are not read; write the options out"
        tag = getattr(event, "tag", None)
        if tag is not None and tag not in TAGS:
            yield f"the tag {tag!r:.80} is not read; write the plain value"


def _numbers(values: Any) -> Iterator[int]:
    """All whole numbers in values of a bounded depth."""
    if isinstance(values, int):
        yield values
    elif isinstance(values, (list, dict)):
        for each in values if isinstance(values, list) else [*values, *values.values()]:
            yield from _numbers(each)


def parse_json(text: str | bytes) -> Any:
    """What JSON stands for. Raises ValueError for anything else, however deep it is."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its lists are too deep") from None
