"""Layouts of checkpoints that people have: how their keys become those of a network.

A layout is tried on the keys of a file. It counts only if every key and shape of the network then fits exactly; what
else it leaves in the file are `companions`, such as auxiliary heads or the teacher beside the student.

Sources: RepDistiller and mdistiller (`latest`: the whole distiller), the released codes of IE-KD, SOKD and DCM, whose
Wide ResNets are those of S. Zagoruyko's functional code, Lightning's modules, and torch's averaged models.
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

FUNCTIONAL_WRN = (  # S. Zagoruyko's names, with "." or "-" between them; conv0 is a tensor, not a module
    (r"^conv0$", "conv1.weight"),
    (r"^group(\d+)\.block(\d+)\.conv0$", r"block@\1.layer.\2.conv1.weight"),
    (r"^group(\d+)\.block(\d+)\.conv1$", r"block@\1.layer.\2.conv2.weight"),
    (r"^group(\d+)\.block(\d+)\.convdim$", r"block@\1.layer.\2.convShortcut.weight"),
    (r"^group(\d+)\.block(\d+)\.bn1\.", r"block@\1.layer.\2.bn2."),
    (r"^group(\d+)\.block(\d+)\.bn0\.", r"block@\1.layer.\2.bn1."),
    (r"^bn\.", "bn1."),
)


class Layout(NamedTuple):
    """Keys that begin with `prefix`, without it, but for `companions`; then the first of `renames` that matches."""

    name: str
    prefix: str = ""
    companions: str = ""  # a regular expression
    renames: tuple[tuple[str, str], ...] = ()

    def apply(self, table: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The network's part of `table` with the network's keys; empty if the layout does not occur in it."""
        found = [(_below(self.prefix, key), value) for key, value in table.items() if key.startswith(self.prefix)]
        inside = dict(found)
        if len(inside) < len(found):
            return {}
        kept = {key: value for key, value in inside.items() if not (self.companions and re.match(self.companions, key))}
        renamed = {self._renamed(key): value for key, value in kept.items()}
        return renamed if len(renamed) == len(kept) else {}

    def _renamed(self, key: str) -> str:
        if self.renames is FUNCTIONAL_WRN:
            key = key.replace("-", ".")
        for pattern, new in self.renames:
            if re.search(pattern, key):
                key = re.sub(pattern, new, key)
                break
        return re.sub(r"block@(\d{1,4})\b", lambda found: f"block{int(found[1]) + 1}", key)


def _below(prefix: str, key: str) -> str:
    """A key without the prefix, nor that of a network inside, which DistributedDataParallel wraps."""
    return key.removeprefix(prefix).removeprefix("module.") if prefix else key


LAYOUTS = (
    Layout("IE-KD's code", renames=((r"\bshortcut\.", "downsample."), (r"^linear\.", "fc."))),
    Layout("SOKD's code, without its auxiliary layers", companions=r"auxiliary_"),
    Layout("DCM's code, without its auxiliary heads", companions=r"ep\d_"),
    Layout("functional Wide ResNet, as in DCM's code", companions=r"ep\d_", renames=FUNCTIONAL_WRN),
    Layout("averaged weights of torch's AveragedModel", companions=r"n_averaged$"),
    *(
        Layout(f"{name[:-1]} of a whole distiller or Lightning module", prefix=name)
        for name in ("student.", "model.", "net.", "network.", "backbone.", "model_s.", "teacher.", "model_t.")
    ),
)


def candidates(table: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(name of the layout, the table with its keys) for each layout that changes something.

    The last ones have a prefix that all keys share, whatever it is called.
    """
    for layout in LAYOUTS:
        found = layout.apply(table)
        if found and found.keys() != table.keys():
            yield layout.name, found
            for inner in LAYOUTS[:4] if layout.prefix else ():
                both = inner.apply(found)
                if both and both.keys() != found.keys():
                    yield f"{layout.name}, {inner.name}", both
    first = next(iter(table), "")
    prefix = first[: first.find(".") + 1]
    if prefix and all(key.startswith(prefix) for key in table) and not any(key.startswith(prefix) for key in own):
        yield f"all keys below {prefix[:-1]!r}", {key.removeprefix(prefix): value for key, value in table.items()}
