"""Reading a weights file: safetensors, a torch checkpoint, whose code is never run, or a folder of transformers.

The content says what a file is, not its ending.
"""

import argparse
import os
import pathlib
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import UserError
from ..foreign import open_file, parse_json, read_text
from ..paths import utf8_path
from ..torch_files import Damaged, load_torch

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")  # usual ones; a file may have any other
# Keys under which trainers save the state dict, in the order in which they are tried. Averaged weights come last: they
# are used only if the file has no others.
WRAPPERS = ("state_dict", "model_state_dict", "model", "student", "net", "params", "state_dict_ema", "model_ema")
STUDENT = "student.safetensors"  # in the folder of a finished run
UNFINISHED = "best.pt"  # in the folder of any run
FOLDER_FILES = (
    STUDENT,
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
SHOWN, CLIPPED = 5, 120  # keys per error message, and characters of each
DEEPEST = 8  # wrapping dicts that are opened
LONGEST_INDEX = 64 << 20  # bytes of the index of a folder of transformers; that of 100,000 tensors has 10 MB


class Settings(dict):
    """Stands for Lightning's AttributeDict in `hyper_parameters`: plain data, without the class's own code."""


def _number_types() -> list[Any]:
    """What a pickled numpy scalar consists of, by its names in numpy 1 and 2."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = {type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [np.dtype, *kinds, *names]


PLAIN_DATA = [
    argparse.Namespace,
    *(
        (kind, f"{module}.{kind.__name__}")
        for kind in (pathlib.PosixPath, pathlib.PurePosixPath)
        for module in ("pathlib", "pathlib._local")
    ),
    *(
        (Settings, f"{module}.AttributeDict")
        for module in (
            "pytorch_lightning.utilities.parsing",
            "lightning_fabric.utilities.data",
            "lightning.fabric.utilities.data",
            "lightning.pytorch.utilities.parsing",
        )
    ),
    *_number_types(),
]
"""Objects beside tensors that a torch checkpoint may hold. Making one runs no code of the file."""


class StateDict(OrderedDict[str, Tensor]):
    """Names -> tensors, with the versions of the modules if the file has them, and how the file was opened."""

    _metadata: dict[str, Any]
    opened: tuple[str, ...]  # entries that were opened, the outer one first

    def __init__(self, table: Mapping[str, Tensor], metadata: Mapping[str, Any], opened: tuple[str, ...] = ()):
        super().__init__(table)
        self._metadata, self.opened = dict(metadata), opened


def read_state_dict(path: str | os.PathLike) -> StateDict:
    """The state dict in a file, name -> tensor, on the CPU, in the file's dtypes.

    Wrapping dicts (`WRAPPERS`) are opened, also nested ones. The prefixes of DistributedDataParallel (`module.`) and
    torch.compile (`_orig_mod.`) are removed. A folder is that of a finished run, or one of transformers: config.json
    beside the weights, which may be in several files. Torch checkpoints are read with `weights_only`, so that no code
    in them runs; objects other than plain data (`PLAIN_DATA`) are refused. Raises UserError if there is no readable
    state dict.
    """
    path = Path(path)
    if os.path.isdir(path):  # False for a name that is too long, where Path.is_dir raises OSError
        return _read_folder(path)
    try:
        with open_file(path) as file:  # so that no pipe is waited for
            size = os.fstat(file.fileno()).st_size
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no weights file {clipped(str(path), 300)}") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the weights file {clipped(str(path), 300)} cannot be read: {reason}") from None
    if size == 0:
        raise UserError(f"{path} is empty: it was not written completely")
    table = _unwrap(_read(path), path)
    renamed = {without_prefixes(key): tensor for key, tensor in table.items()}
    if len(renamed) < len(table):
        raise UserError(f"{path}: several entries have the same name after removing 'module.' and '_orig_mod.'")
    return StateDict(renamed, _versions(table._metadata), table.opened)


def _versions(metadata: object) -> dict[str, Any]:
    """The versions of the modules, as torch notes them: {module: {"version": number}}; anything else is left out."""
    pairs = metadata.items() if isinstance(metadata, Mapping) else ()
    return {
        without_prefixes(key): {"version": about["version"]}
        for key, about in pairs
        if isinstance(key, str) and isinstance(about, Mapping) and isinstance(about.get("version"), int)
    }


def without_prefixes(key: str) -> str:
    """A key without the prefixes of torch.compile (at any depth) and DistributedDataParallel (at the start)."""
    return re.sub(r"^(module\.)+", "", key.replace("_orig_mod.", ""))


def _read_folder(folder: Path) -> StateDict:
    """The weights of a folder of a run, or of transformers."""
    found = next((folder / name for name in FOLDER_FILES if os.path.isfile(folder / name)), None)
    if found is None:
        hint = f"name a file, or a folder with {' or '.join(name for name in FOLDER_FILES if 'index' not in name)}"
        raise UserError(f"{folder} is a directory without weights: {unfinished(folder) or hint}")
    if found.suffix != ".json":
        return read_state_dict(found)
    try:
        shards = sorted({str(shard) for shard in parse_json(read_text(found, LONGEST_INDEX))["weight_map"].values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{found} is no index of weights: {type(error).__name__}: {error}"[:300]) from None
    for shard in shards:
        if Path(shard).name != shard or shard == ".." or os.path.isdir(folder / shard):
            raise UserError(f"{found} names {shard!r:.200}: an index may name files of its own folder alone")
    return StateDict({key: value for shard in shards for key, value in read_state_dict(folder / shard).items()}, {})


def unfinished(folder: Path) -> str:
    """What to name in the place of the folder of a run that is not finished; "" for any other folder."""
    best = folder / UNFINISHED
    return f"the run is not finished; {best} is its best state so far" if os.path.isfile(best) else ""


def weights_of(place: str) -> str:
    """The weights file of the run folder `place`; `place` itself if it is none, such as a file or a tag."""
    weights = os.path.join(place, STUDENT)
    return weights if os.path.isdir(place) and os.path.isfile(weights) else place


def _kind(path: Path) -> str:
    """What a file is by its first bytes: "safetensors" or "torch"."""
    with open_file(path) as file:
        start, size = file.read(9), path.stat().st_size
    header = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and 2 <= header <= size - 8:
        return "safetensors"
    is_torch = start.startswith((b"PK", b"\x80"))
    return "safetensors" if path.suffix == ".safetensors" and not is_torch else "torch"


def _read(path: Path) -> object:
    from pickle import UnpicklingError

    kind = _kind(path)
    try:
        with torch.serialization.safe_globals(PLAIN_DATA), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; errors are reported below
            if kind == "safetensors":
                return _read_safetensors(path)
            return load_torch(path)
    except Damaged as error:
        raise UserError(f"{path} is not a torch file, or it is incomplete: {error}; it was refused unread") from None
    except UnpicklingError as error:
        marks = ("GLOBAL", "Unsupported", "Can only")  # of the line in torch's long message that names the object
        lines = [line.strip() for line in str(error).splitlines() if any(mark in line for mark in marks)]
        lines = [line.partition(". Please use ")[0][:240] for line in lines]  # without advice to allow the object
        raise UserError(
            f"{path} is damaged or holds more than tensors ({lines[0] if lines else 'no detail'}) and was refused; "
            "none of its code was run: save model.state_dict(), or a .safetensors file"
        ) from error
    except Exception as error:  # torch's readers raise many kinds of errors on damaged bytes
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        raise UserError(f"{path} is not a {kind} file, or it is incomplete ({reason})") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file. Names that safetensors' `save_model` notes as the same tensor as another are there too."""
    with utf8_path(path) as name, safe_open(name, framework="pt") as file:
        table = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict
        aliases = file.metadata() or {}
    return table | {name: table[kept] for name, kept in aliases.items() if kept in table and name not in table}


def _unwrap(content: object, path: Path) -> StateDict:
    opened: tuple[str, ...] = ()
    while isinstance(content, Mapping) and len(opened) <= DEEPEST:
        named = {key: value for key, value in content.items() if isinstance(key, str)}
        tensors = {key: value for key, value in named.items() if isinstance(value, Tensor)}
        wrapper = next((key for key in WRAPPERS if isinstance(named.get(key), Mapping)), None)
        inner = [key for key, value in named.items() if isinstance(value, Mapping) and _has_tensors(value)]
        if tensors and (len(tensors) == len(content) or wrapper is None and any("." in key for key in tensors)):
            return StateDict(tensors, _versions(getattr(content, "_metadata", {})), opened)  # without the numbers
        if wrapper is None and len(inner) == 1:
            wrapper = inner[0]
        if wrapper is None:
            break
        opened, content = (*opened, wrapper), named[wrapper]
    if len(opened) > DEEPEST:
        raise UserError(f"{path} holds no state dict: more than {DEEPEST} dicts within one another, or one in itself")
    found = f"its content is a {type(content).__name__}"
    if isinstance(content, Mapping):
        entries = [f"{_key(k)} ({type(v).__name__})" for k, v in islice(content.items(), SHOWN)]
        entries += [""] * (len(content) - len(entries))  # listed() counts them
        found = listed("entries", entries) or "it has no entries"
    raise UserError(
        f"{path} holds no state dict: {found}; looked for names and tensors, also under {', '.join(WRAPPERS)}"
    )


def _key(key: object) -> str:
    """A key of any type for an error message. Whole numbers of more than 4,300 digits cannot be printed."""
    is_short = not isinstance(key, int) or abs(key) < 1 << 64
    return clipped(repr(key)) if isinstance(key, (str, int, float)) and is_short else f"a {type(key).__name__}"


def _has_tensors(table: Mapping) -> bool:
    return any(isinstance(value, Tensor) for value in table.values())


def listed(title: str, items: list[str]) -> str:
    """`"missing 7: a, b, c, d, e, +2 more"`, or the empty string."""
    more = [f"+{len(items) - SHOWN} more"] if len(items) > SHOWN else []
    shown = [clipped(item) for item in items[:SHOWN]]
    return f"{title} {len(items)}: {', '.join(shown + more)}" if items else ""


def clipped(text: str, most: int = CLIPPED) -> str:
    """`text`, or its beginning and its end: names in files have any length."""
    return text if len(text) <= most else f"{text[: most * 2 // 3]}...{text[-most // 3 :]}"
