"""Maps from before the activation, which OFD compares: each stage's last one, with the BatchNorm that feeds it.

Source: Heo et al. 2019 (OFD), arXiv:1904.01866, section 3.1: features are taken between the last sum (or, without a
shortcut, the last BatchNorm) and the ReLU after it; the margin comes from the block's last BatchNorm.
In pre-activation nets (Wide ResNet), where a stage ends with a sum that is not activated, the map is the output of the
BatchNorm with which the next stage, or the head, begins, as in the authors' code.
Departures: that code normalises the map a second time to get it, so that a student's running statistics move twice a
step; here it is a tap of the one pass, in every mode, for teachers and students alike. What stands between the last
BatchNorm and the sum (squeeze-and-excitation) is not in the margin, nor is the shortcut, in their code either.

How: torch.fx traces the block around a tap and its graph returns the tap too. The ReLU on it runs out of place, which
costs one map's memory where the net's own works in place.
"""

import torch
from torch import Tensor, fx, nn

from ...errors import UserError
from .split import trace
from .staged import Staged, staged

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)  # to the letter: timm has kinds that activate as well


class PreActivation(nn.Module):
    """A view of a network whose features are not activated: the same modules, no copies of weights.

    Logits are those of the network, bit for bit, in train and in eval mode; BatchNorm statistics move once per pass.
    `norms`: the BatchNorm that feeds each stage's map, for `bn_margin(norm.weight, norm.bias)`. What `Staged` says of
    `train()`, of state dicts and of hooks holds here, for hooks on the tapped blocks as well. For ResNets with basic
    and bottleneck blocks, our Wide ResNets and MobileNet, and VGGs with BatchNorm; UserError for other networks.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        object.__setattr__(self, "model", model)  # not registered: the parameters are already here, by their place
        plain, tapped, self.norms = _split(staged(model))
        self.plain = nn.ModuleList(plain)
        self.tapped = nn.ModuleList(tapped)

    def train(self, mode: bool = True) -> "PreActivation":
        self.model.train(mode)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] -> logits [N, classes]."""
        return self.features(x)[0]

    def features(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Images [N, 3, H, W] -> logits [N, classes] and each stage's map [N, C, H', W'] before its last ReLU."""
        maps = []
        for plain, tapped in zip(self.plain, self.tapped, strict=False):
            x, before = tapped(plain(x))
            maps.append(before)
        return self.plain[-1](x), maps


def _split(view: Staged) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module]]:
    """Modules x -> x; those x -> (x, map), one fewer, that run between them; and the BatchNorm of each map."""
    name = type(view.model).__name__
    for k, stage in enumerate(view.stages):
        if not isinstance(stage, nn.Sequential):
            raise _unsupported(name, f"its stage {k} is a {type(stage).__name__}, not a sequence of blocks")
    pre_activation = isinstance(view.head, nn.Sequential) and type(view.head[0]) in NORMS
    plain, blocks = _before_blocks(view) if pre_activation else _in_last_blocks(view)
    tapped = [_tapped(block, name, k, pre_activation) for k, block in enumerate(blocks)]
    return plain, [module for module, _ in tapped], [norm for _, norm in tapped]


def _in_last_blocks(view: Staged) -> tuple[list[nn.Module], list[nn.Module]]:
    """Taps in each stage's last block, or in the whole of a stage of bare layers (VGG)."""
    heads, lasts = [], []
    for stage in view.stages:
        blocks = list(stage)
        bare = isinstance(blocks[-1], nn.ReLU)
        heads.append(nn.Sequential() if bare else nn.Sequential(*blocks[:-1]))
        lasts.append(stage if bare else blocks[-1])
    return [nn.Sequential(view.stem, heads[0]), *heads[1:], view.head], lasts


def _before_blocks(view: Staged) -> tuple[list[nn.Module], list[nn.Module]]:
    """Taps in the first block of the stage that follows, and in the head."""
    first, *rest = (list(stage) for stage in view.stages)
    plain = [nn.Sequential(view.stem, *first), *(nn.Sequential(*blocks[1:]) for blocks in rest), nn.Sequential()]
    return plain, [*(blocks[0] for blocks in rest), view.head]


def _tapped(block: nn.Module, net: str, k: int, first: bool) -> tuple[nn.Module, nn.Module]:
    """`block` as x -> (output, map before its first or its last ReLU), and the BatchNorm before that ReLU."""
    graph = trace(block, (), True)
    if str(graph) != str(trace(block, (), False)):
        raise _unsupported(net, f"the forward of {type(block).__name__} is not the same in train and eval mode")
    found = _relu_and_norm(block, graph, first)
    if found is None:
        edge = "begin with BatchNorm and ReLU" if first else "end with a ReLU after a BatchNorm"
        raise _unsupported(net, f"the {type(block).__name__} around the end of stage {k} does not {edge}")
    relu, norm = found
    return fx.GraphModule(block, _returning(graph, relu.args[0], relu)), block.get_submodule(norm.target)


def _relu_and_norm(block: nn.Module, graph: fx.Graph, first: bool) -> tuple[fx.Node, fx.Node] | None:
    """The first or the last ReLU and the BatchNorm before it; None where the block does not begin or end so."""
    relus = _calls(block, graph, (nn.ReLU,))
    relu = relus[0 if first else -1] if relus else None
    norms = [norm for norm in _calls(block, graph, NORMS) if relu is not None and norm < relu]
    if not norms or list(relu.args[0].users) != [relu]:
        return None
    if first:
        fits = relu.args[0] is norms[0] and norms[0].args[0].op == "placeholder"
    else:
        fits = graph.output_node().args[0] is relu
    return (relu, norms[-1]) if fits else None


def _calls(block: nn.Module, graph: fx.Graph, kinds: tuple[type, ...]) -> list[fx.Node]:
    """The calls of modules of these classes, in order of execution."""
    calls = [node for node in graph.nodes if node.op == "call_module"]
    return [node for node in calls if type(block.get_submodule(node.target)) in kinds]


def _returning(graph: fx.Graph, before: fx.Node, relu: fx.Node) -> fx.Graph:
    """The graph returns (output, before), and `relu` no longer overwrites `before`."""
    with graph.inserting_before(relu):
        relu.replace_all_uses_with(graph.call_function(torch.relu, (before,)))
    graph.erase_node(relu)
    output = graph.output_node()
    output.args = ((output.args[0], before),)
    return graph


def _unsupported(net: str, reason: str) -> UserError:
    return UserError(
        f"{net} has no maps before the activation that OFD can use: {reason}; ResNets of basic or bottleneck blocks, "
        "our Wide ResNets and MobileNet, and VGGs with BatchNorm have"
    )
