"""What more GPUs cost and need, computed: bytes of the gradients, time of their all-reduce, images a second to decode.

    python bench/scripts/scaling.py        the tables of docs/scaling.md; nothing is measured

The bytes are those of FlatGradients, which the trainer sends between its two graphs. A ring all-reduce of B bytes over
W GPUs moves 2 (W - 1) / W * B through every link, and enters and leaves each machine once: the slowest link decides.
"""

from dataclasses import dataclass

import torch

from fastkd import create_model
from fastkd.bench import markdown_table
from fastkd.engine.exchange import FlatGradients

NVLINK = 370e9  # bytes/s per GPU within a machine of 8 H100, by NCCL's ring (NVIDIA/nccl-tests, issue 212)
FAST, SLOW = 400e9, 12.5e9  # bytes/s of a machine's network at line rate: 400 Gb/s per GPU; 100 Gb/s for all 8
DELAY = 20e-6  # seconds of a small all-reduce within a machine, twice that between machines: assumed
GPUS = (1, 8, 64)
PER_MACHINE = 8
JPEGS = 7_500  # images/s of nvJPEG with a GPU's hardware decoder: 7 to 8 thousand are published for an A100


@dataclass(frozen=True)
class Pair:
    """A pair with the estimated time of its step on one H100, in seconds: computed from bytes and operations."""

    name: str
    learners: tuple[str, ...]
    classes: int
    batch: int
    step: float


PAIRS = (
    Pair("kd resnet50 -> resnet18, eager", ("timm/resnet18",), 1000, 256, 29.9e-3),
    Pair("kd resnet50 -> resnet18, fused and compiled", ("timm/resnet18",), 1000, 256, 29.9e-3 / 1.59),
    Pair("kd resnet152 -> resnet50, fused and compiled", ("timm/resnet50",), 1000, 256, 94.8e-3 / 1.51),
    Pair("kd resnet56 -> resnet20, graph", ("resnet20",), 100, 128, 1e-3),
    Pair("dcm wrn_28_10 and wrn_28_10, graph", ("wrn_28_10",) * 2, 100, 128, 60e-3),
)


def block_bytes(pair: Pair) -> int:
    """Bytes that a step sends: the gradients of all networks that learn."""
    with torch.device("meta"):
        nets = [create_model(name, pair.classes) for name in pair.learners]
        blocks = FlatGradients([p for net in nets for p in net.parameters()], torch.device("meta"))
    return sum(block.numel() * block.element_size() for block in blocks.blocks)


def all_reduce(size: int, gpus: int, network: float) -> float:
    """Seconds of an all-reduce of `size` bytes: by its slowest link."""
    if gpus == 1:
        return 0.0
    inside = gpus <= PER_MACHINE
    link = NVLINK if inside else min(NVLINK, network)
    return 2 * (gpus - 1) / gpus * size / link + DELAY * (1 if inside else 2)


def main() -> None:
    rows = []
    for pair in PAIRS:
        size = block_bytes(pair)
        times = [all_reduce(size, gpus, FAST) for gpus in GPUS]
        slow = all_reduce(size, GPUS[-1], SLOW)
        kept = [pair.step / (pair.step + time) for time in (*times[1:], slow)]
        figures = [f"{size / 1e6:.1f}", f"{pair.step * 1e3:.1f}", *(f"{t * 1e3:.2f}" for t in (*times[1:], slow))]
        rows.append([pair.name, *figures, *(f"{share:.0%}" for share in kept)])
    heads = ["step", "gradients MB", "step ms", "8 GPUs: all-reduce ms", "64: ms", "64, slow network: ms", "8: kept"]
    print(markdown_table([*heads, "64: kept", "64, slow: kept"], rows, 8))
    rows = []
    for pair in PAIRS:
        if pair.classes == 1000:
            rate = pair.batch / pair.step
            rows.append([pair.name, *(f"{rate * gpus:,.0f}" for gpus in GPUS), f"{rate / JPEGS:.1f}"])
    print()
    heads = ["step", *(f"{gpus} GPU{'s' * (gpus > 1)}: images/s" for gpus in GPUS), "JPEG decoders per GPU"]
    print(markdown_table(heads, rows, 4))


if __name__ == "__main__":
    main()
