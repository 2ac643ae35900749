"""Buffers of the closed forms on the CPU, used again from call to call."""

import math
import threading

import torch
from torch import Tensor


class _Scratch(threading.local):
    """scratch(name, shape, like) -> [shape] of like's dtype, with whatever was there before.

    The C library gives megabytes back to the system at once, and fetching them anew costs more than computing with
    them. One buffer per name and dtype is held, for each thread. Evaluation in inference mode may be the first to ask:
    what is made there could not be written outside of it, so buffers and views are made as if outside.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self.views: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        if like.device.type != "cpu":
            return like.new_empty(shape)
        key = (name, like.dtype)
        view = self.views.get(key)
        if view is None or view.shape != shape:
            with torch.inference_mode(False):
                view = self.views[key] = self._buffer(key, math.prod(shape), like).view(shape)
        return view

    def _buffer(self, key: tuple[str, torch.dtype], size: int, like: Tensor) -> Tensor:
        buffer = self.buffers.get(key)
        if buffer is None or not size <= len(buffer) <= 4 * size:
            buffer = self.buffers[key] = like.new_empty(size)
        return buffer[:size]


scratch = _Scratch()
