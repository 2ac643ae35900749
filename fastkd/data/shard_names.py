"""Which files of `--data` are shards, and which of them are for training: from their names."""

import os
import re
from glob import glob

from ..errors import UserError
from .walk import shown, some

KINDS = (".tar", ".parquet")
FOLDERS = ("train", "val", "valid", "validation", "test", "data")  # that may hold shards instead of images
PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "eval": "val"}
MOST = 1_000_000  # names that a pattern may stand for


def shards_of(data: str) -> dict[str, list[str]] | None:
    """{"train": files, "val": files}, or {"": files} if no name tells; None if `data` is no shard and holds none.

    `data` is a .tar or .parquet file, names with braces, such as x-{000..099}.tar or {train,val}.tar, or with *, or a
    folder.
    Raises UserError if a file that braces name is missing, or if a folder holds shards of both kinds.
    """
    files = _named(data) if data.endswith(KINDS) and not os.path.isdir(data) else _held(data)
    if not files:
        return None
    kinds = {os.path.splitext(file)[1] for file in files}
    if len(kinds) > 1:
        raise UserError(
            f"--data {data!r} holds {' and '.join(sorted(kinds))} files: give one kind, as in '{data}/*.tar'"
        )
    return by_part(files)


def by_part(files: list[str]) -> dict[str, list[str]]:
    """The files of each part. Files whose names name no part are left out where others do."""
    parts: dict[str, list[str]] = {}
    for file in files:
        parts.setdefault(_part(file), []).append(file)
    test = parts.pop("test", None)
    if test and "val" not in parts:  # the labels of a test set are often missing: it counts if there is no other
        parts["val"] = test
    if parts.keys() & {"train", "val"}:
        parts.pop("", None)
    return parts


def _part(file: str) -> str:
    """Such as "train" or "": by the first such word in the name of the file, or by the first word of its folder's."""
    words = re.split(r"[^a-z]+", os.path.basename(file).lower())
    words.append(re.split(r"[^a-z]", os.path.basename(os.path.dirname(os.path.abspath(file))).lower())[0])
    return next((PARTS.get(word, word) for word in words if word in PARTS or word == "test"), "")


def _named(pattern: str) -> list[str]:
    """The files that a name with braces stands for. All must exist."""
    if os.path.isfile(pattern):
        return [pattern]
    files = []
    for name in expand(pattern):
        files += sorted(glob(name)) if "*" in name else [name]
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        raise UserError(
            f"--data {pattern!r}: {len(missing):,} of its {len(files):,} shards are missing ({some(missing)}); "
            "check the path, and the numbers in braces"
        )
    if not files:
        raise UserError(f"--data {pattern!r} matches no file: check the path")
    return files


def expand(pattern: str) -> list[str]:
    """All names that braces stand for: {000..099} counts with as many digits, {a,b} are words.

    Any number of braces, also inside of others, as in {train-{000..099},val-{00..09}}.
    """
    names, rest = [""], pattern
    while match := re.search(r"[{}]", rest):
        inside, after = _between(rest[match.start() :], pattern)
        words = _words(inside, pattern)
        if len(names) * len(words) > MOST:
            raise UserError(f"--data {pattern!r} stands for more than {MOST:,} files: check the numbers in braces")
        names = [name + rest[: match.start()] + word for name in names for word in words]
        rest = after
    return [name + rest for name in names]


def _between(text: str, pattern: str) -> tuple[str, str]:
    """(what is inside of the brace that `text` begins with, what comes after it)."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return text[1:place], text[place + 1 :]
        if depth < 0:
            break
    raise UserError(f"--data {pattern!r} has a brace without its partner: {{a,b}} and {{000..099}} stand for names")


def _words(inside: str, pattern: str) -> list[str]:
    """The names that a brace stands for; `inside` may hold braces."""
    if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = map(int, bounds.groups())
        if last < first or last - first >= MOST:
            raise UserError(f"--data {pattern!r}: {{{inside}}} counts from {first} to {last}: give first..last")
        return [f"{number:0{len(bounds.group(1))}d}" for number in range(first, last + 1)]
    if "," not in inside:
        raise UserError(
            f"--data {pattern!r}: {{{inside}}} is neither first..last, as in {{000..099}}, nor a list {{a,b}}"
        )
    parts, depth = [""], 0
    for letter in inside:
        depth += (letter == "{") - (letter == "}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [name for part in parts for name in expand(part)]


def _held(root: str) -> list[str]:
    """The shards in a folder and in its train/, val/, test/ and data/. None if it holds folders of images."""
    if not os.path.isdir(root):
        return []
    files, folders = _listed(root)
    for name in folders:
        if name not in FOLDERS:
            return []
        more, deeper = _listed(os.path.join(root, name))
        if deeper and not more:
            return []
        files += more
    return files


def _listed(folder: str) -> tuple[list[str], list[str]]:
    """(paths of the shards, names of the folders) in a folder, sorted; hidden ones are left out."""
    try:
        with os.scandir(folder) as entries:
            seen = sorted((entry.name, entry.is_dir()) for entry in entries if entry.name[0] != ".")
    except OSError as error:
        raise UserError(f"{shown(folder)} cannot be read ({error.strerror}): check its permissions") from None
    files = [os.path.join(folder, name) for name, is_folder in seen if not is_folder and name.endswith(KINDS)]
    return files, [name for name, is_folder in seen if is_folder]
