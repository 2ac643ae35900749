"""The CIFAR MobileNet of DCM: a 3x3 stem of 32 channels, then thirteen depthwise-separable blocks in three stages.

Source: Howard et al. 2017, arXiv:1704.04861, with the strides and stages of DCM's code (ECCV 2020, arXiv:2008.07816),
whose nets also start from torch's default initialisation.
Departures: the average pool takes any map, so any image size works.
"""

import torch
from torch import Tensor, nn

STAGES = (  # (width, stride) of each block
    ((64, 1), (128, 1), (128, 1), (256, 1), (256, 1)),
    ((512, 2), (512, 1), (512, 1), (512, 1), (512, 1), (512, 1)),
    ((1024, 2), (1024, 1)),
)


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
    """Images [N, 3, H, W] floating -> logits [N, num_classes]; 256, 512, 1024 channels at H, H/2, H/4."""

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
