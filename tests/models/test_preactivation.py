"""Maps before the activation: the net's own logits and statistics, and the maps that hooks on the net would see."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import VGG, ResNet
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vgg import make_layers

from fastkd.errors import UserError
from fastkd.kernels import bn_margin
from fastkd.models import PreActivation, create_model, staged


def tiny_vgg(batch_norm: bool = True) -> nn.Module:
    net = VGG(make_layers([8, "M", 16, "M", 32, 32, "M"], batch_norm), dropout=0.5)
    net.classifier = nn.Sequential(nn.Linear(32 * 49, 3), nn.Dropout())
    return net


def tiny_timm(name: str) -> nn.Module:
    return timm.create_model(name, num_classes=3, channels=(8, 8, 16, 16), stem_width=8, drop_rate=0.5)


NETS = {  # name: (how to build it, the norms' names)
    "resnet8": (lambda: create_model("resnet8", 3), [f"layer{k}.0.bn2" for k in (1, 2, 3)]),
    "resnet14": (lambda: create_model("resnet14", 3), [f"layer{k}.1.bn2" for k in (1, 2, 3)]),
    "vgg13": (lambda: create_model("vgg13", 3), ["block1.4", "block2.4", "block3.4", "block4.4"]),
    "wrn_10_1": (lambda: create_model("wrn_10_1", 3), ["block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"]),
    "wrn_16_2": (lambda: create_model("wrn_16_2", 3), ["block2.layer.0.bn1", "block3.layer.0.bn1", "bn1"]),
    "mobilenet": (lambda: create_model("mobilenet", 3), ["layer1.4.bn2", "layer2.5.bn2", "layer3.1.bn2"]),
    "torchvision basic": (
        lambda: ResNet(BasicBlock, [1, 2, 1, 1], num_classes=3),
        ["layer1.0.bn2", "layer2.1.bn2", "layer3.0.bn2", "layer4.0.bn2"],
    ),
    "torchvision bottleneck": (
        lambda: ResNet(Bottleneck, [1, 1, 1, 1], num_classes=3, width_per_group=8),
        [f"layer{k}.0.bn3" for k in (1, 2, 3, 4)],
    ),
    "torchvision vgg": (tiny_vgg, ["features.5", "features.12"]),
    "timm resnet18": (lambda: tiny_timm("resnet18"), [f"layer{k}.1.bn2" for k in (1, 2, 3, 4)]),
    "timm seresnet18": (lambda: tiny_timm("seresnet18"), [f"layer{k}.1.bn2" for k in (1, 2, 3, 4)]),
    "mobilenetv2": (
        lambda: create_model("mobilenetv2", 3),
        ["blocks.1.1.conv.7", "blocks.2.2.conv.7", "blocks.4.2.conv.7", "blocks.6.0.conv.7"],
    ),
    "timm resnet26d": (lambda: tiny_timm("resnet26d"), [f"layer{k}.1.bn3" for k in (1, 2, 3, 4)]),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = NETS[name][0]()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.bias)  # or an untrained norm feeds nothing but zeros to the ReLU (timm's last ones)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    return model


def images(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NETS)
def test_logits_and_statistics_are_those_of_the_net(name):
    model = build(name)
    twin, view, keys = copy.deepcopy(model), PreActivation(model), list(model.state_dict())
    for mode in (True, False):
        view.train(mode), twin.train(mode)
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                torch.manual_seed(2)
                expected = twin(images())
                torch.manual_seed(2)
                assert torch.equal(view(images()), expected)
    assert list(model.state_dict()) == keys
    assert all(torch.equal(tensor, twin.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert {id(p) for p in view.parameters()} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("name", [name for name in NETS if name not in ("wrn_10_1", "wrn_16_2", "mobilenetv2")])
def test_maps_are_those_before_the_last_relu(name):
    model = build(name).eval()
    with torch.no_grad():
        maps, taps = PreActivation(model).features(images())[1], staged(model).features(images())[1]
    assert len(maps) == len(taps)
    for before, after in zip(maps, taps, strict=True):
        assert torch.equal(before.relu(), after) and before.min() < 0


@pytest.mark.parametrize("mode", [True, False])
def test_maps_of_a_wide_resnet_are_normalised_by_what_follows(mode):
    model = build("wrn_16_2").train(mode)
    twin, view = copy.deepcopy(model), PreActivation(model)
    with torch.no_grad():
        maps, taps = view.features(images())[1], staged(twin).features(images())[1]
        for before, tap, norm in zip(maps, taps, view.norms, strict=True):
            assert torch.equal(before, F.batch_norm(tap, *statistics(norm, mode), norm.weight, norm.bias, mode, 0.0))


def statistics(norm: nn.BatchNorm2d, mode: bool) -> tuple:
    return (None, None) if mode else (norm.running_mean, norm.running_var)


@pytest.mark.parametrize("name", NETS)
def test_norms_feed_the_maps(name):
    model = build(name)
    view, names = PreActivation(model), {id(module): path for path, module in model.named_modules()}
    assert [names[id(norm)] for norm in view.norms] == NETS[name][1]
    for norm, before in zip(view.norms, view.features(images())[1], strict=True):
        assert bn_margin(norm.weight, norm.bias).shape == before.shape[1:2]


@pytest.mark.parametrize("name", ["resnet8", "wrn_10_1", "timm resnet18", "torchvision vgg"])
def test_gradients_of_maps_and_logits_arrive(name):
    model = build(name)
    logits, maps = PreActivation(model).features(images())
    kept = [before.detach().clone() for before in maps]
    (logits.square().sum() + sum(before.square().sum() for before in maps)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(maps, kept, strict=True))  # nothing wrote into a map


def test_gradients_equal_those_of_the_net():
    model = build("timm resnet18").double()
    twin = copy.deepcopy(model)
    for forward in (twin, PreActivation(model)):
        torch.manual_seed(2)  # of the dropout
        forward(images().double()).square().sum().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("name", ["resnet8", "wrn_10_1"])
def test_the_relus_of_the_net_stay_in_place(name):
    model = build(name)
    PreActivation(model)(images())
    assert all(relu.inplace for relu in model.modules() if isinstance(relu, nn.ReLU))


def test_a_copy_is_a_view_of_its_own():
    view = PreActivation(build("wrn_10_1").eval())
    twin, before = copy.deepcopy(view), view(images())
    with torch.no_grad():
        view.norms[0].weight.add_(1)
    assert torch.equal(twin(images()), before) and torch.equal(twin.model(images()), before)
    assert not torch.equal(view(images()), before)
    assert any(twin.norms[0] is module for module in twin.model.modules())


@pytest.mark.parametrize("name", ["resnet8", "wrn_10_1"])
def test_compiles_without_a_break(name):
    view = PreActivation(build(name).eval())
    compiled = torch.compile(view.features, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(images())[0], view(images()))


class ByModeBlock(BasicBlock):
    def forward(self, x):
        return super().forward(x if self.training else x * 1)


class Rewritten(BasicBlock):
    def forward(self, x):
        return super().forward(x) + 1


UNSUPPORTED = {
    "resnetv2": (lambda: timm.create_model("resnetv2_18"), "its stage 0 is a ResNetStage, not a sequence of blocks"),
    "vgg without norm": (
        lambda: tiny_vgg(False),
        "Sequential around the end of stage 0 does not end with a ReLU after",
    ),
    "two forwards": (lambda: ResNet(ByModeBlock, [1, 1, 1, 1]), "ByModeBlock is not the same in train and eval mode"),
    "another end": (lambda: ResNet(Rewritten, [1, 1, 1, 1]), "Rewritten around the end of stage 0 does not end"),
    "no stages": (lambda: nn.Sequential(nn.Linear(2, 2)), "the stages of Sequential are not known"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_nets_are_refused(name):
    build, reason = UNSUPPORTED[name]
    with pytest.raises(UserError, match=reason) as error:
        PreActivation(build())
    assert "\n" not in str(error.value)


def test_the_view_has_no_hooks():
    model = build("resnet8")
    PreActivation(model)(images())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
