"""The shapes of a network's stage outputs: methods build modules for them and compare two networks by them."""

from collections.abc import Sequence

import torch
from torch import nn

from ...errors import UserError
from .staged import staged

SIZE = 64  # pixels; shapes in error messages are for images of this size
Shapes = list[tuple[int, ...]]


def stage_shapes(net: nn.Module, size: int = SIZE) -> Shapes:
    """[(C, H, W)] of every stage's output for an image [3, size, size]. Weights and statistics stay as they are."""
    view = staged(net)
    return output_shapes(net, [view.stem, *view.stages], size)[1:]


@torch.no_grad()
def output_shapes(net: nn.Module, modules: Sequence[nn.Module], size: int = SIZE) -> Shapes:
    """[(C, H, W)] of the outputs of these modules of `net`, which run one after another on an image."""
    modes = {module: module.training for module in net.modules()}
    first = next(net.parameters())
    x, shapes = torch.zeros(1, 3, size, size, dtype=first.dtype, device=first.device), []
    net.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            for module in modules:
                x = module(x)
                shapes.append(tuple(x.shape[1:]))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return shapes


def check_stage_shapes(
    student: nn.Module, teacher: nn.Module, method: str, stage: int | None = None
) -> tuple[Shapes, Shapes]:
    """[(C, H, W)] of the student's stages and of the teacher's.

    Raises UserError unless H x W is equal at every stage, or, if `stage` is given, at the stage with that index.
    `method` is the name in the message.
    """
    ours, theirs = stage_shapes(student), stage_shapes(teacher)
    where, another = "every stage", ""
    if stage is not None:
        where = "the last stage" if stage == -1 else f"stage {stage + 1}"
        another = "" if stage == -1 else "another stage, "
    compared = [shapes if stage is None else [shapes[stage]] for shapes in (ours, theirs)]
    if [shape[1:] for shape in compared[0]] != [shape[1:] for shape in compared[1]]:
        listed = [", ".join("x".join(map(str, shape)) for shape in shapes) for shapes in (ours, theirs)]
        raise UserError(
            f"{method} compares maps of equal height and width at {where}; for {SIZE} x {SIZE} images the stages "
            f"(C x H x W) of the student {type(student).__name__} are {listed[0]}, those of the teacher "
            f"{type(teacher).__name__} {listed[1]}: use networks with equal resolutions, {another}or a method without "
            "maps (kd, dkd, dist, rkd, sp)"
        )
    return ours, theirs
