"""CIFAR VGGs: five blocks of 3x3 convolutions with BN, average pool, one linear layer.

Source: Simonyan and Zisserman 2015, arXiv:1409.1556, in the form of RepDistiller (arXiv:1910.10699): the classifier
is one linear layer, and a max-pool stands between the blocks except before the last one. Names as there, so its
checkpoints load.
Departures: RepDistiller pools before the last block too when the images are 64 px high; here the image size changes
nothing.
"""

import torch
from torch import Tensor, nn

from .init import he_init

WIDTHS = (64, 128, 256, 512, 512)
CONVOLUTIONS = {"vgg8": (1, 1, 1, 1, 1), "vgg13": (2, 2, 2, 2, 2)}  # per block


def block(convolutions: int, cin: int, cout: int) -> nn.Sequential:
    """Conv3x3 (with bias) + BN + ReLU, `convolutions` times: [N, cin, H, W] -> [N, cout, H, W]."""
    layers: list[nn.Module] = []
    for i in range(convolutions):
        conv = nn.Conv2d(cout if i else cin, cout, 3, 1, 1)
        layers += [conv, nn.BatchNorm2d(cout), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class CifarVGG(nn.Module):
    """Images [N, 3, H, W] floating, H and W at least 8 -> logits [N, num_classes]; blocks at H, H/2, H/4, H/8, H/8."""

    block0: nn.Sequential
    block1: nn.Sequential
    block2: nn.Sequential
    block3: nn.Sequential
    block4: nn.Sequential

    def __init__(self, convolutions: tuple[int, ...], num_classes: int):
        super().__init__()
        cin = (3, *WIDTHS)
        for i, (n, cout) in enumerate(zip(convolutions, WIDTHS, strict=True)):
            setattr(self, f"block{i}", block(n, cin[i], cout))
        self.pool = nn.MaxPool2d(2, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(WIDTHS[-1], num_classes)
        he_init(self, linear_std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.block0(x))
        x = self.pool(self.block1(x))
        x = self.pool(self.block2(x))
        x = self.block4(self.block3(x))
        return self.classifier(torch.flatten(self.avgpool(x), 1))
