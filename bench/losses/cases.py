"""The benchmark cases: each loss of fastkd at usual shapes, beside other ways to compute it.

Logits and maps are random, in bf16 on CUDA and in fp32 on the CPU. Maps are channels-last, as in fastkd's training.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastkd import kernels
from fastkd.bench.losses import baselines
from fastkd.data.base import IMAGENET_MEAN, IMAGENET_STD
from fastkd.environment import has

Function = Callable[..., Tensor]
COMPILED = "fastkd compile"  # the way whose baseline is "compile"


@dataclass(frozen=True, eq=False)
class Case:
    """One operation at one shape."""

    name: str  # operation and shape
    make: Callable[[torch.device, torch.dtype], list[Tensor]]  # the tensors that every way takes
    fastkd: Function
    eager: Function  # in eager torch; it is also compiled, and in float64 it is the reference
    learners: int  # so many tensors, counted from the first, get a gradient
    others: dict[str, Function] = field(default_factory=dict)  # further baselines by name


def ways(case: Case, compiled: bool = True) -> dict[str, Function]:
    """The functions to compare by name, fastkd first. Compilation begins with the first call."""
    torch._dynamo.reset()  # after 8 shapes of one function torch would silently use the eager one
    found = {"fastkd": case.fastkd, "eager": case.eager}
    if compiled:
        found[COMPILED] = torch.compile(case.fastkd, dynamic=False, fullgraph=True)
        found["compile"] = torch.compile(case.eager, dynamic=False)
    return {**found, **case.others}


def cases(device: torch.device) -> list[Case]:
    """All cases; CUDA has larger ones."""
    cuda = device.type == "cuda"
    sizes = [(128, 100), (256, 1000), (1024, 1000), (256, 21841)] + [(4096, 1000), (8192, 32000)] * cuda
    factors = [(128, 32, 8, 8), (64, 256, 7, 7), (256, 256, 7, 7)]
    batch, shape = 256 if cuda else 32, (64, 256, 14, 14)
    stages = [(batch, 256 * 2**i, 56 // 2**i, 56 // 2**i) for i in range(4)]  # of a ResNet-50 at 224 px
    liger = {"liger": baselines.kd_liger} if cuda and has("liger_kernel") else {}
    return [
        *(Case(f"KD {N} x {C}", partial(logits, 2, N, C), lambda *z: kernels.kd_loss(*z).loss, baselines.kd, 1, liger)
          for N, C in sizes),
        *(dcm_case(K, N, C) for N, C in [(128, 100), (256, 1000) if cuda else (128, 1000)] for K in (3, 4)),
        *(Case(f"IE-KD pair {' x '.join(map(str, shape))}", partial(factor_maps, shape),
               lambda near, far, t: kernels.factor_distance([near, far], t, [1.0, -1.0]).loss, baselines.factor_pair, 2)
          for shape in factors),
        Case(f"AT ResNet-50 stages, batch {batch}", partial(maps, 2, stages), fused_attention,
             baselines.attention_transfer, 4),
        Case("hint 64 x 256 x 14 x 14", partial(maps, 2, [shape]), kernels.hint_distance, baselines.hint, 1),
        Case("overhaul 64 x 256 x 14 x 14", partial(margin_maps, shape), kernels.overhaul_distance,
             baselines.overhaul, 1),
        Case("DKD 256 x 1000", partial(logits, 2, 256, 1000), kernels.dkd_loss, baselines.dkd, 1),
        Case("DIST 256 x 1000", lambda *where: logits(2, 256, 1000, *where)[:2], kernels.dist_loss, baselines.dist, 1),
        Case(f"augment {batch} x 256 x 256 to 224", partial(photos, batch), fused_augment, baselines.augment, 0,
             {"one by one": baselines.augment_one_by_one}),
    ]  # fmt: skip


def dcm_case(K: int, N: int, C: int) -> Case:
    """K heads in each of two networks."""
    ones, table = [1.0] * (2 * K), [[float((i < K) != (j < K)) for j in range(2 * K)] for i in range(2 * K)]
    make, name = partial(logits, 2 * K, N, C), f"DCM 2 x {K} heads {N} x {C}"
    return Case(name, make, lambda *z: kernels.logit_loss(list(z[:-1]), z[-1], ones, table).loss, baselines.dcm, 2 * K)


def fused_attention(*maps: Tensor) -> Tensor:
    return baselines.add(kernels.attention_transfer(s, t) for s, t in zip(maps[:4], maps[4:], strict=True))


def fused_augment(images: Tensor, boxes: Tensor, flips: Tensor, out: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    kernels.augment(images, boxes, flips, [out], [IMAGENET_MEAN], [IMAGENET_STD])
    return out


def logits(heads: int, N: int, C: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """[N, C] for each head, and the labels [N]."""
    generator = torch.Generator(device).manual_seed(0)
    drawn = [3 * torch.randn(N, C, device=device, generator=generator).to(dtype) for _ in range(heads)]
    return [*drawn, torch.randint(C, (N,), device=device, generator=generator)]


def maps(count: int, shapes: Sequence[tuple[int, ...]], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """`count` rounds of one map of each shape: the student's, then the teacher's."""
    generator = torch.Generator(device).manual_seed(0)
    drawn = (torch.randn(s, device=device, generator=generator) for _ in range(count) for s in shapes)
    return [x.to(dtype, memory_format=torch.channels_last) for x in drawn]


def factor_maps(shape: tuple[int, ...], *where: Any) -> list[Tensor]:
    """The inheriting factor resembles the teacher's: otherwise the two distances would cancel out."""
    inheriting, exploring, teacher = maps(3, [shape], *where)
    return [inheriting + teacher, exploring, teacher]


def margin_maps(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Maps of student and teacher, and a negative margin for each channel."""
    margin = -torch.rand(shape[1], device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
    return [*maps(2, [shape], device, dtype), margin]


def photos(N: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Images of noise, boxes, flips, the batch to fill, mean and standard deviation."""
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randint(256, (N, 256, 256, 3), dtype=torch.uint8, device=device, generator=generator)
    sides = torch.randint(80, 257, (N, 2), device=device, generator=generator)
    edges = torch.rand(N, 2, device=device, generator=generator)
    boxes = torch.cat([((257 - sides) * edges).long(), sides], dim=1)
    out = torch.empty(N, 3, 224, 224, device=device, dtype=dtype, memory_format=torch.channels_last)
    statistics = (torch.tensor(three, device=device) for three in (IMAGENET_MEAN, IMAGENET_STD))
    flips = torch.rand(N, device=device, generator=generator) < 0.5
    return [images, boxes, flips, out, *statistics]
