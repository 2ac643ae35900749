"""The ShuffleNets and the bottleneck ResNet of the CIFAR benchmark: keys, parameters, and a forward by formula."""

import pytest
import torch
import torch.nn.functional as F

from fastkd.errors import UserError
from fastkd.models import create_model, staged

KEYS = {  # of RepDistiller's and mdistiller's checkpoints
    "shufflenet_v1": ["conv1.weight", "layer1.0.conv3.weight", "layer3.3.bn3.running_var", "linear.bias"],
    "shufflenet_v2": ["layer1.0.conv5.weight", "layer2.7.bn3.num_batches_tracked", "conv2.weight", "bn2.bias"],
    "cifar_resnet50": ["layer1.0.shortcut.0.weight", "layer3.0.shortcut.1.bias", "layer4.2.bn3.bias", "linear.weight"],
}


def norm(state, name, x):
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    scale = state[f"{name}.weight"] / (var + 1e-5).sqrt()
    return (x - mean[:, None, None]) * scale[:, None, None] + state[f"{name}.bias"][:, None, None]


def conv(state, prefix, number, x, stride=1, groups=1):
    """Convolution `number` and its BatchNorm."""
    weight = state[f"{prefix}conv{number}.weight"]
    x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)
    return norm(state, f"{prefix}bn{number}", x)


def shuffled(x, groups):
    size = x.shape[1] // groups
    return x[:, [group * size + place for place in range(size) for group in range(groups)]]


def grouped_block(state, prefix, x, stride, first):
    y = shuffled(conv(state, prefix, 1, x, groups=first).relu(), first)
    y = conv(state, prefix, 2, y, stride, y.shape[1]).relu()
    y = conv(state, prefix, 3, y, groups=3)
    return (torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1) if stride == 2 else y + x).relu()


def shufflenet_v1(state, x):
    x = conv(state, "", 1, x).relu()
    maps = []
    for stage, count in (("layer1", 4), ("layer2", 8), ("layer3", 4)):
        for block in range(count):
            first = 1 if (stage, block) == ("layer1", 0) else 3
            x = grouped_block(state, f"{stage}.{block}.", x, 1 if block else 2, first)
        maps.append(x)
    return x, maps


def shufflenet_v2(state, x):
    x = conv(state, "", 1, x).relu()
    maps = []
    for stage, count in (("layer1", 4), ("layer2", 8), ("layer3", 4)):
        for block in range(count):
            prefix = f"{stage}.{block}."
            if block:
                half = x.shape[1] // 2
                y = conv(state, prefix, 1, x[:, half:]).relu()
                y = conv(state, prefix, 3, conv(state, prefix, 2, y, groups=half)).relu()
                x = shuffled(torch.cat([x[:, :half], y], 1), 2)
                continue
            left = conv(state, prefix, 2, conv(state, prefix, 1, x, 2, x.shape[1])).relu()
            y = conv(state, prefix, 3, x).relu()
            y = conv(state, prefix, 5, conv(state, prefix, 4, y, 2, y.shape[1])).relu()
            x = shuffled(torch.cat([left, y], 1), 2)
        maps.append(x)
    return conv(state, "", 2, x).relu(), maps


def cifar_resnet50(state, x):
    x = conv(state, "", 1, x).relu()
    maps = []
    for stage, count in (("layer1", 3), ("layer2", 4), ("layer3", 6), ("layer4", 3)):
        for block in range(count):
            prefix, stride = f"{stage}.{block}.", 2 if block == 0 and stage != "layer1" else 1
            y = conv(state, prefix, 2, conv(state, prefix, 1, x).relu(), stride).relu()
            shortcut = x
            if block == 0:
                shortcut = F.conv2d(x, state[f"{prefix}shortcut.0.weight"], stride=stride)
                shortcut = norm(state, f"{prefix}shortcut.1", shortcut)
            x = (conv(state, prefix, 3, y) + shortcut).relu()
        maps.append(x)
    return x, maps


FORMULAS = {"shufflenet_v1": shufflenet_v1, "shufflenet_v2": shufflenet_v2, "cifar_resnet50": cifar_resnet50}


@pytest.mark.parametrize("name", FORMULAS)
def test_logits_and_maps_follow_the_formula(name):
    torch.manual_seed(0)
    net = create_model(name, 7).double()
    net(torch.randn(4, 3, 32, 32, dtype=torch.float64))  # so that the running statistics are not 0 and 1
    net.eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        logits, maps = staged(net).features(x)
        top, wanted = FORMULAS[name](net.state_dict(), x)
        by_hand = top.mean((2, 3)) @ net.linear.weight.T + net.linear.bias
    torch.testing.assert_close(logits, by_hand)
    torch.testing.assert_close(logits, net(x), rtol=0, atol=0)
    assert len(maps) == len(wanted)
    for ours, theirs in zip(maps, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", KEYS)
def test_names_are_those_of_published_checkpoints(name):
    with torch.device("meta"):
        assert set(KEYS[name]) <= create_model(name, 100).state_dict().keys()


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("ShuffleV1", "shufflenet_v1"),
        ("ShuffleNetV2", "shufflenet_v2"),
        ("MobileNetV2", "mobilenetv2"),
        ("mobile_half", "mobilenetv2"),
        ("ResNet50", "cifar_resnet50"),
        ("wrn-40-2", "wrn_40_2"),
        ("resnet50", "torchvision/resnet50"),
    ],
)
def test_spellings_of_other_codes_are_suggested(name, ours):
    with pytest.raises(UserError, match=f"did you mean '{ours}'"):
        create_model(name, 10)
