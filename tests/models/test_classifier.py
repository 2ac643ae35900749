"""Classifiers: found in every family, put into another order, and left fresh by weights of another class count."""

from functools import partial

import pytest
import torch
from torch import nn

from fastkd.errors import UserError
from fastkd.models import classifiers_of, create_model, load_weights, new_classifier_of, reorder_classes
from fastkd.models.zoo import hidden_kernels
from fastkd.weights_file import save_network

# Name -> the side of its images, and its classifiers. The last layers are linear layers, 1x1 convolutions, parts of
# heads, and pairs of them.
NETS = {
    "resnet8": (32, ["fc"]),
    "mobilenetv2": (32, ["classifier.0"]),
    "timm/test_resnet": (64, ["fc"]),
    "timm/test_vit": (160, ["head"]),
    "timm/test_convnext": (64, ["head.fc"]),
    "timm/test_efficientnet": (64, ["classifier"]),
    "timm/deit_tiny_distilled_patch16_224": (224, ["head", "head_dist"]),
    "timm/levit_128s": (224, ["head.linear", "head_dist.linear"]),
    "timm/repvit_m1": (64, ["head.head.l", "head.head_dist.l"]),
    "torchvision/squeezenet1_1": (64, ["classifier.1"]),
    "torchvision/mobilenet_v3_small": (64, ["classifier.3"]),
    "torchvision/shufflenet_v2_x0_5": (64, ["fc"]),
}
SMALL = ["resnet8", "timm/test_resnet", "timm/test_vit", "timm/levit_128s", "torchvision/squeezenet1_1"]


@pytest.mark.parametrize("name", NETS)
def test_reordered_logits(name):
    side, expected = NETS[name]
    net, order = create_model(name, 5).eval(), [3, 0, 4, 1, 2]
    assert list(classifiers_of(net)) == expected
    for layer in classifiers_of(net).values():
        nn.init.normal_(layer.weight, std=0.1)  # some families start at 0
    images = torch.randn(1, 3, side, side)
    with torch.no_grad():
        before = net(images)
        reorder_classes(net, order)
        torch.testing.assert_close(net(images), before[:, order])
    assert before.unique().numel() > 2  # squeezenet ends with a ReLU


def test_networks_of_transformers():
    pytest.importorskip("transformers")
    with hidden_kernels():  # the test runs beside the folder kernels/
        import transformers

        transformers.utils.is_kernels_available()
    config = partial(transformers.ViTConfig, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=5)
    sizes = config(intermediate_size=16, image_size=32, patch_size=16)
    assert list(classifiers_of(transformers.ViTForImageClassification(sizes))) == ["classifier"]
    distilled = transformers.DeiTConfig(**sizes.to_diff_dict() | {"num_labels": 5})
    net = transformers.DeiTForImageClassificationWithTeacher(distilled)
    assert list(classifiers_of(net)) == ["cls_classifier", "distillation_classifier"]


def test_a_network_without_a_classifier_is_named():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(UserError, match="ends with '1', a BatchNorm2d"):
        classifiers_of(net)
    with pytest.raises(UserError, match="ends with '0', a Conv2d"):
        classifiers_of(nn.Sequential(nn.Conv2d(3, 4, 3)))
    with pytest.raises(UserError, match="has no layer with weights"):
        classifiers_of(nn.ReLU())


def test_an_order_that_is_no_permutation():
    with pytest.raises(UserError, match="0 to 4 once"):
        reorder_classes(create_model("resnet8", 5), [0, 1, 2, 3, 3])


@pytest.mark.parametrize("name", SMALL)
def test_all_keys_but_the_classifiers_are_kept(name, tmp_path):
    source, net = create_model(name, 7), create_model(name, 5)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    own = {f"{layer}.{key}" for layer in NETS[name][1] for key in ("weight", "bias")}
    with pytest.raises(UserError, match="new_classifier=True"):
        create_model(name, 5, tmp_path / "w.pth")
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    assert set(load_weights(net, tmp_path / "w.pth", new_classifier=True)) == own
    assert new_classifier_of(net).classes == 7
    for key, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[key] if key in own else source.state_dict()[key]), key


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_of_other_classes(name, tmp_path):
    from torchvision.models import get_model

    source = get_model(name, weights=None, num_classes=7, aux_logits=True, init_weights=False)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    net = create_model(f"torchvision/{name}", 5, tmp_path / "w.pth", new_classifier=True)
    assert new_classifier_of(net) == (["fc.weight", "fc.bias"], 7)
    kept = {key: tensor for key, tensor in net.state_dict().items() if not key.startswith("fc.")}
    assert all(torch.equal(tensor, source.state_dict()[key]) for key, tensor in kept.items())
    same = create_model(f"torchvision/{name}", 7, tmp_path / "w.pth")
    assert torch.equal(same.fc.weight, source.fc.weight)


def test_a_network_that_asks_for_the_version_of_its_weights(tmp_path):
    source = create_model("torchvision/mnasnet0_5", 5)
    save_network(tmp_path / "w.safetensors", source, {})
    net = create_model("torchvision/mnasnet0_5", 5, tmp_path / "w.safetensors")
    assert all(torch.equal(tensor, source.state_dict()[key]) for key, tensor in net.state_dict().items())


def test_equal_counts_load_the_classifier_too(tmp_path):
    source = create_model("resnet8", 5)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    net = create_model("resnet8", 5, tmp_path / "w.pth", new_classifier=True)
    assert torch.equal(net.fc.weight, source.fc.weight) and new_classifier_of(net) is None


def test_only_the_classifier_may_differ(tmp_path):
    def refused(state: dict) -> str:
        torch.save(state, tmp_path / "w.pth")
        with pytest.raises(UserError) as error:
            create_model("resnet8", 5, tmp_path / "w.pth", new_classifier=True)
        return str(error.value)

    state = create_model("resnet8", 7).state_dict()
    assert "missing 1: conv1.weight" in refused({key: value for key, value in state.items() if key != "conv1.weight"})
    assert "unexpected 1: extra" in refused(state | {"extra": torch.zeros(1)})
    assert "different 1: bn1.bias" in refused(state | {"bn1.bias": torch.zeros(3)})
    assert "fc.weight" in refused(state | {"fc.weight": torch.zeros(7, 65)})
    assert "different 1: fc.weight" in refused(state | {"fc.bias": torch.zeros(5)})
    assert "missing 1: fc.bias" in refused({key: value for key, value in state.items() if key != "fc.bias"})
    assert "unexpected 36" in refused(create_model("resnet14", 7).state_dict())


def test_weights_without_a_classifier(tmp_path):
    state = {key: value for key, value in create_model("resnet8", 5).state_dict().items() if "fc." not in key}
    torch.save(state, tmp_path / "w.pth")
    net = create_model("resnet8", 5, tmp_path / "w.pth", new_classifier=True)
    assert new_classifier_of(net) == (["fc.weight", "fc.bias"], 0)


def test_timms_pretrained_weights_of_other_classes(monkeypatch):
    import timm

    source, create = timm.create_model("resnet18", num_classes=1000), timm.create_model

    def from_the_hub(name, pretrained=False, **sizes):
        return source if pretrained else create(name, **sizes)

    monkeypatch.setattr(timm, "create_model", from_the_hub)
    net = create_model("timm/resnet18", 5, "a1_in1k", new_classifier=True)
    assert net.fc.weight.shape == (5, 512) and new_classifier_of(net) == (["fc.weight", "fc.bias"], 1000)
    assert torch.equal(net.layer4[1].conv2.weight, source.layer4[1].conv2.weight)


def test_torchvisions_pretrained_weights_of_other_classes(monkeypatch):
    from torchvision.models import resnet18

    source = resnet18().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *a, **k: source)
    net = create_model("torchvision/resnet18", 5, "pretrained", new_classifier=True)
    assert net.fc.weight.shape == (5, 512) and new_classifier_of(net).classes == 1000
    assert torch.equal(net.layer1[0].conv1.weight, source["layer1.0.conv1.weight"])
