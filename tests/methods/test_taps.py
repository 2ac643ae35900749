"""What the methods compare in WRN-16-2, MobileNetV2 and VGG-13, against forwards that are written here."""

import pytest
import torch

from fastkd import create_model
from fastkd.methods import METHODS
from fastkd.methods.forwards import ForwardCache
from fastkd.models import tapped

NAMES = ["wrn_16_2", "mobilenetv2", "vgg13"]


def network(name: str, seed: int) -> torch.nn.Module:
    """In eval mode, with BatchNorm that is not the identity."""
    torch.manual_seed(seed)
    net = create_model(name, 5).double()
    for norm in (module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        torch.nn.init.normal_(norm.weight, 1, 0.3)
        torch.nn.init.normal_(norm.bias, 0, 0.5)
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.5, 1.5)
    return net.eval()


def wide_resnet(net, x):
    """(maps: sums of two groups and the activated end; maps before the activation; classifier's input)."""
    x, maps, before = net.conv1(x), [], []
    for group in (net.block1, net.block2, net.block3):
        for block in group.layer:
            y = block.bn1(x).relu()
            side = x if block.convShortcut is None else block.convShortcut(y)
            x = side + block.conv2(block.bn2(block.conv1(y)).relu())
        maps.append(x)
    before = [net.block2.layer[0].bn1(maps[0]), net.block3.layer[0].bn1(maps[1]), net.bn1(maps[2])]
    maps[2] = net.bn1(maps[2]).relu()
    return maps, before, maps[2].mean((2, 3))


def inverted(block, x):
    y = x
    for layer in block.conv:
        y = layer(y.clone())
    return y + x if y.shape == x.shape and block.conv[3].stride == (1, 1) else y


def mobilenet_v2(net, x):
    """The ends of groups 2, 3, 5 and 7, of which the last one is replaced by the final convolution after its ReLU."""
    for layer in net.conv1:
        x = layer(x)
    ends = []
    for number, group in enumerate(net.blocks, 1):
        for block in group:
            x = inverted(block, x)
        if number in (2, 3, 5, 7):
            ends.append(x)
    conv, norm, _ = net.conv2
    last = norm(conv(x)).relu()
    return [*ends[:3], last], ends, last.mean((2, 3))


def vgg(net, x):
    """The outputs of blocks 1 to 4 after and before their last ReLU."""
    maps, before = [], []
    for number, block in enumerate((net.block0, net.block1, net.block2, net.block3, net.block4)):
        for layer in list(block)[:-1]:
            x = layer(x.clone())
        if number:
            before.append(x)
            maps.append(x.relu())
        x = x.relu()
        if number < 3:
            x = torch.nn.functional.max_pool2d(x, 2)
    return maps, before, x.mean((2, 3))


BY_HAND = {"wrn_16_2": wide_resnet, "mobilenetv2": mobilenet_v2, "vgg13": vgg}


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def compared(method, images):
    """The cache of a step, as the method's losses get it."""
    out = ForwardCache(images, method.staged_views_for(None), method.classifiers)
    return [out.features(net) for net in (method.student, method.teacher)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["at", "ft", "iekd", "ofd"])
@torch.no_grad()
def test_maps_that_a_method_compares(name, kind, images):
    nets = network(name, 0), network(name, 1)
    method = METHODS[kind](*nets).double().eval()
    for net, got in zip(nets, compared(method, images), strict=True):
        maps, before, _ = BY_HAND[name](net, images)
        for ours, wanted in zip(got, before if kind == "ofd" else maps, strict=True):
            torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_features_that_rkd_compares(name, images):
    nets = network(name, 0), network(name, 1)
    method = METHODS["rkd"](*nets).double().eval()
    out = ForwardCache(images, {}, method.classifiers)
    for net, key in zip(nets, (method.student, method.teacher), strict=True):
        torch.testing.assert_close(out.embedding(key), BY_HAND[name](net, images)[2])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_attention_transfer_of_these_maps(name, images):
    nets = network(name, 0), network(name, 1)
    method = METHODS["at"](*nets).double().eval()
    want = 0.0
    for ours, theirs in zip(*(BY_HAND[name](net, images)[0] for net in nets), strict=True):
        a, b = (torch.nn.functional.normalize(x.square().mean(1).flatten(1)) for x in (ours, theirs))
        want += (a - b).square().mean().item()
    assert method(images, torch.arange(3))["at"].item() == pytest.approx(1000 * want)


@torch.no_grad()
def test_the_student_of_iakd_has_the_same_last_map(images):
    """In a sum of methods, others look at the maps of the student whose blocks are swapped."""
    nets = network("wrn_16_2", 0), network("wrn_16_2", 1)
    method = METHODS["iakd"](*nets).double().eval()
    path = method.staged_views_for((True, True, True))[method.student]
    logits, maps = path.features(images)
    torch.testing.assert_close(maps[-1], wide_resnet(nets[0], images)[0][-1])
    assert torch.equal(logits, nets[0](images))


@pytest.mark.parametrize("name", ["torchvision/mobilenet_v2", "torchvision/efficientnet_b0", "timm/efficientnet_b0"])
def test_a_network_of_a_library_has_its_last_map_after_the_final_activation(name):
    """torchvision's efficientnet_b0 and timm's are one network, so their maps have to be alike."""
    net = create_model(name, 5, image_size=32).eval()
    images = torch.randn(2, 3, 32, 32)
    logits, maps = tapped(net).features(images)
    torch.testing.assert_close(net.classifier(maps[-1].mean((2, 3))), logits)
    assert torch.equal(logits, net(images)) and maps[-1].shape == (2, 1280, 1, 1)
