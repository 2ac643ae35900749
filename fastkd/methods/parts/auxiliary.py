"""DCM's auxiliary heads: one classifier after every stage of a network but the last, dropped after training.

Source: Yao and Sun, ECCV 2020, arXiv:2008.07816, as in the authors' code for Wide ResNets and the CIFAR MobileNet. A
head goes down to the resolution of the network's last stage, with weights of its own.
Ours: the heads of all other networks. A head replays the stages that follow with fresh weights (see `fresh`) and the
network's own kind of blocks, then a fresh copy of the network's head. The earliest head has half of the blocks of each
stage, rounded down, one at least: the first ones, which change width and resolution. Where the width changes within a
stage (MobileNetV2, EfficientNet), each run of blocks of one width is halved. Stages that are no sequence of blocks
(timm's RegNet) stay whole. Ours as well: a WRN with n = 1, where floor(n/2) = 0 blocks would be left, keeps one.
Cost: the heads of a VGG copy its whole classifier.
"""

import copy
from itertools import groupby

from torch import nn

from ...models.nets.init import he_init
from ...models.nets.mobilenet import CifarMobileNet, stage
from ...models.nets.wrn import Group, WideResNet
from ...models.stages.staged import Staged, staged
from .reinit import reinit


def auxiliary_heads(net: nn.Module) -> nn.ModuleList:
    """Head k takes the output of stage k of `staged(net)`, [N, C, H, W], and gives logits [N, classes].

    New modules, trainable, in train mode, with the device and dtype of `net`, which stays as it is; in order, one
    fewer than the stages. UserError where the stages are not known or a part cannot start anew.
    """
    view = staged(net)
    if isinstance(net, WideResNet):
        heads = _wide_heads(net)
    elif isinstance(net, CifarMobileNet):
        heads = _mobile_heads(net)
    else:
        heads = _replayed_heads(view)
    return nn.ModuleList(heads).to(next(net.parameters()))


def _wide_heads(net: WideResNet) -> list[nn.Module]:
    """With groups of n blocks and widths w1, w2, w3: n blocks to w2, floor(n/2) to w3; and n blocks to 2 w3."""
    groups, classes = (net.block1, net.block2, net.block3), net.fc.out_features
    n, (w1, w2, w3) = len(net.block1.layer), (group.layer[-1].conv2.out_channels for group in groups)
    return [
        _preactivated_top(w3, classes, Group(n, w1, w2, 2), Group(max(1, n // 2), w2, w3, 2)),
        _preactivated_top(2 * w3, classes, Group(n, w2, 2 * w3, 2)),
    ]


def _preactivated_top(width: int, classes: int, *groups: nn.Module) -> nn.Module:
    norm, classifier = nn.BatchNorm2d(width), nn.Linear(width, classes)
    head = nn.Sequential(*groups, norm, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier)
    he_init(head)
    nn.init.zeros_(classifier.bias)
    return head


def _mobile_heads(net: CifarMobileNet) -> list[nn.Module]:
    """From torch's default initialisation, as the network itself."""
    classes = net.linear.out_features
    blocks = ((512, 2), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1)), ((2048, 2), (2048, 1))
    return [
        nn.Sequential(stage(cin, widths), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1][0], classes))
        for cin, widths in zip((256, 512), blocks, strict=True)
    ]


def _replayed_heads(view: Staged) -> list[nn.Module]:
    stages = list(view.stages)
    rest = [stages[k + 1 :] for k in range(len(stages) - 1)]
    rest[:1] = [[_halved(part) for part in parts] for parts in rest[:1]]
    return [reinit(nn.Sequential(*parts, view.head)) for parts in rest]


def _halved(part: nn.Module) -> nn.Module:
    """Half of a stage's blocks; `part` itself stays as it is."""
    if isinstance(part, nn.Sequential) and type(part).forward is nn.Sequential.forward:
        runs = [list(run) for _, run in groupby(_blocks(part), key=_width)]
        return nn.Sequential(*(layer for run in runs for block in run[: max(1, len(run) // 2)] for layer in block))
    if isinstance(getattr(part, "blocks", None), nn.Sequential):  # timm: a downsampling and the blocks after it
        part = copy.deepcopy(part)
        part.blocks = _halved(part.blocks)
    return part


def _blocks(sequence: nn.Sequential) -> list[list[nn.Module]]:
    """The layers of each block. Among bare convolutions (VGG) a block is one of them and what follows.

    A pool, or a downsampling that is a plain sequence (torchvision's ConvNeXt), belongs to the block after it.
    """
    layers = list(sequence)
    bare = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    starts = bare or [i for i, layer in enumerate(layers) if type(layer) is not nn.Sequential] or [0]
    return [layers[a:b] for a, b in zip([0, *starts[1:]], [*starts[1:], len(layers)], strict=True)]


def _width(block: list[nn.Module]) -> int | None:
    """The channels that a block puts out: those of its last convolution."""
    convolutions = [module for layer in block for module in layer.modules() if isinstance(module, nn.Conv2d)]
    return convolutions[-1].out_channels if convolutions else None
