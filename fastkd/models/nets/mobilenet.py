"""The CIFAR MobileNets: DCM's MobileNet, and the MobileNetV2 of the distillation literature.

MobileNet: Howard et al. 2017, arXiv:1704.04861, with the strides and stages of DCM's code (ECCV 2020,
arXiv:2008.07816), whose nets also start from torch's default initialisation. MobileNetV2: Sandler et al. 2018,
arXiv:1801.04381, with the strides of RepDistiller (arXiv:1910.10699): 2 in the stem, 1 in the second group. Names as
there, so its checkpoints load.
Departures: the average pool takes any map, so any image size works.
"""

from functools import partial

import torch
from torch import Tensor, nn

from .resnet import he_init, stack

STAGES = (  # of MobileNet: (width, stride) of each block
    ((64, 1), (128, 1), (128, 1), (256, 1), (256, 1)),
    ((512, 2), (512, 1), (512, 1), (512, 1), (512, 1), (512, 1)),
    ((1024, 2), (1024, 1)),
)
GROUPS = (  # of MobileNetV2: expansion, width before the multiplier, blocks, stride of the first
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
FEATURES = 1280  # of MobileNetV2


class Separable(nn.Module):
    """Depthwise conv3x3, BN, ReLU, conv1x1, BN, ReLU: [N, cin, H, W] -> [N, cout, H/stride, W/stride]."""

    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cin, 3, stride, 1, groups=cin, bias=False)
        self.bn1 = nn.BatchNorm2d(cin)
        self.conv2 = nn.Conv2d(cin, cout, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)))


def stage(cin: int, blocks: tuple[tuple[int, int], ...]) -> nn.Sequential:
    """One separable block per (width, stride)."""
    widths = (cin, *(width for width, _ in blocks))
    return nn.Sequential(*(Separable(widths[i], width, stride) for i, (width, stride) in enumerate(blocks)))


class CifarMobileNet(nn.Module):
    """A 3x3 stem of 32 channels, then thirteen depthwise-separable blocks in three stages.

    Images [N, 3, H, W] floating -> logits [N, num_classes]; 256, 512, 1024 channels at H, H/2, H/4.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = stage(32, STAGES[0])
        self.layer2 = stage(256, STAGES[1])
        self.layer3 = stage(512, STAGES[2])
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(self.avgpool(x), 1))


def conv_bn_relu(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(cout), nn.ReLU(inplace=True)]


class InvertedResidual(nn.Module):
    """Widen 1x1, depthwise 3x3, narrow 1x1 without activation; the input is added where the shape stays the same."""

    def __init__(self, cin: int, cout: int, stride: int, expansion: int):
        super().__init__()
        wide = cin * expansion
        self.residual = stride == 1 and cin == cout
        self.conv = nn.Sequential(
            *conv_bn_relu(cin, wide, 1),
            *conv_bn_relu(wide, wide, 3, stride, groups=wide),
            nn.Conv2d(wide, cout, 1, bias=False),
            nn.BatchNorm2d(cout),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class CifarMobileNetV2(nn.Module):
    """Expansion 6, width 0.5. Images [N, 3, H, W] floating -> logits [N, num_classes]; maps from H/2 down to H/16."""

    def __init__(self, num_classes: int, width: float = 0.5):
        super().__init__()
        cin = int(32 * width)
        self.conv1 = nn.Sequential(*conv_bn_relu(3, cin, 3, stride=2))
        self.blocks = nn.Sequential()
        for expansion, full_width, count, stride in GROUPS:
            cout = int(full_width * width)
            self.blocks.append(stack(partial(InvertedResidual, expansion=expansion), count, cin, cout, stride))
            cin = cout
        self.conv2 = nn.Sequential(*conv_bn_relu(cin, FEATURES, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Linear(FEATURES, num_classes))
        he_init(self, linear_std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.blocks(self.conv1(x)))
        return self.classifier(torch.flatten(self.avgpool(x), 1))
