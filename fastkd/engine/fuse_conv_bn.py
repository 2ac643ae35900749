"""A frozen network with fewer operations and the same results: BatchNorm folded into the convolution before it, and the
activation (and the addition) after a convolution done by the convolution itself.
"""

import copy
import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@torch.no_grad()
def folded(net: nn.Module, images: Tensor) -> nn.Module:
    """A copy of the frozen `net` without the BatchNorms that follow a convolution directly, in fp32 or as `net` is.

    Which do is seen on one forward pass of `images`. What else uses such an output would go wrong: compare.
    """
    twin = copy.deepcopy(net)
    for convolution, name in _pairs(twin, images):
        norm = twin.get_submodule(name)
        scale = norm.weight if norm.weight is not None else torch.ones_like(norm.running_var)
        shift = norm.bias if norm.bias is not None else torch.zeros_like(norm.running_mean)
        scale = scale * (norm.running_var + norm.eps).rsqrt()
        before = 0 if convolution.bias is None else convolution.bias
        bias = shift + (before - norm.running_mean) * scale
        convolution.weight.mul_(scale.view(-1, *[1] * (convolution.weight.dim() - 1)))
        convolution.bias = nn.Parameter(bias, requires_grad=False)
        owner, _, own = name.rpartition(".")
        setattr(twin.get_submodule(owner), own, _rest(norm))
    return twin


def _pairs(net: nn.Module, images: Tensor) -> list[tuple[nn.Module, str]]:
    """(convolution, name of the norm): each called once, the norm on what the convolution has just given."""
    outputs, calls, hooks = [], {}, []  # the outputs are kept, so that no two are at one address

    def after(module, _, output):
        outputs.append((module, output))

    def before(module, inputs):
        source = next((conv for conv, output in outputs if output is inputs[0]), None)
        calls.setdefault(module, []).append(source)

    for module in net.modules():
        if isinstance(module, CONVOLUTIONS):
            hooks.append(module.register_forward_hook(after))
        elif isinstance(module, _BatchNorm) and module.running_var is not None:
            hooks.append(module.register_forward_pre_hook(before))
    net(images)
    for hook in hooks:
        hook.remove()
    convolutions = [conv for conv, _ in outputs]
    names = {module: name for name, module in net.named_modules()}
    once = [(sources[0], names[norm]) for norm, sources in calls.items() if len(sources) == 1 and sources[0]]
    return [(conv, name) for conv, name in once if convolutions.count(conv) == 1]


def _rest(norm: nn.Module) -> nn.Module:
    """What a norm does after normalising: timm's have dropout and activation in them."""
    parts = [getattr(norm, name) for name in ("drop", "act") if isinstance(getattr(norm, name, None), nn.Module)]
    parts = [part for part in parts if not isinstance(part, nn.Identity)]
    return nn.Identity() if not parts else parts[0] if len(parts) == 1 else nn.Sequential(*parts)


class FusedConvolution(nn.Module):
    """relu(convolution(x) [+ z]) in one call of cuDNN or oneDNN, or in several where those are faster."""

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.convolution = convolution
        self.fused = True

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        if not self.fused:
            y = self.convolution(x)
            return F.relu_(y if z is None else y.add_(z))
        c = self.convolution
        geometry = (c.stride, c.padding, c.dilation, c.groups)
        if x.device.type == "cuda":
            return (torch.cudnn_convolution_relu(x, c.weight, c.bias, *geometry) if z is None
                    else torch.cudnn_convolution_add_relu(x, c.weight, z, 1.0, c.bias, *geometry))  # fmt: skip
        stride, padding, dilation, groups = geometry
        geometry, relu = (padding, stride, dilation, groups), ("relu", [], None)
        op = torch.ops.mkldnn._convolution_pointwise
        return (op(x, c.weight, c.bias, *geometry, *relu) if z is None
                else op.binary(x, z, c.weight, c.bias, *geometry, "add", 1.0, *relu))  # fmt: skip


def fused(part: nn.Module) -> nn.Module:
    """`part` with every ReLU that follows a convolution, or its sum with something, done by that convolution.

    Raises what torch.fx raises where it cannot trace `part`.
    """
    graph = fx.symbolic_trace(part)
    modules = dict(graph.named_modules())
    for node in list(graph.graph.nodes):
        if node.op == "call_module" and type(modules[node.target]) is nn.Identity:  # where a norm was
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        if not _is_relu(node, modules):
            continue
        convolution, others = _source(node.args[0], modules)
        if convolution is None:
            continue
        name = f"fused_{node.name}"
        graph.add_submodule(name, FusedConvolution(modules[convolution.target]))
        with graph.graph.inserting_before(node):
            new = graph.graph.call_module(name, (convolution.args[0], *others))
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _is_relu(node: fx.Node, modules: dict) -> bool:
    if node.op == "call_module":
        return type(modules[node.target]) is nn.ReLU
    functions = (F.relu, F.relu_, torch.relu, torch.relu_)
    return node.op == "call_function" and node.target in functions or node.op == "call_method" and node.target == "relu"


def _source(node: fx.Node, modules: dict) -> tuple[fx.Node | None, tuple[fx.Node, ...]]:
    """(the convolution that ends in `node`, what is added to it): (None, ()) where there is none."""
    if _is_plain_convolution(node, modules):
        return node, ()
    adds = node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add)
    adds = adds or node.op == "call_method" and node.target in ("add", "add_")
    if not adds or len(node.users) > 1 or len(node.args) != 2 or not all(isinstance(a, fx.Node) for a in node.args):
        return None, ()
    a, b = node.args
    last = [(conv, z) for conv, z in ((a, b), (b, a)) if _is_plain_convolution(conv, modules)]
    if not last:
        return None, ()
    # the other one must be there already: the fused call stands where the ReLU stood, after both
    return last[0][0], (last[0][1],)


def _is_plain_convolution(node: fx.Node, modules: dict) -> bool:
    if node.op != "call_module" or len(node.users) > 1:
        return False
    module = modules[node.target]
    return type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)
