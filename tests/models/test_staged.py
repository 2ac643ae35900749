"""The staged view: the same logits to the bit, in both modes, and taps where the family's resolution changes."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from fastkd.errors import UserError
from fastkd.models import create_model, staged

# name: (channels of the taps, resolution of the taps as a divisor of the image's)
OURS = {
    "resnet8": ([16, 32, 64], [1, 2, 4]),
    "resnet8x4": ([64, 128, 256], [1, 2, 4]),
    "wrn_16_1": ([16, 32, 64], [1, 2, 4]),
    "vgg8": ([128, 256, 512, 512], [2, 4, 8, 8]),
    "vgg13": ([128, 256, 512, 512], [2, 4, 8, 8]),
    "mobilenet": ([256, 512, 1024], [1, 2, 4]),
    "mobilenetv2": ([12, 16, 48, 160], [2, 4, 8, 16]),
}
TORCHVISION = {
    "resnet18": ([64, 128, 256, 512], [4, 8, 16, 32]),
    "resnext50_32x4d": ([256, 512, 1024, 2048], [4, 8, 16, 32]),
    "mobilenet_v2": ([16, 24, 32, 96, 320], [2, 4, 8, 16, 32]),
    "mobilenet_v3_small": ([16, 24, 48, 96], [4, 8, 16, 32]),
    "efficientnet_b0": ([16, 24, 40, 112, 320], [2, 4, 8, 16, 32]),
    "efficientnet_v2_s": ([24, 48, 64, 160, 256], [2, 4, 8, 16, 32]),
    "regnet_x_400mf": ([32, 64, 160, 400], [4, 8, 16, 32]),
    "regnet_y_400mf": ([48, 104, 208, 440], [4, 8, 16, 32]),
    "convnext_tiny": ([96, 192, 384, 768], [4, 8, 16, 32]),
    "vgg11": ([128, 256, 512, 512], [2, 4, 8, 16]),
    "vgg11_bn": ([128, 256, 512, 512], [2, 4, 8, 16]),
}
TIMM = {
    "resnet10t": ([64, 128, 256, 512], [4, 8, 16, 32]),
    "resnext50_32x4d": ([256, 512, 1024, 2048], [4, 8, 16, 32]),
    "seresnet18": ([64, 128, 256, 512], [4, 8, 16, 32]),
    "resnetv2_18": ([64, 128, 256, 512], [4, 8, 16, 32]),
    "mobilenetv1_100": ([64, 128, 256, 512, 1024], [2, 4, 8, 16, 32]),
    "mobilenetv2_050": ([8, 16, 16, 48, 160], [2, 4, 8, 16, 32]),
    "mobilenetv3_small_050": ([8, 16, 24, 288], [4, 8, 16, 32]),
    "mobilenetv4_conv_small_050": ([16, 32, 48, 480], [4, 8, 16, 32]),
    "efficientnet_b0": ([16, 24, 40, 112, 320], [2, 4, 8, 16, 32]),
    "tf_efficientnetv2_b0": ([16, 32, 48, 112, 192], [2, 4, 8, 16, 32]),
    "regnetx_002": ([24, 56, 152, 368], [4, 8, 16, 32]),
    "regnety_002": ([24, 56, 152, 368], [4, 8, 16, 32]),
    "convnext_atto": ([40, 80, 160, 320], [4, 8, 16, 32]),
    "convnextv2_atto": ([40, 80, 160, 320], [4, 8, 16, 32]),
    "vgg11_bn": ([128, 256, 512, 512], [2, 4, 8, 16]),
}
FAMILIES = {
    **OURS,
    **{f"torchvision/{name}": taps for name, taps in TORCHVISION.items()},
    **{f"timm/{name}": taps for name, taps in TIMM.items()},
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "timm/vgg11_bn":
        return timm.create_model("vgg11_bn", num_classes=10, mlp_ratio=0.01, drop_rate=0.5)  # a small classifier
    model = create_model(name, 10)
    if name.startswith("torchvision/vgg"):
        model.classifier = nn.Sequential(nn.Linear(512 * 7 * 7, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 10))
    return model


def images(size: int = 32, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def check_same(model: nn.Module, view: nn.Module, x: torch.Tensor) -> None:
    """Equal to the bit in both modes, switched on either side, random numbers and batch statistics included."""
    twin = copy.deepcopy(model)
    for switch in (model, view):
        for mode in (True, False):
            switch.train(mode), twin.train(mode)
            with torch.no_grad():
                torch.manual_seed(2)
                expected = twin(x)
                torch.manual_seed(2)
                assert torch.equal(view(x), expected)
    assert all(torch.equal(tensor, twin.state_dict()[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    model = build(name)
    keys, x = list(model.state_dict()), images()
    view = staged(model)
    check_same(model, view, x)
    assert list(model.state_dict()) == keys
    assert {id(p) for p in view.parameters()} == {id(p) for p in model.parameters()}
    channels, divisors = FAMILIES[name]
    with torch.no_grad():
        logits, taps = view.features(x)
        assert torch.equal(logits, model(x))
    assert [tap.shape[1] for tap in taps] == channels and len(view.stages) == len(channels)
    assert [x.shape[2] // tap.shape[2] for tap in taps] == divisors


@pytest.mark.parametrize("name", ["timm/resnet10t", "timm/efficientnet_b0", "timm/mobilenetv3_small_050"])
def test_dropout_before_the_classifier_follows_the_mode(name):
    model = build(name)
    model.drop_rate = 0.5
    check_same(model, staged(model), images())
    view = staged(model.train())
    with torch.no_grad():
        assert not torch.equal(view.head(taps := view.features(images())[1][-1]), view.head(taps))
        model.eval()
        assert torch.equal(view.head(taps := view.features(images())[1][-1]), view.head(taps))


def test_wide_resnet_taps_are_not_activated():
    view = staged(build("wrn_16_1").eval())
    with torch.no_grad():
        logits, taps = view.features(images(32))
        assert all(tap.min() < 0 for tap in taps)
        assert torch.equal(view.head(view.stages[2](taps[1])), logits)  # last stage + head: the top of the net


@pytest.mark.parametrize("name", ["resnet14", "wrn_16_2", "vgg13", "mobilenet", "timm/mobilenetv2_050"])
def test_stages_are_sequences_of_blocks(name):
    assert all(isinstance(stage, nn.Sequential) and len(stage) > 0 for stage in staged(build(name)).stages)


def test_the_view_shares_and_trains_the_model():
    model = build("resnet8")
    view = staged(model)
    view(images(32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    view.eval()
    assert not any(m.training for m in model.modules())
    view.train()
    assert all(m.training for m in model.modules())


def test_copies_of_a_view_and_of_its_top_are_independent():
    view = staged(build("resnet8").eval())
    twin, top = copy.deepcopy(view), copy.deepcopy(nn.Sequential(view.stages[-1], view.head))
    with torch.no_grad():
        logits, taps = view.features(images(32))
        view.model.fc.bias += 1
        assert torch.equal(twin(images(32)), logits) and torch.equal(twin.model(images(32)), logits)
        assert torch.equal(top(taps[1]), logits) and not torch.equal(view(images(32)), logits)
    assert sum(p.numel() for p in top.parameters()) < sum(p.numel() for p in view.parameters())


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1"])
def test_compiles_without_a_break(name):
    view = staged(build(name).eval())
    compiled = torch.compile(view.features, fullgraph=True, backend="eager")
    with torch.no_grad():
        logits, taps = compiled(images(32))
        assert torch.equal(logits, view(images(32))) and len(taps) == 3


def message(*args) -> str:
    with pytest.raises(UserError) as error:
        staged(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


class Plain(nn.Module):
    """A hand-written net with functional steps between its modules, mode-dependent dropout and a buffer of its own."""

    def __init__(self, skip: bool = False, overwrite: str = ""):
        super().__init__()
        self.skip, self.overwrite = skip, overwrite
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.3))
        self.first = nn.Conv2d(3, 4, 3)
        self.body = nn.ModuleDict({"a": nn.Conv2d(4, 6, 3), "b": nn.Conv2d(6, 8, 3)})
        self.act = nn.ReLU(inplace=overwrite == "module")
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.first(x - self.mean))
        a = self.act(self.body["a"](F.max_pool2d(x, 2)))
        if self.overwrite == "method":
            a = a.mul_(2)
        if self.overwrite == "function":
            a = F.relu(a, inplace=True)
        if self.overwrite == "statement":
            a.mul_(2)
        b = F.dropout(self.body["b"](a), 0.3, self.training)
        b = F.adaptive_avg_pool2d(b, 1) + (a.mean() if self.skip else 0)
        return self.fc(F.dropout(b.flatten(1), 0.5, self.training))


def test_named_stages_of_a_hand_written_net():
    torch.manual_seed(0)
    model = Plain()
    keys = list(model.state_dict())
    view = staged(model, ["body.a", "body.b"])
    check_same(model, view, images(16))
    with torch.no_grad():
        taps = view.features(images(16))[1]
        expected = model.body["a"](F.max_pool2d(F.relu(model.first(images(16) - 0.3)), 2))
    assert torch.equal(taps[0], expected) and [tap.shape[1] for tap in taps] == [6, 8]
    assert list(model.state_dict()) == keys
    assert {id(p) for p in view.parameters()} == {id(p) for p in model.parameters()}


def test_flags_are_put_back_after_tracing():
    model = Plain().eval()
    model.first.train()
    staged(model, ["body.a"])
    assert not model.training and model.first.training and not model.body.training


@pytest.mark.parametrize(
    ("name", "stages", "size"),
    [
        ("torchvision/densenet121", ["features.denseblock1", "features.denseblock2", "features.denseblock3"], 32),
        ("torchvision/shufflenet_v2_x0_5", ["stage2", "stage3", "stage4"], 64),
        ("torchvision/mnasnet0_5", ["layers.8", "layers.9", "layers.10"], 64),
        ("torchvision/resnet18", ["layer1.0", "layer2", "layer4.1"], 64),
        ("timm/vit_tiny_patch16_224", ["blocks.1", "blocks.5"], 224),
        ("resnet8", ["layer1", "layer2"], 32),
    ],
)
def test_named_stages_of_library_nets(name, stages, size):
    model = build(name)
    view = staged(model, stages)
    seen = []
    for stage in stages:
        model.get_submodule(stage).register_forward_hook(lambda module, args, output: seen.append(output))
    check_same(model, view, images(size))
    seen.clear()
    with torch.no_grad():
        taps = view.outputs(images(size))[1]
    assert len(taps) == len(stages) and all(tap is out for tap, out in zip(taps, seen, strict=True))


def test_unknown_family_lists_the_top_level_modules():
    assert all(
        part in message(Plain())
        for part in ("the stages of Plain are not known", "--student-stages", "first, body, act, fc")
    )
    assert "top-level modules are none" in message(nn.Identity())


def test_a_family_with_another_forward():
    class Doubled(type(build("resnet8"))):
        def forward(self, x):
            return 2 * super().forward(x)

    assert "with another forward method" in message(Doubled(8, 10))
    patched = build("resnet8")
    patched.forward = lambda x: x
    assert "with another forward method" in message(patched)


def test_gradient_checkpointing_is_not_silently_lost():
    model = build("timm/resnet10t")
    model.set_grad_checkpointing(True)
    assert "gradient checkpointing" in message(model)


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ([], "module names in forward order"),
        ("body.a", "module names in forward order"),
        (["body.c"], "no module 'body.c'"),
        (["body.a", "bdy.b"], "did you mean 'body.b'"),
        ([""], "no module ''"),
        (["body.a", "body.a"], "overlap"),
        (["body", "body.a"], "overlap"),
        (["body.b", "body.a"], "forward order"),
        (["body"], "called 0 times"),
    ],
)
def test_wrong_stage_names(stages, says):
    assert says in message(Plain(), stages)


def test_a_connection_around_the_end_of_a_stage():
    assert "is used after the output of 'body.b'" in message(Plain(skip=True), ["body.a", "body.b"])


def test_a_tap_that_would_be_overwritten():
    assert "overwritten in place by 'act'" in message(Plain(overwrite="module"), ["body.a"])
    assert "overwritten in place by 'relu" in message(Plain(overwrite="function"), ["act"])
    assert "overwritten in place by 'mul_'" in message(Plain(overwrite="method"), ["act"])
    assert "'mul_' in the forward of Plain is not used" in message(Plain(overwrite="statement"), ["body.a"])
    torch.manual_seed(0)
    model = Plain(overwrite="module")
    check_same(model, staged(model, ["act", "body.b"]), images(16))


def test_nets_that_cannot_be_divided():
    class Pair(Plain):
        def forward(self, x):
            return self.first(x), self.first.weight

    class Decides(Plain):
        def forward(self, x):
            return self.first(x) if x.sum() > 0 else x

    class Twice(Plain):
        def forward(self, x):
            return self.act(self.act(self.first(x)))

    class Masked(Plain):
        def forward(self, x, mask):
            return self.first(x) * mask

    assert "returns more than the logits" in message(Pair(), ["first"])
    assert "cannot trace Decides" in message(Decides(), ["first"])
    assert "called 2 times" in message(Twice(), ["act"])
    assert "takes 'mask' beside the images" in message(Masked(), ["first"])


def test_a_network_of_ones_own_names_its_stages_once():
    from fastkd.methods import SOKD
    from fastkd.models import name_stages

    def made():
        layers = [
            nn.Conv2d(3, 4, 3),
            nn.Conv2d(4, 6, 3, stride=2),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3),
            nn.AdaptiveAvgPool2d(1),
        ]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 4))

    net, images = made(), torch.randn(2, 3, 16, 16)
    with pytest.raises(ValueError, match="name_stages"):
        staged(net)
    assert name_stages(net, ["2", "3"]) is net
    logits, maps = staged(net).features(images)
    assert torch.equal(logits, net(images)) and [x.shape[1] for x in maps] == [6, 8]
    terms = SOKD(made(), net)(images, torch.tensor([0, 1]))
    assert set(net.state_dict()) == set(made().state_dict()) and sum(terms.values()).isfinite()
    with pytest.raises(ValueError, match="no module '9'"):
        name_stages(made(), ["9"])
