"""Every method on small networks and digits of 16 x 16 pixels: what the contract tests and their DDP worker share."""

import functools
from dataclasses import fields

import torch
from torch import nn
from torch.nn.functional import avg_pool2d
from torch.nn.modules.batchnorm import _BatchNorm

from fastkd import create_model
from fastkd.data.digits import read_digits
from fastkd.methods import METHODS, FrozenTeacher, Method, RunContext, find_method

MORE = {
    "kd+dml": {},
    "iekd+kd": {},
    "sokd+dkd": {},
    "iakd+at": {},
    "dml --alternate": {"alternate": True},
    "sokd --teacher-bn batch": {"teacher_bn": "batch", "bridge_init": "teacher"},
    "iakd --teacher-bn batch": {"teacher_bn": "batch", "kd_weight": 0.5},
}


def parts_of(name: str) -> list[str]:
    return name.split()[0].split("+")


NAMES = [*METHODS, *(name for name in MORE if set(parts_of(name)) <= set(METHODS))]
# Losses that relate the images of a batch: that of a batch is not the mean over its parts.
RELATIONAL = {"dist", "rkd", "sp"} & set(METHODS)
CHEAP = {"ae_epochs": 1}
NETWORKS = {"student": "resnet8", "peer1": "resnet8", "improved_teacher": "resnet14"}


@functools.cache
def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    images, target = read_digits()
    small = avg_pool2d(images[:, None], 2)
    return ((small - small.mean()) / small.std()).expand(-1, 3, -1, -1), target


def batch(number: int, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    images, target = (part[number * size : (number + 1) * size] for part in _digits())
    return images.contiguous(memory_format=torch.channels_last), target.clone()


class Loader:
    """Two batches, for what a method prepares."""

    classes, samples = tuple("0123456789"), 32

    def __len__(self):
        return 2

    def __iter__(self):
        return iter([batch(0), batch(1)])

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@functools.cache
def _taught() -> dict:
    """A teacher that knows the first 64 digits."""
    torch.manual_seed(99)
    net = create_model("resnet14", 10)
    for norm in (module for module in net.modules() if isinstance(module, _BatchNorm)):
        norm.momentum = 0.3
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for number in range(30):
        images, target = batch(number % 2, 32)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), target).backward()
        optimizer.step()
    return net.state_dict()


def kind_of(name: str) -> type[Method]:
    return find_method(name.split()[0])


def build(name: str, seed: int = 0, taught: bool = True) -> Method:
    kind = kind_of(name)
    torch.manual_seed(7)
    teacher = create_model("resnet14", 10) if kind.needs_teacher else None
    if teacher and taught:
        teacher.load_state_dict(_taught())
    torch.manual_seed(seed)
    student = create_model("resnet8", 10)
    peers = [create_model("resnet8", 10)] if kind.needs_peers else []
    names = {option.name for option in fields(kind.Options)}
    prefixes = ("", *(f"{part}_" for part in parts_of(name)))
    cheap = {f"{prefix}{option}": value for prefix in prefixes for option, value in CHEAP.items()}
    options = {option: value for option, value in cheap.items() if option in names} | MORE.get(name, {})
    if "iakd" in parts_of(name):  # so that blocks are swapped in within a few steps
        options["iakd_p" if "iakd_p" in names else "p"] = (0.8,)
    method = kind(student, teacher, kind.Options(**options), peers)
    return method.to(memory_format=torch.channels_last).train()


def prepare(method: Method, folder=None, **run) -> None:
    torch.manual_seed(3)
    method.prepare(
        Loader(), RunContext(**{"epochs": 10, "steps_per_epoch": 2, "drops": (4.0, 8.0), "folder": folder} | run)
    )
    method.train()


def freeze_statistics(method: Method) -> None:
    """BatchNorm in eval mode: nothing couples the images of a batch, so that its gradient is the mean over parts."""
    for module in method.modules():
        if isinstance(module, (_BatchNorm, FrozenTeacher)):
            module.eval()
