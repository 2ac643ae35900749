"""What the teacher says of each batch of a run: read from a cache, or asked and written there."""

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ..data.base import EpochLoader, Loader
from ..errors import UserError
from ..methods.base import Method
from ..methods.forwards import ForwardCache, Taught
from .cache import TeacherCache

LEAST = 32
"""Images that a teacher gets at least on the CPU, where the logits of an image are to be the same in every batch.
Measured with resnet8, resnet20 and timm/resnet18, oneDNN: for up to 13 images other kernels may run, whose last bits
differ. From 17 images on, and in any order, an image has the same bits."""


class Lessons:
    """`lessons(images, samples)` gives the `taught` of a step: (logits [N, C],) or (values, classes), on the device.

    In an epoch whose view is complete they are read. In any other the method's teacher is run; what it says is written
    while the next step runs, and the step gets it as the cache gives it later, rounded if the cache rounds.
    `autocast`: that of the training step. Reading takes 0.9 ms for 256 images of 1,000 classes in fp16 on one core, so
    that no thread reads ahead: on a GPU it passes while the device is at work on the step before.
    """

    def __init__(self, cache: TeacherCache, method: Method, autocast: Callable[[], AbstractContextManager]):
        self.cache, self.method, self.autocast = cache, method, autocast
        self.view, self.reads = -1, False
        self._waiting: deque[tuple[Tensor, tuple[Tensor, ...], torch.cuda.Event | None]] = deque()

    def start(self, view: int) -> None:
        """Begin an epoch with this view. Every process must call it."""
        self.view, self.reads = view, self.cache.is_complete(view)
        if not self.reads:
            self.cache.begin(view)

    def __call__(self, images: Tensor, samples: Tensor) -> Taught:
        if not self.reads:
            return self._ask(images, samples)
        taught = self.cache.read(self.view, samples)
        if images.is_cuda:
            return tuple(each.pin_memory().to(images.device, non_blocking=True) for each in taught)
        return taught

    def flush(self) -> None:
        """Bring what was asked so far to the disk: a state of the run that is saved now counts on it."""
        if not self.reads:
            self._write(0)
            self.cache.flush()

    def finish(self) -> None:
        """End the epoch: all of its rows are on the disk. Every process must call it."""
        if not self.reads:
            self._write(0)
            self.cache.finish(self.view)

    def _ask(self, images: Tensor, samples: Tensor) -> Taught:
        with self.autocast():
            logits = ForwardCache(images, self.method.staged_views_for(None))(self.method.teacher)
        encoded, event = self.cache.rows.encode(logits), None
        if images.is_cuda:
            held = tuple(torch.empty_like(each, device="cpu", pin_memory=True) for each in encoded)
            for host, each in zip(held, encoded, strict=True):
                host.copy_(each, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            held = encoded
        self._waiting.append((samples, held, event))
        self._write(1)
        return self.cache.rows.taught(encoded)

    def _write(self, keep: int) -> None:
        """Write what was asked before, but for the last `keep` batches: the device is still at work on them."""
        while len(self._waiting) > keep:
            samples, held, event = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            self.cache.write(samples, self.cache.rows.pack(held))


def check_lessons(method: Method, loader: Loader, cache: TeacherCache, mixes: bool) -> None:
    """Raise UserError if the method needs more of its teacher than logits, or the loader's images are not the cache's.

    `mixes`: the images will be mixed by mixup or CutMix.
    """
    if not method.uses_logits_alone:
        raise UserError(
            f"method {type(method).__name__} needs more of its teacher than the logits, which is what a teacher cache "
            "holds; use kd, hardkd, dkd or dist, or no cache"
        )
    for part in method.modules():
        if cache.rows.topk and isinstance(part, Method):
            _check_topk(part, cache)
    if not isinstance(loader, EpochLoader):
        raise UserError(
            f"a teacher cache needs to know which images a batch has: train_loader ({type(loader).__name__}) is not "
            "one of fastkd's; make it by fastkd.data.create_loaders, or train without the cache"
        )
    ours = {"views": loader.shard.views, "samples": loader.samples, "classes": len(loader.classes)}
    theirs = {"views": cache.manifest.views, "samples": cache.manifest.samples, "classes": cache.rows.classes}
    if ours != theirs:
        raise UserError(f"the teacher cache {cache.folder} has {theirs}, and train_loader {ours}: they must be equal")
    if mixes and not loader.shard.paired:
        raise UserError(
            "mixup or cutmix with a teacher cache: train_loader does not keep the same partners in each epoch of a "
            "view; make it with paired=True"
        )


def _check_topk(method: Method, cache: TeacherCache) -> None:
    """Raise UserError if a method, or one of a sum, has options for which the largest logits are not enough."""
    name, temperature = type(method).__name__, getattr(method.options, "temperature", None)
    if getattr(method.options, "standardize", False):
        raise UserError(
            f"{name} with standardize needs the mean and the deviation of all logits, and the teacher cache "
            f"{cache.folder} holds the {cache.rows.topk} largest; use whole logits, topk 0"
        )
    if method.takes_topk and temperature not in (None, cache.rows.temperature):
        raise UserError(
            f"{name} has temperature {temperature:g}, and the teacher cache {cache.folder} is for "
            f"{cache.rows.temperature:g}: the share of the other classes holds for one temperature; give both the same"
        )


def same_bits(method: Method) -> None:
    """On the CPU: let the logits of an image depend on the image alone, not on the size of its batch."""
    if method.teacher is not None:
        method.teacher.least_images = LEAST
