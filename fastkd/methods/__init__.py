"""The methods by name. A new one is a file beside these and a line here."""

from ..errors import UserError, nearest
from .base import Forwards, Frozen, Method, Run
from .ce import CE
from .combo import Combo, combine
from .dcm import DCM
from .dml import DML
from .iakd import IAKD
from .kd import KD
from .sokd import SOKD

METHODS: dict[str, type[Method]] = {
    "ce": CE,
    "kd": KD,
    "dml": DML,
    "iakd": IAKD,
    "sokd": SOKD,
    "dcm": DCM,
}


def find_method(name: str) -> type[Method]:
    """Of a name, or of several with + between them, which becomes their weighted sum. UserError for unknown ones."""
    parts = name.split("+")
    for part in parts:
        if part not in METHODS:
            raise UserError(f"unknown method {part!r}{nearest(part, METHODS)}; there are {', '.join(METHODS)}")
    return METHODS[name] if len(parts) == 1 else combine({part: METHODS[part] for part in parts}, name)


__all__ = [
    "CE",
    "DCM",
    "DML",
    "IAKD",
    "KD",
    "METHODS",
    "SOKD",
    "Combo",
    "Forwards",
    "Frozen",
    "Method",
    "Run",
    "find_method",
]
