"""The forward passes of one step: each network runs once, however many loss terms use its outputs."""

import functools
import itertools
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from .embedding import ClassifierInput
from .frozen import FrozenTeacher

Taught = tuple[Tensor, ...]
"""What a teacher that is not run says of a batch: (logits [N, C],), or (values [N, k + 1], classes [N, k]), or ()."""


class StagedView(Protocol):
    """A network that returns the feature maps of its stages beside its logits, such as `fastkd.models.Staged`.

    A view whose stages give other tensors than maps has `outputs(images) -> (logits, outputs of the stages)` and
    `maps(outputs) -> maps` too.
    """

    def features(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Images [N, 3, H, W] -> (logits [N, C], one map [N, C, H, W] per stage)."""


class ForwardCache:
    """`out(net)` gives the logits [N, C] of `net` on this step's images, `out.features(net)` its feature maps.

    The first call runs the network, later calls return the same tensors. Feature maps exist for the networks in
    `views`: those for which the method has called `request_features`. `out.embedding(net)` exists for the networks in
    `classifiers`: those for which it has called `request_embeddings`.
    """

    def __init__(
        self,
        images: Tensor,
        views: Mapping[nn.Module, StagedView],
        classifiers: Mapping[nn.Module, ClassifierInput] = MappingProxyType({}),
    ):
        self.images, self._views, self._classifiers = images, views, classifiers
        self._taught: dict[nn.Module, Taught] = {}
        self._memo: dict[nn.Module, tuple[Tensor, list[Tensor]]] = {}
        self._maps: dict[nn.Module, list[Tensor]] = {}
        self._embeddings: dict[nn.Module, Tensor] = {}
        self._streams: dict[nn.Module, torch.cuda.Stream] = {}  # of the networks that run on a stream of their own

    def __call__(self, net: nn.Module) -> Tensor:
        return self._run(net)[0]

    def give(self, teacher: nn.Module, taught: Taught) -> None:
        """From now on, `taught` stands for the outputs of `teacher`, which is not run."""
        if len(taught) == 1:
            self._memo[teacher] = (taught[0], [])
        self._taught[teacher] = taught

    def topk(self, net: nn.Module) -> Taught:
        """(values [N, k + 1], classes [N, k]) if the largest logits of `net` were given alone, else the empty tuple."""
        taught = self._taught.get(net, ())
        return taught if len(taught) == 2 else ()

    def features(self, net: nn.Module) -> list[Tensor]:
        """One map [N, C, H, W] per stage of `net`, the first stage first. Raises ValueError if not requested."""
        if net not in self._maps:
            outputs, maps_of = self.outputs(net), getattr(self._views[net], "maps", None)
            self._maps[net] = outputs if maps_of is None else maps_of(outputs)
        return self._maps[net]

    def outputs(self, net: nn.Module) -> list[Tensor]:
        """As `features`, but as the next stage takes them: tokens [N, L, C] and [N, H, W, C] are not converted."""
        if net not in self._views:
            raise ValueError(f"the method did not call request_features() for {type(net).__name__}")
        return self._run(net)[1]

    def embedding(self, net: nn.Module) -> Tensor:
        """What the classifier of `net` gets, [N, D]. Raises ValueError if the method did not request it."""
        if net not in self._classifiers:
            raise ValueError(f"the method did not call request_embeddings() for {type(net).__name__}")
        self._run(net)
        return self._embeddings[net]

    def start(self, first: nn.Module, others: Sequence[nn.Module], learners: Collection[nn.Module]) -> None:
        """In a step of a CUDA graph: run `first`, and `others` beside it, each on a stream of its own.

        Such a step has a stream that is not the default one: it is captured, or eager in the memory of the graphs.
        Only `learners` get a gradient; autograd runs a network's backward pass on the stream of its forward pass, and
        joins the streams at the end. All networks are enqueued before a result is asked for, because the current stream
        waits from then on. `join_all` must follow.
        """
        is_compiling = torch.compiler.is_compiling()  # it would compile again within the capture
        if is_compiling or not others or not self.images.is_cuda:
            return
        current = torch.cuda.current_stream()
        if current == torch.cuda.default_stream():
            return
        streams = [stream for stream in _streams(self.images.device) if stream != current]
        for net, stream in zip(others, itertools.cycle(streams), strict=False):
            stream.wait_stream(current)
            with torch.cuda.stream(stream), _gradient_if(net in learners):
                self._run(net)
            self._streams[net] = stream
        with _gradient_if(first in learners):
            self._run(first)

    def join(self, net: nn.Module) -> None:
        """Let the current stream wait for `net`, if `start` has put it on a side stream.

        The allocator must know that the current stream reads the results: in the backward pass the side stream would
        get their memory as soon as autograd lets go of them, while the current stream may still read it.
        """
        if net in self._streams:
            current = torch.cuda.current_stream()
            current.wait_stream(self._streams.pop(net))
            logits, outputs = self._memo[net]
            for result in (logits, *outputs, *([self._embeddings[net]] if net in self._embeddings else [])):
                result.record_stream(current)

    def join_all(self) -> None:
        """Let the current stream wait for every network that `start` has put on a side stream."""
        for net in list(self._streams):
            self.join(net)

    def _run(self, net: nn.Module) -> tuple[Tensor, list[Tensor]]:
        self.join(net)
        if net not in self._memo:
            if net in self._taught:
                raise ValueError("of this network the largest logits alone are given: ask topk()")
            classifier = self._classifiers.get(net)
            if classifier is None:
                self._memo[net] = self._forward(net)
            else:
                classifier.is_on = True
                try:
                    self._memo[net] = self._forward(net)
                finally:
                    classifier.is_on = False
                self._embeddings[net] = classifier.take()
        return self._memo[net]

    def _forward(self, net: nn.Module) -> tuple[Tensor, list[Tensor]]:
        view, whole = self._views.get(net), net.net if isinstance(net, FrozenTeacher) else net
        run = getattr(view, "outputs", view.features) if view else None
        images = self.images
        with nullcontext() if whole is net else torch.no_grad():
            if isinstance(net, FrozenTeacher) and len(images) < net.least_images and not net.batch_statistics:
                images = torch.cat([images, images[:1].expand(net.least_images - len(images), -1, -1, -1)])
            logits, outputs = run(images) if run else (whole(images), [])
            if len(images) > len(self.images):
                logits, outputs = logits[: len(self.images)], [each[: len(self.images)] for each in outputs]
        if not isinstance(logits, Tensor):
            name, kind = type(whole).__name__, type(logits).__name__
            raise UserError(f"{name} returns {kind}, but logits [N, C] are needed; switch off its extra outputs")
        return logits, outputs


def pooled(mine: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps [N, C, H, W], average-pooled to the smaller height and the smaller width of the two."""
    H, W = (min(sizes) for sizes in zip(mine.shape[2:], other.shape[2:], strict=True))
    first, second = (x if x.shape[2:] == (H, W) else F.adaptive_avg_pool2d(x, (H, W)) for x in (mine, other))
    return first, second


def _gradient_if(learns: bool) -> AbstractContextManager[object]:
    return nullcontext() if learns else torch.no_grad()


@functools.cache
def _streams(device: torch.device) -> list[torch.cuda.Stream]:
    """The same streams for all captures: freed memory is reused only within a stream.

    They are made at once, because torch has 32 streams and gives them out in turn: one that is made later may be one
    that is in use already.
    """
    return [torch.cuda.Stream(device) for _ in range(8)]
