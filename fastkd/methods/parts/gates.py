"""Gates of IAKD: the places where a block of the teacher can replace a block of the student."""

from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...models.sizes import image_size_of
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
            f"{len(theirs)}: swapping needs equally many; choose another pair, or name the stages "
            "(--student-stages, --teacher-stages)"
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


class Ports(NamedTuple):
    """What goes into a gate and comes out of it, of one network: shapes without N, and where their channels are."""

    shapes: Shapes
    channels_last: bool

    @property
    def channels(self) -> list[int]:
        return [shape[-1 if self.channels_last else 0] for shape in self.shapes]

    @property
    def sizes(self) -> list[tuple[int, ...]]:
        """H x W, or the number of tokens; with the place of the channels, which adapters do not change either."""
        return [(*(shape[:-1] if self.channels_last else shape[1:]), self.channels_last) for shape in self.shapes]

    def __str__(self) -> str:
        return " to ".join(" x ".join(map(str, shape)) for shape in self.shapes)


def adapted(
    student: nn.Module, teacher: nn.Module, gates: list[Gate], allowed: bool
) -> tuple[list[Gate], nn.ModuleList]:
    """The gates with adapters around the teacher's module where channels differ, and [before, after] for every gate.

    An adapter is a 1x1 convolution and BN (a linear layer and LayerNorm for tokens), or an identity if the channels
    agree. Raises UserError if H x W differ at a gate, or if the channels differ and adapters are not `allowed`.
    """
    size = image_size_of(student, teacher)  # the teacher's blocks get the student's features
    mine = _ports(student, [gate.student for gate in gates], size)
    others = _ports(teacher, [gate.teacher for gate in gates], size)
    fits = [ours == theirs or allowed and ours.sizes == theirs.sizes for ours, theirs in zip(mine, others, strict=True)]
    if not all(fits):
        raise UserError(_misfits(gates, mine, others, size))
    pairs = nn.ModuleList()
    for ours, theirs in zip(mine, others, strict=True):
        (before, after), (takes, gives) = ours.channels, theirs.channels
        last = ours.channels_last
        pairs.append(nn.ModuleList([_adapter(before, takes, last), _adapter(gives, after, last)]))
    return with_adapters(gates, pairs), pairs


def _ports(net: nn.Module, modules: list[nn.Module], size: int) -> list[Ports]:
    """Those of each gate of a network, whose modules are given, for images of `size` pixels."""
    view = staged(net)
    shapes = output_shapes(net, [view.stem, *modules], size)
    example = torch.empty(1, *shapes[0], device="meta")
    channels_last = example.ndim == 3 or view.layout.map(example) is not example
    return [Ports(shapes[i : i + 2], channels_last) for i in range(len(modules))]


def _misfits(gates: list[Gate], mine: list[Ports], others: list[Ports], size: int) -> str:
    """Which gates fit and which do not, with their shapes, and what to do."""
    tokens = len(mine[0].shapes[0]) == 2
    kind = "tokens x C" if tokens else "H x W x C" if mine[0].channels_last else "C x H x W"
    lines, fitting, rigid = [], [], []
    for gate, ours, theirs in zip(gates, mine, others, strict=True):
        if ours == theirs:
            fitting.append(gate.name)
            continue
        lines.append(f"{gate.name}: the student's block takes {ours} and the teacher's {theirs}")
        if ours.sizes != theirs.sizes:
            rigid.append(gate.name)
    advice = "the channels alone differ: use --adapters, or another pair"
    if rigid:
        ends = [i for i, gate in enumerate(gates) if gate.ends_stage]
        stages_fit = len(ends) < len(gates) and all(mine[i].sizes[1] == others[i].sizes[1] for i in ends)
        other_gates = "use --gates stage, or " if stages_fit else ""
        advice = f"at {', '.join(rigid)} more than the channels differs, and --adapters changes channels alone: "
        advice += f"{other_gates}choose a pair of equal H x W at every gate"
    fit = f"; those that fit: {', '.join(fitting)}" if fitting else ""
    return (
        f"{len(lines)} of {len(gates)} gates cannot be swapped, for images of {size} x {size} ({kind}): "
        f"{'; '.join(lines)}{fit}; {advice}"
    )


def with_adapters(gates: list[Gate], pairs: nn.ModuleList) -> list[Gate]:
    """The gates with each pair of adapters, [before, after], around the teacher's module."""
    result = []
    for gate, pair in zip(gates, pairs, strict=True):
        before, after = cast(nn.ModuleList, pair)
        needs_none = isinstance(before, nn.Identity) and isinstance(after, nn.Identity)
        result.append(gate if needs_none else gate._replace(teacher=nn.Sequential(before, gate.teacher, after)))
    return result


def _adapter(cin: int, cout: int, channels_last: bool) -> nn.Module:
    if cin == cout:
        return nn.Identity()
    if channels_last:
        return nn.Sequential(nn.Linear(cin, cout, bias=False), nn.LayerNorm(cout))
    return nn.Sequential(nn.Conv2d(cin, cout, 1, bias=False), nn.BatchNorm2d(cout))


class Swapped(NamedTuple):
    """The student along one path: gate i runs the student's module if `path[i]`, else the teacher's."""

    view: Staged
    gates: list[Gate]
    path: tuple[bool, ...]

    def features(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Images [N, 3, H, W] -> logits [N, classes] and the map of every stage, as Staged.features."""
        logits, outputs = self.outputs(images)
        return logits, self.maps(outputs)

    def maps(self, outputs: list[Tensor]) -> list[Tensor]:
        """The outputs of the stages as maps [N, C, H, W]."""
        return self.view.maps(outputs)

    def outputs(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Images [N, 3, H, W] -> logits [N, classes] and the output of every stage, as Staged.outputs."""
        x, outputs = self.view.stem(images), []
        for gate, runs_student in zip(self.gates, self.path, strict=True):
            x = gate.student(x) if runs_student else gate.teacher(x)
            if gate.ends_stage:
                outputs.append(x)
        outputs[-1] = x = self.view.final(x)
        return self.view.head(x), outputs
