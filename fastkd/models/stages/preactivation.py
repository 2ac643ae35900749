"""Feature maps before the activation, which OFD compares: the last map of each stage and the BatchNorm that feeds it.

Source: Heo et al. 2019 (OFD), arXiv:1904.01866, section 3.1. Features are taken between the last sum (or, without a
shortcut, the last BatchNorm) and the ReLU after it. The margin comes from the last BatchNorm of the block.
In pre-activation networks (Wide ResNet), a stage ends with a sum that is not activated. There the map is the output of
the BatchNorm with which the next stage, or the head, begins, as in the authors' code. In MobileNetV2 a stage ends with
a linear bottleneck: its output is the map, and the bottleneck's BatchNorm is the last one (mdistiller). The map of a
ShuffleNetV2 has channels that no BatchNorm of the block feeds, so it can be a student's only, as in mdistiller.
Departures: that code normalises the map a second time to get it, so that a student's running statistics move twice a
step. Here the map comes from the one forward pass, in every mode, for teachers and students alike. The margin ignores
what stands between the last BatchNorm and the sum (squeeze-and-excitation) and the shortcut, as in the authors' code.

How: torch.fx traces the block around the map, and its graph returns the map too. The ReLU on it runs out of place,
which costs the memory of one map if the network's ReLU works in place.
"""

import operator

import torch
from torch import Tensor, fx, nn

from ...errors import UserError
from .split import called_module, first_input, trace
from .staged import NetworkView, Staged, staged

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)  # exactly these classes: timm has subclasses that activate as well


class PreActivation(NetworkView):
    """A view of a network whose feature maps are those before the activation.

    BatchNorm statistics move once per pass. `norms`: the BatchNorm that feeds each stage's map, for
    `bn_margin(norm.weight, norm.bias)`, or None. Hooks on the blocks around the maps do not run. For ResNets with basic
    and bottleneck blocks, our other networks, torchvision's MobileNetV2, and VGGs with BatchNorm. Raises UserError for
    other networks.
    """

    def __init__(self, model: nn.Module):
        super().__init__(model)
        between, tapped, self.norms = _split(staged(model))
        self.between = nn.ModuleList(between)
        self.tapped = nn.ModuleList(tapped)

    def features(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Images [N, 3, H, W] -> logits [N, classes] and each stage's map [N, C, H', W'] before its last ReLU."""
        maps = []
        for between, tapped in zip(self.between, self.tapped, strict=False):
            x, before = tapped(between(x))
            maps.append(before)
        return self.between[-1](x), maps


class WithMap(nn.Module):
    """A block that has `forward_with_map`, x -> (output, map before its last ReLU)."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.block.forward_with_map(x)  # type: ignore[operator]  # torch types attributes as modules


def _split(view: Staged) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module | None]]:
    """Modules x -> x; modules x -> (x, map), one fewer, that run between them; and the BatchNorm of each map."""
    name, stages = type(view.model).__name__, []
    for k, stage in enumerate(view.stages):
        if not isinstance(stage, nn.Sequential):
            raise _unsupported(name, f"its stage {k} is a {type(stage).__name__}, not a sequence of blocks")
        stages.append(list(stage))
    pre_activation = isinstance(view.head, nn.Sequential) and type(view.head[0]) in NORMS
    between: list[nn.Module]
    if pre_activation:  # maps from the first block of the stage that follows, and from the head
        first, *rest = stages
        between = [nn.Sequential(view.stem, *first), *(nn.Sequential(*layers[1:]) for layers in rest), nn.Sequential()]
        blocks = [*(layers[0] for layers in rest), view.head]
    else:  # maps from each stage's last block, or from the whole of a stage of single layers (VGG)
        single = [isinstance(layers[-1], nn.ReLU) for layers in stages]
        before = [nn.Sequential(*layers[: 0 if alone else -1]) for layers, alone in zip(stages, single, strict=True)]
        between = [nn.Sequential(view.stem, before[0]), *before[1:], view.head]
        blocks = [view.stages[k] if alone else stages[k][-1] for k, alone in enumerate(single)]
    tapped = [_tapped(block, name, k, pre_activation) for k, block in enumerate(blocks)]
    return between, [module for module, _ in tapped], [norm for _, norm in tapped]


def _tapped(block: nn.Module, net: str, k: int, first: bool) -> tuple[nn.Module, nn.Module | None]:
    """`block` as x -> (output, map before its first or its last ReLU), and the BatchNorm before that ReLU.

    The ReLU does not overwrite the map. The map of a block without a last ReLU is its output.
    """
    if hasattr(block, "forward_with_map"):
        return WithMap(block), None
    graph = trace(block, (), True)
    if str(graph) != str(trace(block, (), False)):
        raise _unsupported(net, f"the forward of {type(block).__name__} is not the same in train and eval mode")
    output = graph.output_node()
    if not first and (last_norm := _linear_end(block, graph)):
        output.args = ((output.args[0], output.args[0]),)
        return fx.GraphModule(block, graph), last_norm
    found = _relu_and_norm(block, graph, first)
    if found is None:
        edge = "begin with BatchNorm and ReLU" if first else "end with a ReLU after a BatchNorm"
        raise _unsupported(net, f"the {type(block).__name__} around the end of stage {k} does not {edge}")
    relu, before, norm = found
    with graph.inserting_before(relu):
        relu.replace_all_uses_with(graph.call_function(torch.relu, (before,)))
    graph.erase_node(relu)
    output.args = ((output.args[0], before),)
    return fx.GraphModule(block, graph), called_module(block, norm)


def _linear_end(block: nn.Module, graph: fx.Graph) -> nn.Module | None:
    """The BatchNorm whose output, or the sum of it and a shortcut, is the block's output; None if it ends otherwise."""
    end = first_input(graph.output_node())
    if end is None:
        return None
    is_sum = end.op == "call_function" and end.target in (operator.add, torch.add)
    for node in end.all_input_nodes if is_sum else [end]:
        module = called_module(block, node) if node.op == "call_module" else None
        while type(module) is nn.Sequential and len(module):
            module = module[-1]
        if type(module) in NORMS:
            return module
    return None


def _relu_and_norm(block: nn.Module, graph: fx.Graph, first: bool) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """The first or last ReLU, its input, and the BatchNorm before it; None if the block does not begin or end so."""
    relus = _calls(block, graph, (nn.ReLU,))
    if not relus:
        return None
    relu = relus[0 if first else -1]
    before = first_input(relu)
    norms = [norm for norm in _calls(block, graph, NORMS) if norm < relu]
    if not norms or before is None or list(before.users) != [relu]:
        return None
    if first:
        source = first_input(norms[0])
        fits = before is norms[0] and source is not None and source.op == "placeholder"
    else:
        fits = first_input(graph.output_node()) is relu
    return (relu, before, norms[-1]) if fits else None


def _calls(block: nn.Module, graph: fx.Graph, kinds: tuple[type, ...]) -> list[fx.Node]:
    """The calls of modules of these classes, in order of execution."""
    calls = [node for node in graph.nodes if node.op == "call_module"]
    return [node for node in calls if type(called_module(block, node)) in kinds]


def _unsupported(net: str, reason: str) -> UserError:
    return UserError(
        f"{net} has no maps before the activation that OFD can use: {reason}; use a ResNet of basic or bottleneck "
        "blocks, a Wide ResNet, MobileNet or ShuffleNet of ours, torchvision's MobileNetV2, or a VGG with BatchNorm"
    )
