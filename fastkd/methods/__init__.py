"""The methods by name. A new one is a file beside these and a line here."""

from .base import Forwards, Frozen, Method
from .ce import CE
from .kd import KD

METHODS: dict[str, type[Method]] = {
    "ce": CE,
    "kd": KD,
}

__all__ = ["CE", "KD", "METHODS", "Forwards", "Frozen", "Method"]
