"""manifest.json: what a cache was made from, and which views are complete."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError, no_folder
from ..files import write_atomic
from ..foreign import parse_json, read_text
from .rows import Rows

NAME, FORMAT = "manifest.json", 1
VIEWS = 1_000_000
SAMPLES = 10**10  # images; the largest public sets have half of it
CHECKS: dict[str, Callable[[Any], bool]] = {
    "classes": lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value),
    "topk": lambda value: type(value) is int and value >= 0,
    "precision": lambda value: value in ("fp16", "fp32"),
    "temperature": lambda value: type(value) in (int, float) and 0 <= value < math.inf,
    "form": lambda value: value in ("auto", "plain", "folded", "fused", "compiled"),
}
"""Of settings, and of the form in which the teacher ran: what options would allow too."""
LONGEST = 64 << 20  # bytes; that of 100,000 classes has 3 MB


@dataclass(frozen=True)
class Manifest:
    """`settings`: what must be equal for a run to use the cache. Two caches of equal settings hold the same.

    `how`: how the teacher was run (its form and dtype); it must be equal for a run that fills the cache further.
    `complete`: by view, the BLAKE2 hash of each shard. There is no date: a cache made twice has the same bytes.
    """

    settings: dict[str, Any]
    how: dict[str, str]
    complete: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        return int(self.settings["samples"])

    @property
    def views(self) -> int:
        return int(self.settings["views"])

    @property
    def rows(self) -> Rows:
        """What is kept of the logits of an image."""
        settings = self.settings
        return Rows(len(settings["classes"]), *(settings[name] for name in ("precision", "topk", "temperature")))

    def write(self, folder: Path) -> None:
        """Replace manifest.json, whole or not at all."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1, sort_keys=True)
        write_atomic(folder / NAME, text + "\n")

    def check(self) -> None:
        """Raise ValueError, KeyError, TypeError or AttributeError unless the values are of the right kind."""
        if not isinstance(self.how, dict) or min(self.samples, self.views, self.rows.dtype.itemsize) < 1:
            raise ValueError("a number below 1")
        if self.views > VIEWS:
            raise ValueError(f"{self.views} views")
        if self.samples > SAMPLES:
            raise ValueError(f"{self.samples:.3g} images")
        given = self.settings | {"form": self.how.get("teacher_form")}
        for name, is_right in CHECKS.items():
            if given.get(name) is not None and not is_right(given[name]):
                raise ValueError(f"{name} {given[name]!r:.80}")
        for view, hashes in self.complete.items():
            if not 0 <= int(view) < self.views or not hashes.items():
                raise ValueError(f"complete view {view} of {self.views}")

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """The manifest of a folder; None if the folder is empty or not there.

        Raises UserError for a folder of other files, and for a manifest that is damaged or of another version.
        """
        path = folder / NAME
        if not os.path.isfile(path):  # False for a name that is too long, where Path.is_file raises OSError
            if os.path.exists(folder) and not os.path.isdir(folder):
                raise UserError(f"{folder} is no teacher cache: {no_folder(folder)}; choose another name")
            if os.path.exists(folder) and _holds_something(folder):
                raise UserError(f"{folder} is no teacher cache (it has no {NAME}) and not empty; choose another folder")
            return None
        try:
            values = parse_json(read_text(path, LONGEST))
            version = values.pop("format")
            manifest = cls(**values)
            manifest.check()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError) as error:
            raise UserError(
                f"{path} is no manifest of a teacher cache ({type(error).__name__}: {error}); restore it, or make the "
                "cache anew in another folder"
            ) from None
        if version != FORMAT:
            raise UserError(f"{path} is of format {version}, this fastkd reads format {FORMAT}; make the cache anew")
        return manifest


def _holds_something(folder: Path) -> bool:
    return any(not file.name.endswith(".tmp") for file in folder.iterdir())


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Each setting of a run that is another one in the cache, in words. Settings that are None in `ours` fit any."""
    found = []
    for name in dict.fromkeys([*theirs, *ours]):
        mine, other = ours.get(name), theirs.get(name)
        if name == "data" and mine is not None and mine != other:
            found.append("data: the images are other ones (their names, order, labels or sizes)")
        elif mine is not None and mine != other:
            found.append(
                f"{name.replace('_', ' ')}: the cache has {_short(other, mine)}, this run {_short(mine, other)}"
            )
    return found


def _short(value: Any, other: Any) -> str:
    """The value in a message; of lists and dictionaries what differs from `other`."""
    if isinstance(value, dict) and isinstance(other, dict):
        value = {name: value.get(name) for name in value | other if other.get(name) != value.get(name)}
    pairs = list(zip(value, other, strict=False)) if isinstance(value, list) and isinstance(other, list) else []
    if pairs and len(value) == len(other) and all(isinstance(each, dict) for pair in pairs for each in pair):
        value = [{name: each for name, each in one.items() if two.get(name) != each} for one, two in pairs]
    elif pairs and len(value) > 4:
        place = next((i for i, pair in enumerate(pairs) if pair[0] != pair[1]), len(other))
        return f"{len(value)} entries, entry {place} is {value[place]!r}" if place < len(value) else f"{len(value)}"
    text = json.dumps(value) if isinstance(value, (dict, list)) else repr(value)
    return text if len(text) <= 160 else text[:157] + "..."
