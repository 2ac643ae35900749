"""The CIFAR ShuffleNets of the distillation literature.

V1: Zhang et al. 2018, arXiv:1707.01083, with 3 groups. V2: Ma et al. 2018, arXiv:1807.11164, width 1. Both in the form
of RepDistiller (arXiv:1910.10699): a 1x1 stem of 24 channels without pool, and three stages, each of which halves the
resolution. V1 has 4, 8, 4 blocks. V2 has a reducing block and 3, 7, 3 more. They start from torch's default
initialisation. Names as there, so its checkpoints load.
Departures: the average pool takes any map, so any image size works.
"""

import torch
from torch import Tensor, nn

from .resnet import stack

STEM = 24  # channels
GROUPS = 3  # of V1


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Channel c of group g goes to place c * groups + g: [N, C, H, W] -> [N, C, H, W]."""
    N, C, H, W = x.shape
    return x.view(N, groups, C // groups, H, W).transpose(1, 2).reshape(N, C, H, W)


def conv_bn(cin: int, cout: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(cout)


class GroupedBottleneck(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1: [N, cin, H, W] -> [N, cout, H/stride, W/stride].

    The input is added, or, at stride 2, its average pool is appended to cout - cin computed channels.
    """

    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        computed = cout - cin if stride == 2 else cout
        middle = computed // 4
        self.groups = 1 if cin == STEM else GROUPS
        self.conv1, self.bn1 = conv_bn(cin, middle, groups=self.groups)
        self.conv2, self.bn2 = conv_bn(middle, middle, 3, stride, middle)
        self.conv3, self.bn3 = conv_bn(middle, computed, groups=GROUPS)
        self.shortcut = nn.AvgPool2d(3, 2, 1) if stride == 2 else None
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = shuffle(self.relu(self.bn1(self.conv1(x))), self.groups)
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
        return self.relu(y + x if self.shortcut is None else torch.cat([y, self.shortcut(x)], 1))


class SplitBlock(nn.Module):
    """The first half of the channels passes, the second is computed; then a shuffle. The shape stays the same."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.conv1, self.bn1 = conv_bn(half, half)
        self.conv2, self.bn2 = conv_bn(half, half, 3, groups=half)
        self.conv3, self.bn3 = conv_bn(half, half)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        passed, y = self._halves(x)
        return shuffle(torch.cat([passed, self.relu(y)], 1), 2)

    def forward_with_map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and both halves side by side before the last ReLU, not shuffled: RepDistiller's `preact`."""
        passed, y = self._halves(x)
        return shuffle(torch.cat([passed, torch.relu(y)], 1), 2), torch.cat([passed, y], 1)

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        passed, y = x.chunk(2, 1)
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(y)))))
        return passed, self.bn3(self.conv3(y))


class ReducingBlock(nn.Module):
    """Two branches of stride 2, side by side, then a shuffle: [N, cin, H, W] -> [N, cout, H/2, W/2]."""

    def __init__(self, cin: int, cout: int):
        super().__init__()
        half = cout // 2
        self.conv1, self.bn1 = conv_bn(cin, cin, 3, 2, cin)
        self.conv2, self.bn2 = conv_bn(cin, half)
        self.conv3, self.bn3 = conv_bn(cin, half)
        self.conv4, self.bn4 = conv_bn(half, half, 3, 2, half)
        self.conv5, self.bn5 = conv_bn(half, half)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        left = self.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        y = self.bn4(self.conv4(self.relu(self.bn3(self.conv3(x)))))
        return shuffle(torch.cat([left, self.relu(self.bn5(self.conv5(y)))], 1), 2)


class CifarShuffleNetV1(nn.Module):
    """Images [N, 3, H, W] floating -> logits [N, num_classes]; maps of 240, 480, 960 channels at H/2, H/4, H/8."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(3, STEM)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = stack(GroupedBottleneck, 4, STEM, 240, stride=2)
        self.layer2 = stack(GroupedBottleneck, 8, 240, 480, stride=2)
        self.layer3 = stack(GroupedBottleneck, 4, 480, 960, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(960, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(self.avgpool(x), 1))


class CifarShuffleNetV2(nn.Module):
    """Images [N, 3, H, W] floating -> logits [N, num_classes]; maps of 116, 232, 464 channels at H/2, H/4, H/8.

    A 1x1 convolution to 1,024 channels comes after the last stage.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(3, STEM)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(ReducingBlock(STEM, 116), *(SplitBlock(116) for _ in range(3)))
        self.layer2 = nn.Sequential(ReducingBlock(116, 232), *(SplitBlock(232) for _ in range(7)))
        self.layer3 = nn.Sequential(ReducingBlock(232, 464), *(SplitBlock(464) for _ in range(3)))
        self.conv2, self.bn2 = conv_bn(464, 1024)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(self.layer3(self.layer2(self.layer1(x))))))
        return self.linear(torch.flatten(self.avgpool(x), 1))
