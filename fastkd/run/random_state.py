"""The random generators that a training may draw from: torch's, of the CPU and the device, Python's and numpy's."""

import random
from typing import Any

import numpy as np
import torch

from ..errors import shown


def seed_all(seed: int) -> None:
    """Set every generator of this process; `seed` may be any integer from 0."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every generator, for `set_random_state`. Waits for the device if it is a GPU."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Let every generator go on from `state`."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))


class KeptRandom:
    """`state`: of the generators, which `restore` lets them go on from, once; None: they stay as they are."""

    def __init__(self, device: torch.device):
        self.device = device
        self.state: dict[str, Any] | None = None

    def restore(self) -> None:
        if self.state:
            set_random_state(self.state, self.device)
            self.state = None


def check_random_state(state: Any, device: torch.device) -> str:
    """Why `set_random_state` cannot go on from what a file holds, or the empty string. No generator is changed."""
    try:
        torch.Generator().set_state(state["torch"])
        if device.type == "cuda" and state["cuda"] is not None:
            torch.Generator(device).set_state(state["cuda"])
        random.Random().setstate(state["python"])
        name, keys, position, *rest = state["numpy"]
        if not 0 <= position <= len(keys) == 624:  # numpy believes it
            return f"the state of numpy's generator is at {shown(position)}"
        np.random.RandomState(0).set_state((name, keys.numpy().astype(np.uint32), position, *rest))
    except Exception as error:  # each generator has its own kinds
        return f"the states of its random generators are damaged ({type(error).__name__}: {error!s:.100})"
    return ""
