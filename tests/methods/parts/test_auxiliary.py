"""DCM's heads: those of the authors' code by their parameters, worked out by hand, and the rule for other nets."""

import copy

import pytest
import timm
import torch
from torch import nn
from torchvision.models import VGG, MobileNetV2, ResNet
from torchvision.models.convnext import CNBlock, CNBlockConfig, ConvNeXt
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import make_layers

from fastkd.errors import UserError
from fastkd.methods.parts.auxiliary import auxiliary_heads
from fastkd.models import create_model, staged
from fastkd.models.nets.resnet import WideBlock


def block(cin: int, cout: int) -> int:
    """Parameters of a WRN block: two BNs, two 3x3 convolutions, and a 1x1 shortcut where the width changes."""
    return 2 * cin + 9 * cin * cout + 2 * cout + 9 * cout * cout + (cin * cout if cin != cout else 0)


def top(width: int, classes: int = 10) -> int:
    return 2 * width + width * classes + classes  # BN, FC


WIDE = {
    "wrn_10_1": [block(16, 32) + block(32, 64) + top(64), block(32, 128) + top(128)],  # n = 1
    "wrn_16_1": [91306, 485706],  # n = 2, on paper
    "wrn_22_2": [  # n = 3, floor(n/2) = 1
        block(32, 64) + 2 * block(64, 64) + block(64, 128) + top(128),
        block(64, 256) + 2 * block(256, 256) + top(256),
    ],
}


def separable(cin: int, cout: int) -> int:
    return 9 * cin + 2 * cin + cin * cout + 2 * cout


MOBILE = [
    separable(256, 512) + 3 * separable(512, 512) + separable(512, 1024) + separable(1024, 1024) + 1024 * 10 + 10,
    separable(512, 2048) + separable(2048, 2048) + 2048 * 10 + 10,
]


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def logits(model: nn.Module, heads: nn.ModuleList, pixels: int = 32) -> list[torch.Tensor]:
    images = torch.randn(2, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    taps = staged(model).features(images)[1]
    assert len(heads) == len(taps) - 1
    return [head(tap) for head, tap in zip(heads, taps, strict=False)]


@pytest.mark.parametrize("name", WIDE)
def test_wide_resnets(name):
    model = create_model(name, 10)
    heads = auxiliary_heads(model)
    assert [size(head) for head in heads] == WIDE[name]
    assert [out.shape for out in logits(model, heads, 8)] == [(2, 10), (2, 10)]
    assert all(head[-1].bias.eq(0).all() for head in heads)


def test_wide_resnet_blocks():
    heads = auxiliary_heads(create_model("wrn_28_1", 10))  # n = 4
    blocks = [
        [(m.conv1.out_channels, m.conv1.stride[0]) for m in h.modules() if isinstance(m, WideBlock)] for h in heads
    ]
    assert blocks[0] == [(32, 2), (32, 1), (32, 1), (32, 1), (64, 2), (64, 1)]
    assert blocks[1] == [(128, 2), (128, 1), (128, 1), (128, 1)]


def test_mobilenet():
    model = create_model("mobilenet", 10)
    heads = auxiliary_heads(model)
    assert [size(head) for head in heads] == MOBILE == [2545418, 5299722]
    assert [out.shape for out in logits(model, heads, 8)] == [(2, 10), (2, 10)]


def basic(cin: int, cout: int) -> int:
    shortcut = cin * cout + 2 * cout if cin != cout else 0
    return 9 * cin * cout + 9 * cout * cout + 4 * cout + shortcut


def test_resnet_by_the_rule():
    model = create_model("resnet20", 10)  # 3 blocks per stage: 1 in the earliest head
    heads = auxiliary_heads(model)
    assert size(heads[0]) == basic(16, 32) + basic(32, 64) + 650
    assert size(heads[1]) == basic(32, 64) + 2 * basic(64, 64) + 650
    assert [out.shape for out in logits(model, heads)] == [(2, 10), (2, 10)]


SMALL = {
    "vgg13": lambda: create_model("vgg13", 3),
    "mobilenetv2": lambda: create_model("mobilenetv2", 3),
    "resnet8": lambda: create_model("resnet8", 3),
    "torchvision resnet": lambda: ResNet(BasicBlock, [1, 2, 1, 1], num_classes=3),
    "torchvision mobilenet_v2": lambda: MobileNetV2(3, width_mult=0.1),
    "torchvision vgg": lambda: tiny_vgg(),
    "torchvision convnext": lambda: tiny_convnext(),
    "torchvision regnet": lambda: create_model("torchvision/regnet_y_400mf", 3),
    "timm resnet18": lambda: timm.create_model("resnet18", num_classes=3, channels=(8, 8, 16, 16), stem_width=8),
    "timm mobilenetv2": lambda: timm.create_model("mobilenetv2_035", num_classes=3),
    "timm efficientnet": lambda: create_model("timm/efficientnet_b0", 3),
    "timm mobilenetv3": lambda: timm.create_model("mobilenetv3_small_050", num_classes=3),
    "timm convnext": lambda: timm.create_model("convnext_atto", dims=(8, 8, 16, 16), depths=(1, 2, 6, 2)),
    "timm regnet": lambda: timm.create_model("regnetx_002", num_classes=3),
    "timm resnetv2": lambda: timm.create_model("resnetv2_18", num_classes=3),
}


def tiny_vgg() -> nn.Module:
    net = VGG(make_layers([8, "M", 16, "M", 32, 32, 32, "M", 32, 32, "M"], batch_norm=False))
    net.classifier = nn.Sequential(nn.Linear(32 * 49, 3))
    return net


def tiny_convnext() -> nn.Module:
    return ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, 24, 5), CNBlockConfig(24, None, 2)], num_classes=3)


@pytest.mark.parametrize("name", SMALL)
def test_every_family_gives_logits_and_learns(name):
    torch.manual_seed(0)
    model = SMALL[name]()
    before = copy.deepcopy(model.state_dict())
    heads = auxiliary_heads(model.eval())
    outs = logits(model, heads, 64)
    classes = outs[0].shape[1]
    assert all(out.shape == (2, classes) for out in outs) and classes in (3, 1000)
    sum(out.square().sum() for out in outs).backward()
    assert all(p.grad is not None for p in heads.parameters()) and all(m.training for m in heads.modules())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def layers(module: nn.Module, kind: type) -> int:
    return sum(isinstance(m, kind) for m in module.modules())


def test_half_depth_by_the_layers_that_stay():
    mobile = auxiliary_heads(create_model("mobilenetv2", 3))[0]
    assert [len(part) for part in mobile[:-1]] == [1, 2 + 1, 1 + 1]  # of 3, 4 + 3 and 3 + 1
    vgg = auxiliary_heads(create_model("vgg13", 3))[0]
    assert layers(vgg, nn.Conv2d) == 1 + 2  # of 2 and 4
    assert [type(layer).__name__ for layer in auxiliary_heads(tiny_vgg())[0][0]] == ["MaxPool2d", "Conv2d", "ReLU"]
    convnext = auxiliary_heads(tiny_convnext())
    assert [layers(head, CNBlock) for head in convnext] == [2 + 1, 2]  # of 5 and 2


def test_no_weight_is_shared_or_kept():
    model = create_model("resnet8", 3)
    heads = auxiliary_heads(model)
    theirs, ours = [{p.data_ptr() for p in net.parameters()} for net in (model, heads)]
    assert not theirs & ours and len(ours) == len(list(heads.parameters()))
    assert not torch.equal(heads[1][0][0].conv1.weight, model.layer3[0].conv1.weight)


@pytest.mark.parametrize("name", ["wrn_10_1", "mobilenet", "resnet8"])
def test_heads_follow_the_dtype(name):
    assert {p.dtype for p in auxiliary_heads(create_model(name, 3).double()).parameters()} == {torch.float64}


def test_unknown_stages():
    with pytest.raises(UserError, match="the stages of Sequential are not known"):
        auxiliary_heads(nn.Sequential(nn.Conv2d(3, 4, 3)))
