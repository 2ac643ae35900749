"""A whole step as one CUDA graph per (plan, shapes): the host then launches one graph instead of hundreds of kernels.

The graph holds forward, loss, backward, clipping, optimizer, weight average and counters. Outside of it are the
schedule, which writes the learning rate's tensor, mixup, and the copy of a batch into the graph's inputs. With several
processes there are two graphs, and between them the all-reduce of the gradients.

The first steps of a plan run eagerly and are training steps like all others: they are the warm-up, so no state has to
be restored. Then the step is captured, which changes nothing either, and replayed. A batch of another size runs
eagerly, in the graphs' memory. Each image size gets its own graph. A graph has one set of inputs: the copy into them
takes about 0.3 % of an ImageNet step (computed from its bytes, not timed), and a second set would need every graph
twice.
"""

import threading
import traceback
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from ..methods.forwards import Taught
from .step import Step
from .timing import release_failed_capture

WARM_UP = 3  # eager steps before the first capture: cuDNN chooses its algorithms, the optimizer makes its state
LARGEST = 64  # graphs held; IAKD has 2^K plans

Shapes = tuple[torch.Size | torch.dtype, ...]  # of images, target and what the teacher says of them
Key = tuple[Hashable, Shapes]  # plan and shapes


class CannotCapture(Exception):
    """A step that no CUDA graph can hold; the message says why."""


class CudaGraph:
    """`with graph:` captures on `stream` with memory from `pool`; `graph.replay()` runs. Tests have one for the CPU.

    A capture that fails raises CannotCapture, and leaves the streams as they were.
    """

    counts_at_once = False  # True in that of the tests, whose capture runs the operations too

    def __init__(self, pool: Any, stream: torch.cuda.Stream):
        self.graph, self.pool = torch.cuda.CUDAGraph(), pool
        self.replay = self.graph.replay
        self.context = torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local")
        self.megabytes = 0.0

    def __enter__(self) -> "CudaGraph":
        self.before = torch.cuda.current_stream()
        try:
            self.context.__enter__()
        except RuntimeError as error:
            torch.cuda.set_stream(self.before)
            raise CannotCapture(_where(error)) from error
        self.megabytes = -torch.cuda.memory_reserved() / 2**20
        return self

    def __exit__(self, kind: Any, problem: BaseException | None, trace: Any) -> None:
        try:
            self.context.__exit__(kind, problem, trace)
        except RuntimeError as error:  # torch has not left the stream then
            torch.cuda.set_stream(self.before)
            release_failed_capture(self.pool, self.before.device)
            if problem is None or isinstance(problem, RuntimeError):
                raise CannotCapture(_where(problem or error)) from (problem or error)
        else:
            if isinstance(problem, RuntimeError):
                raise CannotCapture(_where(problem)) from problem
        self.megabytes += torch.cuda.memory_reserved() / 2**20  # the growth of the pool


class GraphMemory:
    """The stream and the memory that the graphs of a step share, and eager steps between their replays."""

    def __init__(self, stream: torch.cuda.Stream):
        self.id, self.stream = torch.cuda.graph_pool_handle(), stream

    def graph(self) -> CudaGraph:
        return CudaGraph(self.id, self.stream)

    @contextmanager
    def eager(self, in_pool: bool) -> Iterator[None]:
        """Run eagerly on the stream; `in_pool`: in memory that the graphs use while they are replayed.

        Nothing that is made there may live on: a replay would overwrite it. Backward passes then run in this thread,
        since memory is taken from the pool by one thread alone.
        """
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with ExitStack() as stack:
            stack.enter_context(torch.cuda.stream(self.stream))
            if in_pool:
                # all it reads is `id`; a MemPool aborts the process if it is deleted before the graphs that use it
                stack.enter_context(torch.cuda.use_mem_pool(cast(torch.cuda.MemPool, self)))
                stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            yield
        current.wait_stream(self.stream)

    def live(self) -> int:
        """Bytes of the pool that are in use. Asked between steps, when an eager step should have nothing left there."""
        segments = torch.cuda.memory_snapshot(self.id, include_traces=False)
        return sum(segment["allocated_size"] for segment in segments)

    def renew(self) -> None:
        """Take other memory from now on. torch cannot use a pool again that has no graph left but something alive."""
        self.id = torch.cuda.graph_pool_handle()


class GraphedStep:
    """Runs `step(images, target, plan)`, by replay where possible. At most `largest` graphs; the oldest use goes first.

    `new_graph()` makes a CudaGraph. `graphs` holds the captured ones by (plan, shapes). The state stays in `step`.
    A step is replayed if the batch has the usual size, after the first steps of its plan and shapes, and `warm_up` in
    all. `memory`: what eager steps then run in. A forward pass must change its state in place: a graph goes on with the
    tensors that it has captured. If a step cannot be captured, `stop(reason)` is called once, which may raise; without
    an error all later steps run eagerly.
    """

    def __init__(
        self,
        step: Step,
        new_graph: Callable[[], CudaGraph],
        warm_up: int = WARM_UP,
        largest: int = LARGEST,
        memory: GraphMemory | None = None,
        stop: Callable[[str], None] | None = None,
    ):
        self.step, self.new_graph, self.warm_up, self.largest = step, new_graph, warm_up, largest
        self.memory, self.stop, self.stopped = memory, stop, False
        self.graphs: OrderedDict[Key, list[CudaGraph]] = OrderedDict()
        self.seen: Counter[Key] = Counter()  # eager steps
        self.eager, self.replays = 0, 0  # steps
        self.usual = 0  # images of the first batch
        self.inputs: dict[Shapes, tuple[Tensor, ...]] = {}  # shared by the graphs of one shape: replays take turns

    def __call__(self, images: Tensor, target: Tensor, plan: Hashable = None, taught: Taught = ()) -> None:
        batch = (images, target, *taught)
        shapes = tuple(about for each in batch for about in (each.shape, each.dtype))
        key = (plan, shapes)
        self.usual = self.usual or len(images)
        self.step.agree(len(images))
        is_new = self.seen[key] < self.step.first_steps
        if self.stopped or is_new or self.eager < self.warm_up or len(images) != self.usual:
            self._run_eagerly(key, images, target, taught)
            return
        if shapes not in self.inputs:
            self.inputs[shapes] = tuple(torch.empty_like(each) for each in batch)
        for held, each in zip(self.inputs[shapes], batch, strict=True):
            held.copy_(each)
        if key in self.graphs:
            self.graphs.move_to_end(key)
            self._replay(self.graphs[key])
        elif not self._captured(key):
            self._run_eagerly(key, images, target, taught)
            return
        self.replays += 1

    def _replay(self, graphs: list[CudaGraph]) -> None:
        first, *second = graphs
        first.replay()
        self.step.exchange()
        for graph in second:
            graph.replay()

    def _captured(self, key: Key) -> bool:
        """Capture the step of this plan and shapes, and make it. False if it cannot be captured: nothing has run."""
        while len(self.graphs) >= self.largest:
            self.graphs.popitem(last=False)
        try:
            graphs = self._capture(key)
        except CannotCapture as error:
            self.step.forget()
            self._stop(str(error))
            return False
        self.graphs[key] = graphs
        if not graphs[0].counts_at_once:
            self._replay(graphs)
        return True

    def _capture(self, key: Key) -> list[CudaGraph]:
        """All graphs of a step, before any of them is replayed: if one fails, the eager step starts anew."""
        plan, shapes = key
        graphs = [self.new_graph()]
        with graphs[0]:
            images, target, *taught = self.inputs[shapes]
            self.step.gradients(images, target, plan, tuple(taught))
            if not self.step.processes:
                self.step.update()
        if self.step.processes:
            if graphs[0].counts_at_once:
                self.step.exchange()
            graphs.append(self.new_graph())
            with graphs[1]:
                self.step.update()
        return graphs

    def _run_eagerly(self, key: Key, images: Tensor, target: Tensor, taught: Taught) -> None:
        """An eager step. The first of its plan and shapes also shows whether it asks the device for a value."""
        plan, is_first, memory = key[0], not self.seen[key], self.memory if self.graphs else None
        self.seen[key] += 1
        self.eager += 1
        before, syncs = memory.live() if memory else 0, list[str]()
        around = self.memory.eager(bool(self.graphs)) if self.memory and not self.stopped else nullcontext()
        with around, _watch_syncs(syncs) if is_first and images.is_cuda else nullcontext():
            self.step.gradients(images, target, plan, taught)
        self.step.exchange()
        self.step.update()
        if memory and memory.live() > before:  # something made there lives on: capture around it
            self.graphs.clear()
            memory.renew()
        if syncs and not self.stopped:
            self._stop(syncs[0])

    def _stop(self, reason: str) -> None:
        self.stopped = True
        self.graphs.clear()
        self.inputs.clear()
        if self.stop:
            self.stop(reason)

    def close(self) -> str:
        """Free the graphs' memory before the process tears CUDA down; gives a line about how often they were used."""
        count, steps = len(self.graphs), self.replays + self.eager
        megabytes = sum(graph.megabytes for graphs in self.graphs.values() for graph in graphs)
        self.graphs.clear()
        self.inputs.clear()
        graphs = "1 CUDA graph" if count == 1 else f"{count} CUDA graphs"
        return f"{graphs}, {megabytes:,.0f} MB, replayed in {self.replays} of {steps} steps"


@contextmanager
def _watch_syncs(syncs: list[str]) -> Iterator[None]:
    """Add to `syncs` each place in the block that waits for the device, by torch's own check. The block goes on."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        own, shown = threading.get_ident(), warnings.showwarning

        def of_this_thread(*about: Any, **more: Any) -> None:
            if threading.get_ident() == own:  # a checkpoint may be written by another one
                shown(*about, **more)

        setattr(warnings, "showwarning", of_this_thread)  # noqa: B010, for mypy
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in found:
        if "called a synchronizing" in str(warning.message):
            syncs.append(f"{warning.filename}:{warning.lineno} waits for the device")
        elif "debug mode is a prototype" not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _where(error: BaseException) -> str:
    """The innermost line outside of torch that raised `error`, and what it said."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/torch/" not in frame.filename]
    place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "a step"
    return f"{place} cannot be captured: {str(error).partition(chr(10))[0] or type(error).__name__}"
