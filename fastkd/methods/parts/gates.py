"""Gates of IAKD: the places where a block of the teacher can replace a block of the student."""

from typing import Literal, NamedTuple, cast

from torch import Tensor, nn

from ...errors import UserError
from ...models.stages.staged import Shapes, Staged, output_shapes, staged


class Gate(NamedTuple):
    """Two modules with the same input and output: the features [N, C, H, W] before and after the gate."""

    name: str
    student: nn.Module
    teacher: nn.Module
    ends_stage: bool


def gates_of(student: nn.Module, teacher: nn.Module, kind: Literal["stage", "block"]) -> list[Gate]:
    """The gates in forward order, made of the networks' modules. Raises UserError if the networks do not match.

    "stage": one gate per stage. "block": one gate per block of the student. If the teacher has k times as many blocks
    in a stage, k consecutive ones form a group.
    """
    ours, theirs = list(staged(student).stages), list(staged(teacher).stages)
    if len(ours) != len(theirs):
        raise UserError(
            f"the student {type(student).__name__} has {len(ours)} stages and the teacher {type(teacher).__name__} "
            f"{len(theirs)}: swapping needs equally many; choose another pair"
        )
    gates: list[Gate] = []
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True), 1):
        name = f"stage {number}"
        gates += [Gate(name, mine, other, True)] if kind == "stage" else _block_gates(name, mine, other)
    return gates


def _block_gates(stage: str, mine: nn.Module, other: nn.Module) -> list[Gate]:
    blocks, teachers = _blocks(stage, mine), _blocks(stage, other)
    size, left = divmod(len(teachers), len(blocks))
    if left or not size:
        raise UserError(
            f"{stage}: the student has {len(blocks)} blocks, the teacher {len(teachers)}, which is not a multiple: "
            "use --gates stage, or another pair"
        )
    groups = [nn.Sequential(*teachers[i * size : (i + 1) * size]) for i in range(len(blocks))]
    return [
        Gate(f"{stage}, block {i + 1}", block, group, i + 1 == len(blocks))
        for i, (block, group) in enumerate(zip(blocks, groups, strict=True))
    ]


def _blocks(stage: str, module: nn.Module) -> list[nn.Module]:
    if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
        raise UserError(f"{stage} is a {type(module).__name__}, not a sequence of blocks: use --gates stage")
    return list(module)


def adapted(
    student: nn.Module, teacher: nn.Module, gates: list[Gate], allowed: bool
) -> tuple[list[Gate], nn.ModuleList]:
    """The gates with adapters around the teacher's module where channels differ, and [before, after] for every gate.

    An adapter is a 1x1 convolution and BN, or an identity if the channels agree. Raises UserError if H x W differ at a
    gate, or if the channels differ and adapters are not `allowed`.
    """
    mine = output_shapes(student, [staged(student).stem, *(gate.student for gate in gates)])
    others = output_shapes(teacher, [staged(teacher).stem, *(gate.teacher for gate in gates)])
    pairs = nn.ModuleList()
    for i, gate in enumerate(gates):
        ours, theirs = mine[i : i + 2], others[i : i + 2]  # (C, H, W) before and after the gate
        sizes_agree = all(a[1:] == b[1:] for a, b in zip(ours, theirs, strict=True))
        if ours != theirs and not (allowed and sizes_agree):
            hint = "use --adapters, or another pair" if sizes_agree else "choose a pair of equal H x W at every gate"
            raise UserError(
                f"{gate.name}: the student's block takes {_named(ours)} and the teacher's {_named(theirs)} (C x H x W "
                f"for a 64 x 64 image), so they cannot be swapped; {hint}"
            )
        pairs.append(nn.ModuleList([_adapter(ours[0][0], theirs[0][0]), _adapter(theirs[1][0], ours[1][0])]))
    return with_adapters(gates, pairs), pairs


def with_adapters(gates: list[Gate], pairs: nn.ModuleList) -> list[Gate]:
    """The gates with each pair of adapters, [before, after], around the teacher's module."""
    result = []
    for gate, pair in zip(gates, pairs, strict=True):
        before, after = cast(nn.ModuleList, pair)
        needs_none = isinstance(before, nn.Identity) and isinstance(after, nn.Identity)
        result.append(gate if needs_none else gate._replace(teacher=nn.Sequential(before, gate.teacher, after)))
    return result


def _named(shapes: Shapes) -> str:
    return " to ".join(" x ".join(map(str, shape)) for shape in shapes)


def _adapter(cin: int, cout: int) -> nn.Module:
    return nn.Identity() if cin == cout else nn.Sequential(nn.Conv2d(cin, cout, 1, bias=False), nn.BatchNorm2d(cout))


class Swapped(NamedTuple):
    """The student along one path: gate i runs the student's module if `path[i]`, else the teacher's."""

    view: Staged
    gates: list[Gate]
    path: tuple[bool, ...]

    def features(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Images [N, 3, H, W] -> logits [N, classes] and the output of every stage, as Staged.features."""
        x, maps = self.view.stem(images), []
        for gate, runs_student in zip(self.gates, self.path, strict=True):
            x = gate.student(x) if runs_student else gate.teacher(x)
            if gate.ends_stage:
                maps.append(x)
        return self.view.head(x), maps
