"""DCM's auxiliary heads: one classifier after every stage of a network but the last, dropped after training.

Source: Yao and Sun, ECCV 2020, arXiv:2008.07816, as in the authors' code for Wide ResNets and the CIFAR MobileNet. A
head reduces the resolution to that of the network's last stage. It shares no weights with the network.
Ours: the heads of all other networks. A head is a copy of the later stages and the network's head with new random
weights (see `reinit`). The earliest head keeps half of the blocks of each stage, rounded down but at least one: the
first blocks, which change width and resolution. If the width changes within a stage (MobileNetV2, EfficientNet), each
sequence of blocks of one width is halved. Stages that are not sequences of blocks (timm's RegNet) are not halved. Ours
as well: a WRN with n = 1 keeps one block, where floor(n/2) would leave none.
Cost: the heads of a VGG copy its whole classifier.
"""

import copy
from itertools import groupby
from typing import cast

from torch import nn

from ...models.nets.mobilenet import CifarMobileNet, stage
from ...models.nets.resnet import WideBlock, WideGroup, WideResNet, he_init
from ...models.stages.staged import staged
from .reinit import reinit


def auxiliary_heads(net: nn.Module) -> nn.ModuleList:
    """Head k maps the output of stage k of `staged(net)`, [N, C, H, W], to logits [N, classes].

    Returns one head fewer than there are stages, in order: new modules, trainable, in train mode, with the device and
    dtype of `net`. Raises UserError if the stages are not known or a module has no way to draw new weights.
    """
    if isinstance(net, WideResNet):
        heads = _wide_heads(net)
    elif isinstance(net, CifarMobileNet):
        heads = _mobile_heads(net)
    else:
        view = staged(net)
        later = [list(view.stages)[k:] for k in range(1, len(view.stages))]
        later[:1] = [[_halved(stage) for stage in rest] for rest in later[:1]]
        heads = [reinit(nn.Sequential(*rest, view.head)) for rest in later]
    return nn.ModuleList(heads).to(next(net.parameters()))


def _wide_heads(net: WideResNet) -> list[nn.Module]:
    """For groups of n blocks and widths w1, w2, w3: n blocks to w2, floor(n/2) to w3; and n blocks to 2 w3."""
    groups, classes = (net.block1, net.block2, net.block3), net.fc.out_features
    n, (w1, w2, w3) = len(net.block1.layer), (cast(WideBlock, group.layer[-1]).conv2.out_channels for group in groups)
    return [
        _preactivated_top(w3, classes, WideGroup(n, w1, w2, 2), WideGroup(max(1, n // 2), w2, w3, 2)),
        _preactivated_top(2 * w3, classes, WideGroup(n, w2, 2 * w3, 2)),
    ]


def _preactivated_top(width: int, classes: int, *groups: nn.Module) -> nn.Module:
    norm, classifier = nn.BatchNorm2d(width), nn.Linear(width, classes)
    head = nn.Sequential(*groups, norm, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier)
    he_init(head)
    nn.init.zeros_(classifier.bias)
    return head


def _mobile_heads(net: CifarMobileNet) -> list[nn.Module]:
    """With torch's default initialisation, as in the network itself."""
    classes = net.linear.out_features
    blocks = ((512, 2), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1)), ((2048, 2), (2048, 1))
    return [
        nn.Sequential(stage(cin, widths), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1][0], classes))
        for cin, widths in zip((256, 512), blocks, strict=True)
    ]


def _halved(stage: nn.Module) -> nn.Module:
    """A stage with half of the blocks of `stage`, which is not changed."""
    if isinstance(stage, nn.Sequential) and type(stage).forward is nn.Sequential.forward:
        groups = [list(group) for _, group in groupby(_blocks(stage), key=_width)]
        kept = [block for group in groups for block in group[: max(1, len(group) // 2)]]
        return nn.Sequential(*(layer for block in kept for layer in block))
    if isinstance(blocks := getattr(stage, "blocks", None), nn.Sequential):  # timm: a downsampling, then blocks
        stage = copy.deepcopy(stage)
        stage.blocks = _halved(blocks)
    return stage


def _blocks(sequence: nn.Sequential) -> list[list[nn.Module]]:
    """The layers of each block. In a stage of convolutions (VGG), a block is one of them and the layers after it.

    A pool, or a downsampling that is an nn.Sequential (torchvision's ConvNeXt), belongs to the block after it.
    """
    layers = list(sequence)
    convolutions = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    starts = convolutions or [i for i, layer in enumerate(layers) if type(layer) is not nn.Sequential] or [0]
    return [layers[a:b] for a, b in zip([0, *starts[1:]], [*starts[1:], len(layers)], strict=True)]


def _width(block: list[nn.Module]) -> int | None:
    """The output channels of a block: those of its last convolution."""
    convolutions = [module for layer in block for module in layer.modules() if isinstance(module, nn.Conv2d)]
    return convolutions[-1].out_channels if convolutions else None
