"""Batches from host memory to a CUDA device: one batch ahead of the step, on a stream of their own.

The copy and the kernel that normalises run beside the step before. The step's stream waits for them by an event, the
host does not. Every batch has memory of its own, which torch's allocator reuses (`record_stream`): unlike two buffers
that are written in turns, a batch may then be kept, as first_images, mixup or `list(loader)` do.

The host waits at one place, between steps: before it sends a batch, the step three batches before must be done. Without
this bound, a loader that is faster than the step would fill the GPU with batches. The step after that one is queued
already, so the GPU goes on. Pinned memory is not written before its copy is done: torch's host allocator sees to that.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

QUEUED = 1  # steps that may be unfinished when a batch is sent; the batch before it waits for its step

Batch = tuple[Tensor, Tensor]


class Prefetch:
    """Calls `normalise` on the images of each batch on the device, and gives them with their target.

    A batch of (images, boxes, flips, target) is `normalise(images, boxes, flips)` and target.
    """

    def __init__(self, normalise: Callable[..., Tensor], device: torch.device):
        self.normalise, self.device, self.stream = normalise, device, torch.cuda.Stream(device)
        self.held_s = 0.0  # seconds that the host has waited here for steps

    def __call__(self, batches: Iterable[tuple[Tensor, ...]]) -> Iterator[Batch]:
        """The same batches on the device. `batches` is read one batch ahead."""
        waiting = None  # a batch that was sent and not given yet
        steps: deque[torch.cuda.Event] = deque()  # ends of the steps that may still run, oldest first
        for *images, target in batches:
            while len(steps) > QUEUED:
                start = time.perf_counter()
                steps.popleft().synchronize()
                self.held_s += time.perf_counter() - start
            sent = self._send(images, target)
            if waiting is not None:
                yield self._receive(*waiting)
                steps.append(self._end_of_step())
            waiting = sent
        if waiting is not None:
            yield self._receive(*waiting)

    def _send(self, inputs: list[Tensor], target: Tensor) -> tuple[Batch, torch.cuda.Event]:
        """(the batch on the device, an event after its last kernel)"""
        with torch.cuda.stream(self.stream):
            images = self.normalise(*(tensor.to(self.device, non_blocking=True) for tensor in inputs))
            return (images, target.to(self.device, non_blocking=True)), self.stream.record_event()

    def _receive(self, batch: Batch, ready: torch.cuda.Event) -> Batch:
        """Let the consumer's stream wait for the batch, and the allocator for the consumer's stream."""
        consumer = torch.cuda.current_stream(self.device)
        consumer.wait_event(ready)
        for tensor in batch:
            tensor.record_stream(consumer)
        return batch

    def _end_of_step(self) -> torch.cuda.Event:
        end = torch.cuda.Event(blocking=True)  # a host that waits leaves its core to the decoders
        end.record(torch.cuda.current_stream(self.device))
        return end
