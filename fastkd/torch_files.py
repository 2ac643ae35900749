"""Torch's checkpoint files, checked before anything in them is believed.

`torch.load(weights_only=True)` runs no code of a file, but it believes what the file says of sizes. A record of 4 MB
may unpack to 4 GB. A pickle may ask for an array of any length, for a tensor over the memory of others, or for a key
whose hash takes for ever. So the pickle is gone through first, with stand-ins in the place of all objects. That takes
about as long as torch's own reading of the pickle, milliseconds.
"""

import io
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .files import broken_seal, has_seal
from .foreign import open_file

PICKLE = 8 << 20  # bytes of the pickle of a checkpoint, without its tensors; one of 10,000 tensors has 1.5 MB
UNPACKED = 4  # times the size of the file: what its records may unpack to. torch does not compress them.
READS = 1_500_000  # steps of a pickle, which take 3 s with those of torch; 60 for a tensor
OWN = 8  # times the bytes and the steps that a state of a run may have: it holds statistics of each process
RECORDS, KINDS = 200_000, 1000  # records of a file, and kinds of objects in its pickle
ITEM_BYTES = {
    **dict.fromkeys(("Byte", "Char", "Bool", "QUInt8", "QInt8", "QUInt4x2", "QUInt2x4", "Untyped"), 1),
    **dict.fromkeys(("Short", "Half", "BFloat16"), 2),
    **dict.fromkeys(("Int", "Float", "QInt32"), 4),
    **dict.fromkeys(("Long", "Double", "ComplexFloat"), 8),
    "ComplexDouble": 16,
}
"""By the first part of the storage's name, such as FloatStorage."""


REFUSED = ("_rebuild_nested_tensor", "_rebuild_wrapper_subclass")  # views and tensors without any check of their memory


class Damaged(Exception):
    """The file is not what torch.save writes. The message says why."""


def load_torch(path: Path, mmap: bool = False) -> Any:
    """What a checkpoint holds, on the CPU; no code in it is run.

    Raises Damaged, or whatever torch raises; OSError if it is no regular file. A file that has a checksum, such as
    fastkd's own checkpoints, must fit it. mmap: tensors are read from the file when they are used.
    """
    with io.BufferedReader(open_file(path)) as file:
        if has_seal(file) and (problem := broken_seal(file)):
            raise Damaged(problem)
        check_torch_file(file)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def load_sealed(path: Path) -> Any:
    """What a checkpoint of fastkd holds, on the CPU. Raises as `load_torch`, also if it has no checksum."""
    with io.BufferedReader(open_file(path)) as file:
        if problem := broken_seal(file):
            raise Damaged(problem)
        check_torch_file(file, OWN)
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


def check_torch_file(file: BinaryIO, times: int = 1) -> None:
    """Raise Damaged if the file declares more than it holds. Its pickle may have `times` the usual bytes and steps."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(2) == b"PK":
        _check_zip(file, size, times)
    else:
        file.seek(0)
        _check_old_format(file, size)


def _check_zip(file: BinaryIO, size: int, times: int) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            _check_members(members, size)
            for member in members:
                if member.filename.rpartition("/")[2] == "data.pkl":
                    if member.file_size > PICKLE * times:
                        raise Damaged(f"its pickle has {member.file_size:,} bytes, and {PICKLE * times:,} are allowed")
                    folder = f"{member.filename.rpartition('/')[0]}/data/"
                    lengths = {each.filename.removeprefix(folder): each.file_size for each in members}
                    _go_through(_Bounded(io.BytesIO(archive.read(member)), times), lengths.get)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, OverflowError) as error:
        raise Damaged(f"no zip file of torch: {error}") from None


def _check_members(members: list[zipfile.ZipInfo], size: int) -> None:
    unpacked = sum(member.file_size for member in members)
    if len(members) > RECORDS:
        raise Damaged(f"it has {len(members):,} records, and {RECORDS:,} are allowed")
    if unpacked > UNPACKED * size:
        raise Damaged(f"its {size:,} bytes claim to unpack to {unpacked:,}, and torch.save does not compress")
    if len({member.filename.lower() for member in members}) < len(members):
        raise Damaged("two of its records have one name")


def _check_old_format(file: BinaryIO, size: int) -> None:
    """The format before torch 1.6: a magic number, the version, the system, the content, the keys of the storages."""
    stream = _Bounded(file)
    for _ in range(5):
        _go_through(stream, lambda key, none: size)


def _go_through(stream: Any, bytes_of: Any) -> None:
    """Raise Damaged if a pickle asks for what it does not hold. bytes_of(key, 0): the length of a storage."""
    try:
        _Dry(stream, bytes_of).load()
    except Damaged:
        raise
    except Exception as error:  # of a damaged pickle: IndexError, KeyError, struct.error, UnpicklingError ...
        raise Damaged(f"its pickle is damaged ({type(error).__name__}: {error})"[:200]) from None


class _Bounded:
    """A file of which no more than PICKLE bytes are read, in no more than READS parts; `times` as much of both."""

    def __init__(self, file: BinaryIO, times: int = 1):
        self.file, self.left, self.reads = file, PICKLE * times, 0
        self.allowed, self.most = PICKLE * times, READS * times

    def read(self, count: int) -> bytes:
        if not 0 <= count <= self.left:
            raise Damaged(f"its pickle has more than the {self.allowed:,} bytes that are allowed")
        return self._counted(self.file.read(count))

    def readline(self) -> bytes:
        return self._counted(self.file.readline(self.left))

    def _counted(self, data: bytes) -> bytes:
        self.left -= len(data)
        self.reads += 1
        if self.reads > self.most:
            raise Damaged(f"its pickle has more than the {self.most:,} steps that are allowed")
        return data


class _StandIn:
    """An object of the file: it keeps nothing and runs nothing. Subclasses are named like what they stand for."""

    path = ""

    def __new__(cls, *arguments: Any, **named: Any) -> "_StandIn":
        _check_call(cls.path, arguments)
        return object.__new__(cls)

    def __init__(self, *arguments: Any, **named: Any):
        pass

    def __call__(self, *arguments: Any, **named: Any) -> "_StandIn":
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    extend = add = append


def _check_call(path: str, arguments: tuple) -> None:
    """Raise Damaged for a call that needs memory or time out of proportion to the file, or memory that is not its."""
    kind = path.rpartition(".")[2]
    if kind in REFUSED:
        raise Damaged(f"its pickle calls {path}, which no weights file needs")
    if kind == "encode" and arguments[1:] not in (("latin1",), ("utf-8",)):  # punycode takes the square of the length
        raise Damaged(f"its pickle holds a text in the encoding {arguments[1:]!r:.60}")
    if kind in ("set", "frozenset", "Counter"):
        check_keys([key for each in arguments if isinstance(each, (list, tuple)) for key in each])
    if kind in ("OrderedDict", "dict"):
        pairs = [pair for each in arguments if isinstance(each, (list, tuple)) for pair in each]
        check_keys([pair[0] for pair in pairs if isinstance(pair, (list, tuple)) and pair])
    lengths = [each for each in arguments if isinstance(each, int) and not isinstance(each, bool)]
    if lengths and (kind in ("bytearray", "bytes") or kind.endswith(("Tensor", "Storage"))):
        raise Damaged(f"its pickle asks for a {path} of {lengths[0]:,} items that are not in the file")
    if kind == "dtype" and not (arguments and re.fullmatch(r"[<>=|]?[?A-Za-z]\d{0,2}", str(arguments[0]))):
        raise Damaged(f"its pickle holds the numpy dtype {arguments[:1]!r:.60}")
    if kind == "scalar" and len(arguments) != 2:
        raise Damaged("its pickle holds a number without a value")


def check_keys(keys: list[Any]) -> None:
    """Raise Damaged for tuples of tuples: a tuple that holds itself twice at 40 levels takes years to hash."""
    for key in keys:
        if isinstance(key, (tuple, frozenset)) and any(isinstance(part, (tuple, frozenset)) for part in key):
            raise Damaged("its pickle has tuples of tuples as keys")


_InPython: Any = pickle._Unpickler  # the one in C takes 64 GB for a memo of one entry


class _Dry(_InPython):
    """Goes through a pickle with stand-ins. Its own methods refuse keys that are costly to hash."""

    dispatch = dict(_InPython.dispatch)

    def __init__(self, stream: Any, bytes_of: Any):
        super().__init__(stream, encoding="utf-8")
        self.bytes_of, self.kinds = bytes_of, dict[str, type[_StandIn]]()

    def find_class(self, module: str, name: str) -> type[_StandIn]:
        path = f"{module}.{name}"
        if path not in self.kinds:
            if len(self.kinds) >= KINDS:
                raise Damaged(f"its pickle names more than {KINDS} kinds of objects")
            self.kinds[path] = type("_Named", (_StandIn,), {"path": path})
        return self.kinds[path]

    def persistent_load(self, place: Any) -> _StandIn:
        """A storage: ("storage", its type, its key, its device, its length in items, ...)."""
        kinds = tuple(map(type, place)) if isinstance(place, tuple) else ()
        if len(kinds) < 5 or place[0] != "storage" or kinds[2] is not str or kinds[4] is not int:
            raise Damaged("its pickle refers to something else than a storage")
        name = str(getattr(place[1], "path", "")).rpartition(".")[2].removesuffix("Storage")
        claimed, there = place[4] * ITEM_BYTES.get(name, 16), self.bytes_of(place[2], 0)
        if not 0 <= claimed <= there:
            raise Damaged(f"a tensor claims {claimed:,} bytes of its record {str(place[2]):.40}, which has {there:,}")
        return _StandIn()

    def load_setitem(self) -> None:
        check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        check_keys(self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        check_keys(self.stack[::2])
        super().load_dict()

    def load_additems(self) -> None:
        check_keys(self.stack)
        super().load_additems()

    def load_frozenset(self) -> None:
        check_keys(self.stack)
        super().load_frozenset()

    for _code, _load in (
        (pickle.SETITEM, load_setitem),
        (pickle.SETITEMS, load_setitems),
        (pickle.DICT, load_dict),
        (pickle.ADDITEMS, load_additems),
        (pickle.FROZENSET, load_frozenset),
    ):
        dispatch[_code[0]] = _load
    for _code in (pickle.BYTEARRAY8, pickle.FRAME, pickle.EXT1, pickle.EXT2, pickle.EXT4):  # torch knows none of them
        del dispatch[_code[0]]
