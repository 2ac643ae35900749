"""Our nets against the published figures, and every way in which a name or a weights string can be wrong."""

import sys

import pytest
import torch
from torch import nn

from fastkd.errors import UserError
from fastkd.models import create_model, model_names

# Parameters for 100 classes, in millions: RepDistiller and DKD papers' tables, WRN-28-10 from arXiv:1605.07146.
PUBLISHED = {
    "resnet20": 0.28,
    "resnet32": 0.47,
    "resnet56": 0.86,
    "resnet110": 1.74,
    "resnet8x4": 1.23,
    "resnet32x4": 7.43,
    "wrn_16_2": 0.70,
    "wrn_28_10": 36.5,
    "wrn_40_1": 0.57,
    "wrn_40_2": 2.26,
    "vgg8": 3.97,
    "vgg13": 9.46,
    "mobilenetv2": 0.81,
    "shufflenet_v1": 0.95,
    "shufflenet_v2": 1.36,
    "cifar_resnet50": 23.71,
}


def meta(name: str) -> nn.Module:
    with torch.device("meta"):  # shapes without memory
        return create_model(name, 100)


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_as_published(name):
    millions = sum(p.numel() for p in meta(name).parameters()) / 1e6
    digits = 1 if name == "wrn_28_10" else 2
    assert round(millions, digits) == PUBLISHED[name]


def test_mobilenet_parameters_by_hand():
    widths = [32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]
    stem = 3 * 32 * 9 + 2 * 32
    blocks = sum(9 * i + 2 * i + i * o + 2 * o for i, o in zip(widths, widths[1:], strict=False))
    assert sum(p.numel() for p in meta("mobilenet").parameters()) == stem + blocks + 1024 * 100 + 100


@pytest.mark.parametrize("depth", [8, 14, 20, 26, 32, 44, 56, 110])
def test_resnet_depth_counts_its_layers(depth):
    convs = [m for n, m in meta(f"resnet{depth}").named_modules() if isinstance(m, nn.Conv2d) and "downsample" not in n]
    assert len(convs) + 1 == depth


@pytest.mark.parametrize("name", [n for n in model_names() if n not in ("wrn_28_10", "resnet32x4", "resnet110")])
def test_gradients_reach_every_parameter(name):
    torch.manual_seed(0)
    model = create_model(name, 7)
    logits = model(torch.randn(2, 3, 16, 16))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", model_names())
@pytest.mark.parametrize("size", [(32, 32), (40, 56), (64, 64)])
def test_any_image_size(name, size):
    assert meta(name)(torch.empty(2, 3, *size, device="meta")).shape == (2, 100)


@pytest.mark.parametrize("name", ["resnet20", "wrn_16_2", "vgg8", "mobilenet", "mobilenetv2"])
def test_channels_last_gives_the_same_logits(name):
    torch.manual_seed(0)
    model = create_model(name, 10).eval().double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    got = model(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("resnet8", ["conv1.weight", "layer2.0.downsample.1.running_var", "layer3.0.bn2.bias", "fc.bias"]),
        ("wrn_16_2", ["block1.layer.0.convShortcut.weight", "block3.layer.1.bn1.weight", "bn1.bias", "fc.weight"]),
        ("vgg8", ["block0.0.bias", "block4.1.running_mean", "classifier.weight"]),
        ("vgg13", ["block0.3.bias", "block4.4.running_mean"]),
        ("mobilenetv2", ["conv1.0.weight", "blocks.1.0.conv.7.bias", "conv2.1.bias", "classifier.0.weight"]),
    ],
)
def test_names_are_those_of_published_checkpoints(name, keys):
    assert set(keys) <= meta(name).state_dict().keys()


def test_any_wide_resnet_can_be_built():
    convs = [m for n, m in meta("wrn_22_3").named_modules() if isinstance(m, nn.Conv2d) and "Shortcut" not in n]
    assert len(convs) == 22 - 3 and meta("wrn_22_3").fc.in_features == 192


@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/resnet18"])
def test_library_models(name):
    model = create_model(name, 5)
    assert model.fc.out_features == 5 and type(model).__module__.startswith(name.split("/")[0])


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("resnt20", "'resnet20'"),
        ("mobilnet", "'mobilenet'"),
        ("resnet50", "'torchvision/resnet50'"),
        ("wrn_41_2", "'wrn_40_2'"),
        ("wrn_4_2", "'wrn_10_2'"),
        ("timm/resnet58", "'resnet50'"),
        ("torchvision/resnet49", "'resnet"),
        ("torchvison/resnet18", "'torchvision'"),
    ],
)
def test_unknown_names_suggest_the_nearest(name, suggestion):
    with pytest.raises(UserError) as error:
        create_model(name, 10)
    assert f"did you mean {suggestion}" in one_line(error)


@pytest.mark.parametrize("name", ["", "wrn_x", "wrn_16_0", "timm/", "torchvision/", "timm/hf-hub:a/b"])
def test_senseless_names(name):
    with pytest.raises(UserError) as error:
        create_model(name, 10)
    one_line(error)


@pytest.mark.parametrize("classes", [0, -3, 2.5, None])
def test_senseless_class_counts(classes):
    with pytest.raises(UserError, match="num_classes is"):
        create_model("resnet8", classes)


@pytest.mark.parametrize(
    ("name", "weights", "says"),
    [
        ("resnet20", "pretrained", "no pre-trained weights"),
        ("resnet20", "IMAGENET1K_V1", "no pre-trained weights"),
        ("resnet20", "nowhere/resnet20.pth", "no weights file nowhere/resnet20.pth"),
        ("timm/resnet18", "resnet18.safetensors", "no weights file resnet18.safetensors"),
        ("timm/resnet18", "a1_in1l", "did you mean 'a1_in1k'"),
        ("timm/resnet18.a1_in1l", None, "did you mean 'a1_in1k'"),
        ("timm/resnet18.a1_in1k", "a2_in1k", "leave one of them out"),
        ("torchvision/resnet18", "IMAGENET1K_V2", "did you mean 'IMAGENET1K_V1'"),
    ],
)
def test_wrong_weights(name, weights, says):
    with pytest.raises(UserError) as error:
        create_model(name, 1000, weights)
    assert says in one_line(error)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("timm/resnet18", "pretrained"),
        ("timm/resnet18.a1_in1k", None),
        ("timm/resnet18", "a1_in1k"),
        ("torchvision/resnet18", "pretrained"),
        ("torchvision/resnet18", "IMAGENET1K_V1"),
    ],
)
def test_a_pretrained_net_of_other_classes_is_refused(name, weights):
    with pytest.raises(UserError) as error:
        create_model(name, 10, weights)
    assert "1000 classes" in one_line(error) and "10 are wanted" in str(error.value)


def test_timm_weights_without_network(monkeypatch):
    import timm

    def unreachable(name, pretrained, num_classes):
        assert (name, pretrained, num_classes) == ("resnet18.a2_in1k", True, 1000)
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr(timm, "create_model", unreachable)
    for name, weights in [("timm/resnet18.a2_in1k", None), ("timm/resnet18", "a2_in1k")]:
        with pytest.raises(UserError) as error:
            create_model(name, 1000, weights)
        message = one_line(error)
        assert all(part in message for part in ("timm/resnet18.a2_in1k", "no route to host", "as a file"))


def test_torchvision_weights_without_network(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(UserError) as error:
        create_model("torchvision/resnet18", 1000, "pretrained")
    assert all(part in one_line(error) for part in ("torchvision/resnet18", "no route to host", "as a file"))


def test_torchvision_default_weights_are_loaded(monkeypatch):
    from torchvision.models import resnet18

    source = resnet18().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *a, **k: source)
    model = create_model("torchvision/resnet18", 1000, "pretrained")
    assert torch.equal(model.fc.weight, source["fc.weight"]) and torch.equal(model.conv1.weight, source["conv1.weight"])


@pytest.mark.parametrize(
    "name", ["resnet8", "timm/test_resnet", "timm/test_resnet.r160_in1k", "torchvision/squeezenet1_1"]
)
def test_weights_from_a_file(name, tmp_path):
    source = create_model(name.partition(".")[0], 10)
    torch.save(source.state_dict(), tmp_path / "net.pth")
    for weights in (tmp_path / "net.pth", str(tmp_path / "net.pth")):
        loaded = create_model(name, 10, weights).state_dict()
        assert all(torch.equal(tensor, loaded[key]) for key, tensor in source.state_dict().items())


def test_a_file_for_other_classes_is_refused(tmp_path):
    torch.save(create_model("resnet8", 10).state_dict(), tmp_path / "net.pth")
    with pytest.raises(UserError) as error:
        create_model("resnet8", 100, tmp_path / "net.pth")
    assert "[10, 64]" in one_line(error) and "[100, 64]" in str(error.value)


def test_a_library_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm"):
        create_model("timm/resnet18", 10)
