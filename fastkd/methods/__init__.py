"""The methods by name. A new method is a file in this folder and its class in KINDS."""

from ..errors import UserError, nearest
from .at import AT
from .base import Method
from .ce import CE
from .combo import Combo, combine
from .context import RunContext
from .dcm import DCM
from .dist import DIST
from .dkd import DKD
from .dml import DML
from .fitnet import FitNet
from .forwards import ForwardCache
from .frozen import FrozenTeacher
from .ft import FT
from .hardkd import HardKD
from .iakd import IAKD
from .iedml import IEDML
from .iekd import IEKD
from .kd import KD
from .ofd import OFD
from .rkd import RKD
from .sokd import SOKD
from .sp import SP

KINDS = (CE, KD, HardKD, DML, IEKD, IEDML, IAKD, SOKD, DCM, AT, FitNet, FT, OFD, DKD, DIST, RKD, SP)
METHODS: dict[str, type[Method]] = {kind.__name__.lower(): kind for kind in KINDS}  # "fitnet": FitNet


def find_method(name: str) -> type[Method]:
    """The class of a method, or of the weighted sum of several: "kd", "iekd+kd". UserError for an unknown name."""
    parts = name.split("+")
    for part in parts:
        if not part:
            raise UserError(f"method {name!r}: give a method on both sides of each +")
        if part not in METHODS:
            raise UserError(f"unknown method {part!r}{nearest(part, METHODS)}; choose from {', '.join(METHODS)}")
    return METHODS[name] if len(parts) == 1 else combine({part: METHODS[part] for part in parts}, name)


__all__ = [
    "AT",
    "CE",
    "DCM",
    "DIST",
    "DKD",
    "DML",
    "FT",
    "FitNet",
    "IAKD",
    "IEDML",
    "IEKD",
    "KD",
    "METHODS",
    "OFD",
    "RKD",
    "SOKD",
    "SP",
    "Combo",
    "ForwardCache",
    "FrozenTeacher",
    "HardKD",
    "Method",
    "RunContext",
    "find_method",
]
