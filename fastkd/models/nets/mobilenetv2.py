"""The CIFAR MobileNetV2 of the distillation literature: expansion 6, width 0.5, 1280 features.

Source: Sandler et al. 2018, arXiv:1801.04381, with the strides of RepDistiller (arXiv:1910.10699): 2 in the stem, 1
in the second group. Names as there, so its checkpoints load.
Departures: the average pool takes any map, so any image size works.
"""

import torch
from torch import Tensor, nn

from .init import he_init

FEATURES = 1280
GROUPS = (  # expansion, width before the multiplier, blocks, stride of the first
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


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
    """Images [N, 3, H, W] floating -> logits [N, num_classes]; maps from H/2 down to H/16."""

    def __init__(self, num_classes: int, width: float = 0.5):
        super().__init__()
        cin = int(32 * width)
        self.conv1 = nn.Sequential(*conv_bn_relu(3, cin, 3, stride=2))
        self.blocks = nn.Sequential()
        for expansion, full_width, count, stride in GROUPS:
            cout = int(full_width * width)
            first = InvertedResidual(cin, cout, stride, expansion)
            rest = (InvertedResidual(cout, cout, 1, expansion) for _ in range(count - 1))
            self.blocks.append(nn.Sequential(first, *rest))
            cin = cout
        self.conv2 = nn.Sequential(*conv_bn_relu(cin, FEATURES, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Linear(FEATURES, num_classes))
        he_init(self, linear_std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.blocks(self.conv1(x)))
        return self.classifier(torch.flatten(self.avgpool(x), 1))
