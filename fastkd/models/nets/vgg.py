"""CIFAR VGGs: five blocks of 3x3 convolutions with BN, average pool, one linear layer.

Source: Simonyan and Zisserman 2015, arXiv:1409.1556, in the form of RepDistiller (arXiv:1910.10699): the classifier
is one linear layer, and a max-pool stands between the blocks except before the last one. Names as there, so its
checkpoints load.
Departures: RepDistiller pools before the last block too when the images are 64 px high; here the image size changes
nothing.
"""

import torch
from torch import Tensor, nn

from .resnet import he_init

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

    def __init__(self, convolutions: tuple[int, ...], num_classes: int):
        super().__init__()
        self.block0 = block(convolutions[0], 3, 64)
        self.block1 = block(convolutions[1], 64, 128)
        self.block2 = block(convolutions[2], 128, 256)
        self.block3 = block(convolutions[3], 256, 512)
        self.block4 = block(convolutions[4], 512, 512)
        self.pool = nn.MaxPool2d(2, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(512, num_classes)
        he_init(self, linear_std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.block0(x))
        x = self.pool(self.block1(x))
        x = self.pool(self.block2(x))
        x = self.block4(self.block3(x))
        return self.classifier(torch.flatten(self.avgpool(x), 1))
