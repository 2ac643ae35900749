"""Wide ResNets for CIFAR: WRN-D-K, three groups of (D-4)/6 pre-activation blocks, K times the widths 16, 32, 64.

Source: Zagoruyko and Komodakis 2016, arXiv:1605.07146, without dropout. Submodules carry the names of the widespread
PyTorch port (also RepDistiller's), so its checkpoints load.
Departures: the average pool takes any map, so any image size works.
"""

import torch
from torch import Tensor, nn

from .init import he_init


class Block(nn.Module):
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


class Group(nn.Module):
    """`blocks` blocks; the first changes width and resolution."""

    def __init__(self, blocks: int, cin: int, cout: int, stride: int):
        super().__init__()
        self.layer = nn.Sequential(Block(cin, cout, stride), *(Block(cout, cout, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """Images [N, 3, H, W] floating -> logits [N, num_classes]; group outputs at H, H/2, H/4, not activated."""

    def __init__(self, depth: int, width: int, num_classes: int):
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.block1 = Group(blocks, 16, 16 * width, 1)
        self.block2 = Group(blocks, 16 * width, 32 * width, 2)
        self.block3 = Group(blocks, 32 * width, 64 * width, 2)
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
