"""CIFAR ResNets: 6n+2 layers in three stages of n basic blocks.

Source: He et al. 2016, arXiv:1512.03385, section 4.2. As in the distillation literature (RepDistiller,
arXiv:1910.10699) a change of shape is a 1x1 convolution + BN on the shortcut, not the paper's zero padding, and the
"x4" nets are four times as wide with a stem of 32. Submodules carry RepDistiller's names, so its checkpoints load.
Departures: the average pool takes any map, so any image size works.
"""

import torch
from torch import Tensor, nn

from .init import he_init

DEPTHS = (8, 14, 20, 26, 32, 44, 56, 110)
WIDTHS = (16, 16, 32, 64)  # stem, then the three stages
WIDTHS_X4 = (32, 64, 128, 256)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, [N, cin, H, W] -> [N, cout, H/stride, W/stride], ReLU after the sum."""

    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or cin != cout:
            self.downsample = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)


def stage(blocks: int, cin: int, cout: int, stride: int) -> nn.Sequential:
    """`blocks` basic blocks; the first changes width and resolution."""
    return nn.Sequential(BasicBlock(cin, cout, stride), *(BasicBlock(cout, cout, 1) for _ in range(blocks - 1)))


class CifarResNet(nn.Module):
    """Images [N, 3, H, W] floating -> logits [N, num_classes]; stage maps at H, H/2, H/4."""

    def __init__(self, depth: int, num_classes: int, widths: tuple[int, int, int, int] = WIDTHS):
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = stage(blocks, widths[0], widths[1], 1)
        self.layer2 = stage(blocks, widths[1], widths[2], 2)
        self.layer3 = stage(blocks, widths[2], widths[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[3], num_classes)
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))
