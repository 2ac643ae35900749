"""What test_processes.py runs in one process and in two: gradients, synchronised BatchNorm, and evaluation."""

import copy
import sys
from pathlib import Path

import torch
from every_method import batch, build, freeze_statistics, prepare
from tiny import TinyNet

from fastkd import Trainer, TrainOptions, distributed
from fastkd.data.order import evaluation_slices
from fastkd.engine import Step
from fastkd.engine.mixup import Mixup
from fastkd.engine.precision import Precision
from fastkd.evaluate import evaluate_networks
from fastkd.methods import KD

CPU = torch.device("cpu")
SUMS = ("kd", "dcm", "iakd", "sokd", "mixup", "dkd", "at")  # the loss of a batch is a mean over its images
OF_A_BATCH = ("rkd", "dist", "sp")  # it is not
SYNCED = ("kd", "iakd --teacher-bn batch", "sokd")
IMAGES, ON_RANK_0 = 11, 6  # of a step, in all, and on the first of two processes


def share(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The images of this process: all of them, or 6 and 5."""
    if distributed.world_size() == 1:
        return list(tensors)
    return [tensor.split([ON_RANK_0, len(tensor) - ON_RANK_0])[distributed.rank()] for tensor in tensors]


def data(number: int, mixes: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of 11 images in fp64; with `mixes` the images of all processes are mixed as the trainer does."""
    images, target = (part[:IMAGES] for part in batch(number))
    samples = torch.arange(IMAGES)
    images, target, samples = share(images, target, samples)
    if mixes:
        images, target = Mixup(0.4, 1.0, 0.1, 10)(images, target, 0, samples)
    return images.double(), target


def make(name: str, frozen: bool, **options) -> tuple:
    method = build(name.replace("mixup", "kd"), seed=5)
    method.double()
    if method.teacher:
        method.teacher.net.double()
    step = Step(method, TrainOptions(lr=0.02, weight_decay=0.5, **options), CPU)
    prepare(method)
    if frozen:
        freeze_statistics(method)
    return method, step


def gradient(name: str, images: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of each weight, that of a step of `name` on these images of this process, averaged over the processes."""
    method, step = make(name, frozen=True)
    step.agree(len(images))
    step.gradients(images, target, method.plans(0)[0])
    step.exchange()
    if step.processes:
        step.processes.average(step.parameters)
    return {key: p.grad.clone() for key, p in method.named_parameters() if p.grad is not None}


def trained(name: str, **options) -> dict:
    """Four steps with BatchNorm in train mode: the state of the networks and of their averages."""
    method, step = make(name, frozen=False, ema_decay=0.5, **options)
    for number in range(4):
        for plan in method.plans(number):
            step(*data(number), plan)
    step.average_buffers()
    return copy.deepcopy({"networks": step.networks()["student"].state_dict(), "method": method.state_dict()})


def evaluated(images: int) -> dict[str, float]:
    """Two networks on so many images in batches of 2; a process may have none."""
    torch.manual_seed(0)
    networks = {"student": TinyNet(8), "peer1": TinyNet(8)}
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(images, 3, 8, 8, generator=generator)
    target = torch.randint(8, (images,), generator=generator)
    slices = evaluation_slices(images, 2, distributed.rank(), distributed.world_size())
    loader = [(pictures[a:b], target[a:b]) for a, b in slices]
    return evaluate_networks(networks, loader, Precision("float32", CPU))


class Images:
    """24 images, of which each process has its half, in batches of 5: the last has 2. A Loader of the caller."""

    classes, samples = tuple("0123"), 24

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.images, self.target = torch.randn(24, 3, 8, 8, generator=generator), torch.arange(24) % 4
        self.epoch = 0

    def __len__(self):
        return -(-24 // distributed.world_size() // 5)

    def __iter__(self):
        order = torch.randperm(24, generator=torch.Generator().manual_seed(self.epoch))
        self.epoch += 1
        for part in order.chunk(distributed.world_size())[distributed.rank()].split(5):
            yield self.images[part], self.target[part]

    def state_dict(self):
        return {"epoch": self.epoch}

    def load_state_dict(self, state):
        self.epoch = state["epoch"]


def from_a_short_batch() -> tuple[dict, dict]:
    """An epoch of three steps; and one that goes on, from a state of its step 2, with the last and short batch."""
    states: list[dict] = []
    half: dict = {}
    for first in (0, 2):
        torch.manual_seed(0)
        student, teacher = TinyNet(), TinyNet()
        step = Step(KD(student, teacher), TrainOptions(lr=0.1), CPU)
        if first:
            step.load_state_dict(half)
        for number, (images, target) in enumerate(Images()):
            if number == 2 and not first:
                half |= copy.deepcopy(step.state_dict())
            if number >= first:
                step(images, target)
        states.append(copy.deepcopy(student.state_dict()))
    return states[0], states[1]


def run(folder: Path) -> list[dict]:
    """The whole loop with --sync-bn: it runs, and all processes end with the same student."""
    torch.manual_seed(0)
    options = TrainOptions(epochs=2, lr=0.05, out=str(folder / "run"), sync_bn=True, deterministic=True)
    return Trainer(KD(TinyNet(), TinyNet()), Images(), Images(), options).fit().history


def results(folder: Path) -> dict:
    torch.set_num_threads(1)
    half = {name: gradient(name, *data(0, mixes=name == "mixup")) for name in (*SUMS, *OF_A_BATCH)}
    return {
        "gradient": half,
        "synced": {name: trained(name, sync_bn=True) for name in SYNCED},
        "own": trained("kd"),
        "scores": {images: evaluated(images) for images in (1, 7, 13)},
        "short": from_a_short_batch(),
        "history": run(folder),
    }


if __name__ == "__main__":
    distributed.device_for("cpu")
    torch.save(results(Path(sys.argv[1])), Path(sys.argv[1]) / f"rank{distributed.rank()}.pt")
    torch.distributed.destroy_process_group()
