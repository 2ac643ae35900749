"""What a step is measured on: a method, its networks, and a batch of noise.

The teacher is not trained. Its BatchNorm statistics are those of noise: without them the maps of a deep, untrained
network grow from layer to layer until nothing can be compared.
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from fastkd.data import DataOptions
from fastkd.data.order import ONE_PROCESS
from fastkd.data.synthetic import SyntheticLoader
from fastkd.engine.precision import Precision
from fastkd.errors import UserError
from fastkd.methods import find_method
from fastkd.methods.base import Method
from fastkd.methods.context import RunContext
from fastkd.models import create_model

Plans = tuple[Hashable, ...]  # of the updates that are made with one batch
CYCLE = 4  # steps in turn, if the method draws something for each step
SETTLE = 32  # images from which the teacher's statistics are taken, at most


@dataclass(frozen=True)
class Workload:
    """A method, its networks and the size of the batch.

    A size of 0 becomes the usual one: 32 px and 100 classes, or for networks of timm and torchvision 224 px and 1000.
    Raises UserError for values that are not possible.
    """

    method: str = "kd"
    teacher: str = "resnet56"
    student: str = "resnet20"
    peers: tuple[str, ...] = ()
    batch_size: int = 0
    image_size: int = 0
    classes: int = 0

    def __post_init__(self) -> None:
        with _naming("--method", self.method):
            find_method(self.method)
        least = {"batch_size": 2, "image_size": 16, "classes": 2}
        for name, value in least.items():
            if getattr(self, name) and getattr(self, name) < value:
                raise UserError(f"--{name.replace('_', '-')} must be {value} or more, got {getattr(self, name)}")
        if self.peers and not self.kind.needs_peers:
            raise UserError(f"--peers {' '.join(self.peers)}: method {self.method} trains the student alone")

    @property
    def kind(self) -> type[Method]:
        return find_method(self.method)

    @property
    def name(self) -> str:
        """Such as "kd resnet56 -> resnet20"."""
        others = (self.teacher,) * self.kind.needs_teacher
        learners = " | ".join((self.student, *self.peers))
        return f"{self.method} {' '.join((*others, '->'))} {learners}" if others else f"{self.method} {learners}"

    def filled(self, device: torch.device) -> "Workload":
        """With the usual sizes, and with a peer of the student's kind if one is needed and none is given."""
        large, cuda = "/" in self.student, device.type == "cuda"
        return replace(
            self,
            peers=self.peers or (self.student,) * self.kind.needs_peers,
            batch_size=self.batch_size or ((256 if large else 128) if cuda else (8 if large else 32)),
            image_size=self.image_size or (224 if large else 32),
            classes=self.classes or (1000 if large else 100),
        )

    def batch(self, device: torch.device, amp_dtype: str = "auto") -> tuple[Tensor, Tensor]:
        """Images [N, 3, H, W], channels-last, in the dtype of the run, and labels [N] int64: noise, no zeros."""
        random = torch.Generator(device).manual_seed(0)
        shape = (self.batch_size, 3, self.image_size, self.image_size)
        images = torch.randn(shape, generator=random, device=device)
        target = torch.randint(self.classes, (self.batch_size,), generator=random, device=device)
        return images.to(Precision(amp_dtype, device).dtype, memory_format=torch.channels_last), target

    def build(self, device: torch.device) -> Method:
        """The method on `device`, in fp32 and channels-last, ready for its first step."""
        kind, (images, target) = self.kind, self.batch(device)
        student = self._network("--student", self.student)
        peers = [self._network("--peers", name, number) for number, name in enumerate(self.peers, 1)]
        teacher = self._network("--teacher", self.teacher).to(device).eval() if kind.needs_teacher else None
        if teacher is not None:
            update_bn([images[:SETTLE].float()], teacher)
        # auto-encoders train for one epoch: their time is not measured
        epochs = {option.name: 1 for option in fields(kind.Options) if option.name.endswith("ae_epochs")}
        torch.manual_seed(0)
        method = kind(student, teacher, kind.Options(**epochs), peers).to(device).to(memory_format=torch.channels_last)
        run = RunContext(epochs=100, steps_per_epoch=1000, drops=(50.0,), device=device)
        images, target = images[:SETTLE].float(), target[:SETTLE]
        one_batch = SyntheticLoader(
            (images[None], target[None]), len(images), DataOptions(batch_size=SETTLE), ONE_PROCESS, train=False
        )
        method.prepare(one_batch, run)
        return method.train()

    def _network(self, option: str, name: str, number: int = 0) -> nn.Module:
        torch.manual_seed(number)
        with _naming(option, name):
            return create_model(name, self.classes, image_size=self.image_size or None)


@contextmanager
def _naming(option: str, value: str) -> Iterator[None]:
    """Put the option before the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{option} {value}: {error}") from None


def cycle(method: Method) -> list[Plans]:
    """The plans of the steps to run in turn: one step, or CYCLE of them if the method draws a plan for each."""
    steps = [tuple(method.plans(number)) for number in range(CYCLE)]
    return steps[:1] if len(set(steps)) == 1 else steps


R18, R34, R50, R152 = (f"timm/resnet{depth}" for depth in (18, 34, 50, 152))
CIFAR = [
    Workload("kd", "resnet56", "resnet20"),
    Workload("iekd", "resnet56", "resnet20"),
    Workload("sokd", "wrn_40_2", "wrn_40_1"),
    Workload("dcm", "", "wrn_28_10", ("wrn_28_10",)),
    Workload("iakd", "resnet44", "resnet26"),
]  # batch 128, 32 px
IMAGENET = [
    Workload("kd", R50, R18),
    Workload("kd", R152, R50),
    *(Workload(method, R34, R18) for method in ("kd", "iakd", "iekd", "sokd")),
    Workload("dcm", "", R18, (R34,)),
]  # batch 256, 224 px
