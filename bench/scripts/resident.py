"""Small images: the resident loader against torchvision's pipeline for CIFAR, and its share of a training step.

    python bench/scripts/resident.py
    python bench/scripts/resident.py --rounds 9 --json bench/results/resident.json

    resident      fastkd's loader: uint8 in memory; cropped, mirrored and normalised there
    torchvision   what users write: PIL images as datasets.CIFAR10 gives them, RandomCrop(32, padding=4,
                  padding_mode="reflect"), RandomHorizontalFlip, ToTensor, Normalize in a DataLoader's workers
    step          forward, backward and SGD of resnet8, fp32, on one batch that is there already

The images are noise, 32 x 32, in a CIFAR's number of bytes each. The three take turns in each round; a round measures
whole epochs of `--images`. The consumer does nothing with the batches. Workers persist and have started.
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from fastkd.bench import environment, script_parser, show_table, summary, write_json
from fastkd.data.order import Shard
from fastkd.data.resident import Augmentation, ResidentLoader, ResidentSet
from fastkd.models import create_model

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)  # CIFAR-10's


class Pictures(Dataset):
    """As torchvision.datasets.CIFAR10: an image is made from its array and transformed when it is asked for."""

    def __init__(self, images: Tensor, transform: Callable[[Image.Image], Tensor]):
        self.images, self.transform = images.numpy(), transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), index % 10


def torchvision_loader(images: Tensor, batch_size: int, workers: int) -> DataLoader:
    steps = [transforms.RandomCrop(32, padding=4, padding_mode="reflect"), transforms.RandomHorizontalFlip()]
    pictures = Pictures(images, transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(MEAN, STD)]))
    return DataLoader(pictures, batch_size, shuffle=True, num_workers=workers, persistent_workers=True)


def resident_loader(images: Tensor, batch_size: int) -> ResidentLoader:
    held = ResidentSet(tuple("0123456789"), images, torch.arange(len(images)) % 10)
    augmentation, device = Augmentation("pad-crop", 4, "reflect", True), torch.device("cpu")
    return ResidentLoader(
        held, augmentation, batch_size, device, Shard(), train=True, mean=MEAN, std=STD, image_size=32
    )


def train_step(batch_size: int) -> Callable[[], None]:
    model = create_model("resnet8", num_classes=10).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(batch_size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    target = torch.arange(batch_size) % 10

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), target).backward()
        optimizer.step()

    return step


def seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds per batch, one number a round; the steps are as many as the batches."""
    images = torch.randint(256, (args.images, 32, 32, 3), dtype=torch.uint8)
    ours, step = resident_loader(images, args.batch_size), train_step(args.batch_size)
    theirs = torchvision_loader(images, args.batch_size, args.workers)
    ways: list[tuple[str, Callable[[], Any], int]] = [
        ("resident", lambda: [None for _ in ours], len(ours)),
        ("torchvision", lambda: [None for _ in theirs], len(theirs)),
        ("step", lambda: [step() for _ in range(20)], 20),
    ]
    found: dict[str, list[float]] = {name: [] for name, _, _ in ways}
    for turn in range(args.rounds + 1):
        for name, action, batches in ways:
            taken = seconds(action) / batches * 1000
            if turn:  # the first round starts workers and fills caches
                found[name].append(taken)
    return found


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="of the DataLoader")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--json", help="where to write the figures")
    args = parser.parse_args()
    figures = {name: summary(values) for name, values in measure(args).items()}
    ms = {name: figure["median"] for name, figure in figures.items()}
    ratios = {"faster_than_torchvision": ms["torchvision"] / ms["resident"], "of_a_step": ms["resident"] / ms["step"]}
    keys = ("median", "p20", "p80", "n")
    rows = [
        [name, *(f"{row[key]:.2f}" for key in keys[:3]), f"{row['n']:.0f}", f"{args.batch_size / ms[name] * 1000:.0f}"]
        for name, row in figures.items()
    ]
    threads, cpus = torch.get_num_threads(), len(os.sched_getaffinity(0))
    print(f"{args.images} images of 32 px, batch {args.batch_size}, {threads} threads, {cpus} CPUs")
    show_table(["", "ms a batch, median", "p20", "p80", "n", "img/s"], rows, numbers=5)
    print(
        f"resident is {ratios['faster_than_torchvision']:.1f}x as fast as torchvision and takes "
        f"{ratios['of_a_step']:.1%} of a resnet8 step"
    )
    if args.json:
        write_json(args.json, {"environment": environment(), "options": vars(args), "ms": figures} | ratios)


if __name__ == "__main__":
    main()
