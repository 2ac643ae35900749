"""Two networks seen as gates: where a block of the teacher can stand for one of the student (IAKD)."""

from typing import Literal, NamedTuple

from torch import nn

from ...errors import UserError
from ...models.stages.shapes import output_shapes
from ...models.stages.staged import Staged, staged


class Gate(NamedTuple):
    """Either part takes the features [N, C, H, W] before the gate to those after it."""

    name: str
    student: nn.Module
    teacher: nn.Module
    ends_stage: bool


def gates_of(student: nn.Module, teacher: nn.Module, kind: Literal["stage", "block"]) -> list[Gate]:
    """In forward order, sharing the networks' modules. UserError where the networks cannot be matched.

    "stage": one gate for each stage. "block": one for each of the student's blocks; where the teacher has a multiple of
    them in a stage, consecutive ones form a group.
    """
    ours, theirs = list(staged(student).stages), list(staged(teacher).stages)
    if len(ours) != len(theirs):
        raise UserError(
            f"the student {type(student).__name__} has {len(ours)} stages and the teacher {type(teacher).__name__} "
            f"{len(theirs)}: swapping needs equally many; choose another pair"
        )
    gates = []
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True), 1):
        name = f"stage {number}"
        gates += [Gate(name, mine, other, True)] if kind == "stage" else _block_gates(name, mine, other)
    return gates


def _block_gates(stage: str, mine: nn.Module, other: nn.Module) -> list[Gate]:
    blocks, teachers = _blocks(stage, mine), _blocks(stage, other)
    size, left = divmod(len(teachers), len(blocks))
    if left or not size:
        raise UserError(
            f"{stage}: the student has {len(blocks)} blocks, the teacher {len(teachers)}, which is no multiple of it: "
            "use --gates stage, or another pair"
        )
    groups = [nn.Sequential(*teachers[i * size : (i + 1) * size]) for i in range(len(blocks))]
    return [
        Gate(f"{stage}, block {i + 1}", block, group, i + 1 == len(blocks))
        for i, (block, group) in enumerate(zip(blocks, groups, strict=True))
    ]


def _blocks(stage: str, part: nn.Module) -> list[nn.Module]:
    if type(part).forward is not nn.Sequential.forward:
        raise UserError(f"{stage} is a {type(part).__name__}, not a sequence of blocks: use --gates stage")
    return list(part)


def gate_shapes(student: nn.Module, teacher: nn.Module, gates: list[Gate], size: int = 64) -> list[tuple]:
    """For every gate ((C, H, W) before, after) of the student, then of the teacher, for an image [3, size, size]."""
    ours, theirs = (
        output_shapes(net, [staged(net).stem, *parts], size)
        for net, parts in ((student, [g.student for g in gates]), (teacher, [g.teacher for g in gates]))
    )
    return [((ours[i], ours[i + 1]), (theirs[i], theirs[i + 1])) for i in range(len(gates))]


def adapters(student: nn.Module, teacher: nn.Module, gates: list[Gate], allowed: bool) -> nn.ModuleList:
    """[before, after] for every gate: 1x1 convolution and BN where the channels differ, else nothing.

    UserError, with gate and shapes, where they differ and are not `allowed`, and where H x W differ.
    """
    pairs = nn.ModuleList()
    for gate, (ours, theirs) in zip(gates, gate_shapes(student, teacher, gates), strict=True):
        sizes_agree = all(a[1:] == b[1:] for a, b in zip(ours, theirs, strict=True))
        if ours != theirs and not (allowed and sizes_agree):
            hint = "use --adapters, or another pair" if sizes_agree else "choose a pair of equal H x W at every gate"
            raise UserError(
                f"{gate.name}: the student's block takes {_named(ours)} and the teacher's {_named(theirs)} (C x H x W "
                f"for a 64 x 64 image), so they cannot be swapped; {hint}"
            )
        pairs.append(nn.ModuleList([_adapter(ours[0][0], theirs[0][0]), _adapter(theirs[1][0], ours[1][0])]))
    return pairs


def _named(shapes: tuple) -> str:
    return " to ".join(" x ".join(map(str, shape)) for shape in shapes)


def adapted(gates: list[Gate], pairs: nn.ModuleList) -> list[Gate]:
    """Gates whose teacher's part has its adapters around it; it shares their modules."""
    return [
        gate
        if all(isinstance(adapter, nn.Identity) for adapter in pair)
        else gate._replace(teacher=nn.Sequential(pair[0], gate.teacher, pair[1]))
        for gate, pair in zip(gates, pairs, strict=True)
    ]


def _adapter(cin: int, cout: int) -> nn.Module:
    if cin == cout:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(cin, cout, 1, bias=False), nn.BatchNorm2d(cout))


class Swapped(nn.Module):
    """The student along one path: at gate i its own part where `own[i]`, else the teacher's. Not for registering."""

    def __init__(self, view: Staged, gates: list[Gate], own: tuple[bool, ...]):
        super().__init__()
        self.__dict__.update(view=view, gates=gates, own=own)

    def features(self, images):
        """Images [N, 3, H, W] -> logits [N, classes] and the output of every stage, as Staged.features."""
        x, taps = self.view.stem(images), []
        for gate, own in zip(self.gates, self.own, strict=True):
            x = gate.student(x) if own else gate.teacher(x)
            taps += [x] if gate.ends_stage else []
        return self.view.head(x), taps
