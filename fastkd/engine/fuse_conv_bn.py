"""A frozen network with fewer operations and the same results.

`fuse_conv_bn` folds each BatchNorm into the convolution before it. `fuse_relu` lets a convolution compute the ReLU, and
the residual addition, that follow it; where no library can do that, a kernel of ours follows the convolution.
"""

import copy
import operator
from collections import defaultdict
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..kernels import conv_epilogue

# torch.cudnn_convolution_relu gives cuDNN its own uninitialised output as z, with a factor of 0. If cuDNN multiplies, a
# NaN that lies there comes through. Set this to True where `pytest -m gpu tests/engine/test_poisoned_memory.py` is
# green on a GPU. Until then cuDNN gets a z that holds numbers: the memory of the input, with the same factor of 0.
CUDNN_RELU_IS_PROVEN = False

# By torch.fx's kind of node: what it calls.
RELU = {"call_function": (F.relu, F.relu_, torch.relu, torch.relu_), "call_method": ("relu",)}
ADD = {"call_function": (operator.add, operator.iadd, torch.add), "call_method": ("add", "add_")}


@torch.no_grad()
def fuse_conv_bn(net: nn.Module, images: Tensor) -> nn.Module:
    """A copy of the frozen `net` without the BatchNorms that directly follow a convolution; dtype as `net`.

    One forward pass of `images` [N, 3, H, W] shows which do. The copy is wrong if another layer reads the
    convolution's output as well, so the caller compares its results with those of `net`.
    """
    twin = copy.deepcopy(net)
    for convolution, name in _pairs(twin, images):
        norm = twin.get_submodule(name)
        assert isinstance(norm, _BatchNorm) and norm.running_var is not None and norm.running_mean is not None
        statistics = (norm.running_mean, norm.running_var, norm.eps)
        folded = fuse_conv_bn_weights(convolution.weight, convolution.bias, *statistics, norm.weight, norm.bias)
        convolution.weight, convolution.bias = folded
        after = [getattr(norm, part, None) for part in ("drop", "act")]  # timm's norms do these too
        layers = [layer for layer in after if isinstance(layer, nn.Module)]
        parent, _, child = name.rpartition(".")
        setattr(twin.get_submodule(parent), child, nn.Sequential(*layers) if layers else nn.Identity())
    return twin


def _pairs(net: nn.Module, images: Tensor) -> list[tuple[_ConvNd, str]]:
    """(convolution, name of the norm): each runs once, and the norm's input is the convolution's output."""
    outputs: list[tuple[_ConvNd, Tensor]] = []  # kept alive, so that no two are at one address
    sources: dict[str, list[_ConvNd | None]] = defaultdict(list)  # by name of the norm
    hooks = []

    def before(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        sources[name].append(next((conv for conv, output in outputs if output is inputs[0]), None))

    for name, module in net.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            hooks.append(module.register_forward_hook(lambda conv, _, output: outputs.append((conv, output))))
        elif isinstance(module, _BatchNorm) and module.running_var is not None:
            hooks.append(module.register_forward_pre_hook(partial(before, name)))
    net(images)
    for hook in hooks:
        hook.remove()
    ran = [conv for conv, _ in outputs]
    return [(conv, name) for name, (conv, *more) in sources.items() if conv and not more and ran.count(conv) == 1]


class FusedConvolution(nn.Module):
    """relu(convolution(x) [+ z]); `variant` says by which calls. Empty: the first one that is possible.

    one call    a convolution of cuDNN or oneDNN that does everything
    epilogue    the convolution without its bias, then `conv_epilogue`: two launches
    separate    the convolution, the addition and the ReLU; torch adds the bias in a kernel of its own
    """

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.convolution = convolution
        self.variant = ""

    def variants(self, x: Tensor, z: Tensor | None = None) -> tuple[str, ...]:
        """The variants that are possible for these inputs."""
        if x.device.type != "cuda":
            return ("one call", "separate")
        is_safe = z is not None or CUDNN_RELU_IS_PROVEN or self._any_z(x) is not None
        return (*(("one call",) if is_safe else ()), "epilogue", "separate")

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        c, variant = self.convolution, self.variant or self.variants(x, z)[0]
        if variant == "separate":
            y = c(x)
            return F.relu_(y if z is None else y.add_(z))
        if variant == "epilogue":
            y = F.conv2d(x, c.weight, None, c.stride, c.padding, c.dilation, c.groups)
            return conv_epilogue(y, c.bias, z)
        return self._cudnn(x, z) if x.device.type == "cuda" else self._onednn(x, z)

    def _cudnn(self, x: Tensor, z: Tensor | None) -> Tensor:
        c, alpha = self.convolution, 1.0
        geometry: Any = (c.stride, c.padding, c.dilation, c.groups)
        if z is None and not CUDNN_RELU_IS_PROVEN:
            z, alpha = self._any_z(x), 0.0
        if z is None:
            return torch.cudnn_convolution_relu(x, c.weight, c.bias, *geometry)
        return torch.cudnn_convolution_add_relu(x, c.weight, z, alpha, c.bias, *geometry)

    def _onednn(self, x: Tensor, z: Tensor | None) -> Tensor:
        c, op = self.convolution, torch.ops.mkldnn._convolution_pointwise
        geometry: Any = (c.padding, c.stride, c.dilation, c.groups)
        if z is None:
            return op(x, c.weight, c.bias, *geometry, "relu", [], None)
        return op.binary(x, z, c.weight, c.bias, *geometry, "add", 1.0, "relu", [], None)

    def _any_z(self, x: Tensor) -> Tensor | None:
        """A z for cuDNN to multiply by 0: the memory of x, which holds numbers, in the shape of the output.

        None if it is too small. If x has a NaN or an infinity, other outputs than those it reaches may become NaN.
        """
        c = self.convolution
        (N, _, *sizes), C = x.shape, c.out_channels
        padding = cast(tuple[int, ...], c.padding)  # fuse_relu leaves out the ones with words
        spans = [step * (kernel - 1) + 1 for kernel, step in zip(c.kernel_size, c.dilation, strict=True)]
        H, W = ((sizes[i] + 2 * padding[i] - spans[i]) // c.stride[i] + 1 for i in range(2))
        if N * C * H * W > x.numel() or not x.is_contiguous(memory_format=torch.channels_last):
            return None
        return x.as_strided((N, C, H, W), (H * W * C, 1, W * C, C))


def fuse_relu(module: nn.Module) -> fx.GraphModule:
    """`module` with every ReLU that follows a convolution, or its sum with another tensor, done by the convolution.

    Raises what torch.fx raises if it cannot trace `module`.
    """
    traced = fx.symbolic_trace(module)
    modules = dict(traced.named_modules())
    relu = RELU | {"call_module": tuple(name for name, each in modules.items() if type(each) is nn.ReLU)}
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and type(modules[node.target]) is nn.Identity:  # where a norm was
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
        if node.target not in relu.get(node.op, ()):
            continue
        convolution, summands = _source(node.args[0], modules)
        if convolution is None:
            continue
        for summand in summands:
            _move_bias(summand, convolution, traced, modules)
        name = f"fused_{node.name}"
        traced.add_submodule(name, FusedConvolution(modules[convolution.target]))
        with traced.graph.inserting_before(node):
            new = traced.graph.call_module(name, (convolution.args[0], *summands))
        node.replace_all_uses_with(new)
        traced.graph.erase_node(node)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced


def _source(node: fx.Node, modules: dict[Any, nn.Module]) -> tuple[fx.Node | None, tuple[fx.Node, ...]]:
    """(the convolution that ends in `node`, what is added to it); (None, ()) if there is none."""
    if _is_fusible(node, modules):
        return node, ()
    pair = [arg for arg in node.args if isinstance(arg, fx.Node)]
    if node.target in ADD.get(node.op, ()) and len(node.users) == 1 and len(pair) == 2:
        # Either summand may be the convolution: the fused call stands where the ReLU stood, after both.
        for summand, other in (pair, pair[::-1]):
            if _is_fusible(summand, modules):
                return summand, (other,)
    return None, ()


def _move_bias(source: fx.Node, target: fx.Node, traced: fx.GraphModule, modules: dict[Any, nn.Module]) -> None:
    """If one convolution is added to another, add its bias to the other's: torch needs a kernel for each bias."""
    if not _is_fusible(source, modules):
        return
    one, other = cast(nn.Conv2d, modules[source.target]), cast(nn.Conv2d, modules[target.target])
    calls = [modules.get(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    if one.bias is None or other.bias is None or calls.count(one) > 1 or calls.count(other) > 1:
        return
    other.bias, one.bias = nn.Parameter(one.bias + other.bias, requires_grad=False), None


def _is_fusible(node: fx.Node, modules: dict[Any, nn.Module]) -> bool:
    """True for a 2D convolution whose output is used once and whose padding cuDNN and oneDNN know."""
    if node.op != "call_module" or len(node.users) > 1:
        return False
    module = modules[node.target]
    return type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)
