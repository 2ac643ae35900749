"""CIFAR ResNets and Wide ResNets. Submodules carry RepDistiller's names (arXiv:1910.10699), so its checkpoints load.

Source of the ResNets: He et al. 2016, arXiv:1512.03385, section 4.2. As in the distillation literature (RepDistiller)
a change of shape is a 1x1 convolution + BN on the shortcut, not the paper's zero padding, and the "x4" nets are four
times as wide with a stem of 32. Source of the Wide ResNets: Zagoruyko and Komodakis 2016, arXiv:1605.07146, without
dropout.
Departures: the average pool takes any map, so any image size works.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

DEPTHS = (8, 14, 20, 26, 32, 44, 56, 110)
WIDTHS = (16, 16, 32, 64)  # stem, then the three stages
WIDTHS_X4 = (32, 64, 128, 256)


def stack(
    block: Callable[[int, int, int], nn.Module], count: int, cin: int, cout: int, stride: int = 1
) -> nn.Sequential:
    """`count` blocks of (cin, cout, stride); the first changes width and resolution."""
    return nn.Sequential(block(cin, cout, stride), *(block(cout, cout, 1) for _ in range(count - 1)))


def he_init(model: nn.Module, linear_std: float | None = None) -> None:
    """Convolutions from N(0, 2 / fan_out) with bias 0 (He et al. 2015, arXiv:1502.01852); BN as torch has it.

    `linear_std`: linear layers from N(0, linear_std^2) with bias 0; None leaves torch's default. In place.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, std=linear_std)
            nn.init.zeros_(module.bias)


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


class CifarResNet(nn.Module):
    """6n+2 layers in three stages of n basic blocks.

    Images [N, 3, H, W] floating -> logits [N, num_classes]; stage maps at H, H/2, H/4.
    """

    def __init__(self, depth: int, num_classes: int, widths: tuple[int, int, int, int] = WIDTHS):
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = stack(BasicBlock, blocks, widths[0], widths[1])
        self.layer2 = stack(BasicBlock, blocks, widths[1], widths[2], stride=2)
        self.layer3 = stack(BasicBlock, blocks, widths[2], widths[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[3], num_classes)
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Bottleneck(nn.Module):
    """Convolutions 1x1, 3x3, 1x1 and a shortcut, [N, cin, H, W] -> [N, cout, H/stride, W/stride], ReLU last."""

    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        width = cout // 4
        self.conv1 = nn.Conv2d(cin, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, cout, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(cout)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or cin != cout:
            self.shortcut = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
        return self.relu(y + self.shortcut(x))


class CifarResNet50(nn.Module):
    """ResNet-50 with a 3x3 stem of stride 1 and no pool (RepDistiller's ResNet50).

    Images [N, 3, H, W] floating -> logits [N, num_classes]; 256, 512, 1024, 2048 channels at H, H/2, H/4, H/8.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = stack(Bottleneck, 3, 64, 256)
        self.layer2 = stack(Bottleneck, 4, 256, 512, stride=2)
        self.layer3 = stack(Bottleneck, 6, 512, 1024, stride=2)
        self.layer4 = stack(Bottleneck, 3, 1024, 2048, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(2048, num_classes)
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(torch.flatten(self.avgpool(x), 1))


class WideBlock(nn.Module):
    """BN, ReLU, conv3x3 twice, plus a shortcut: [N, cin, H, W] -> [N, cout, H/stride, W/stride], not activated.

    Where the shape changes, the shortcut is a 1x1 convolution of the ACTIVATED input; elsewhere it is the input itself.
    """

    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(cin)
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.convShortcut = None if stride == 1 and cin == cout else nn.Conv2d(cin, cout, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        return shortcut + self.conv2(self.relu(self.bn2(self.conv1(active))))


class WideGroup(nn.Module):
    """A stack of wide blocks under the name `layer`."""

    def __init__(self, blocks: int, cin: int, cout: int, stride: int):
        super().__init__()
        self.layer = stack(WideBlock, blocks, cin, cout, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """WRN-D-K: three groups of (D-4)/6 pre-activation blocks, K times the widths 16, 32, 64.

    Images [N, 3, H, W] floating -> logits [N, num_classes]; group outputs at H, H/2, H/4, not activated.
    """

    def __init__(self, depth: int, width: int, num_classes: int):
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.block1 = WideGroup(blocks, 16, 16 * width, 1)
        self.block2 = WideGroup(blocks, 16 * width, 32 * width, 2)
        self.block3 = WideGroup(blocks, 32 * width, 64 * width, 2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64 * width, num_classes)
        he_init(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = self.relu(self.bn1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))
