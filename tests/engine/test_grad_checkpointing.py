"""`--grad-checkpointing`: the results of a run without it, from less memory."""

import copy
from dataclasses import replace
from functools import cache

import every_method
import pytest
import timm
import torch
from every_family import FAMILIES
from torch import nn

from fastkd import create_model
from fastkd.engine import Step, TrainOptions
from fastkd.engine.grad_checkpointing import Checkpointed, blocks_to_checkpoint, checkpointed
from fastkd.engine.trial import try_step
from fastkd.errors import UserError
from fastkd.methods import METHODS

CPU = torch.device("cpu")
PLAIN = TrainOptions(lr=0.05, epochs=1)
ON = replace(PLAIN, grad_checkpointing=True)
CLASSES = tuple("0123456789")


def trained(method, options=PLAIN, steps=3, size=0, **more):
    """The state after a few steps: weights, statistics, momentum, averages, and torch's generator."""
    torch.manual_seed(1)
    step = Step(method, options, CPU, **more)
    for number in range(steps):
        images, target = every_method.batch(number)
        images = nn.functional.interpolate(images, size=size) if size else images
        method.train()
        step(images, target % 4 if size else target, method.plan(number))
    return step.state_dict() | {"generator": torch.get_rng_state()}


def assert_equal(one, other):
    for (name, mine), theirs in zip(one.items(), other.values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def networks(student, method="kd"):
    torch.manual_seed(2)
    teacher = create_model("resnet14", 4)
    return METHODS[method](copy.deepcopy(student), teacher)


@pytest.mark.parametrize("name", every_method.NAMES)
def test_every_method_trains_as_without_it(name):
    results = []
    for options in (PLAIN, ON):
        method = every_method.build(name)
        every_method.prepare(method)
        assert bool(blocks_to_checkpoint(method, options.grad_checkpointing)) == options.grad_checkpointing
        results.append(trained(method, options))
    assert_equal(*results)


def _other_networks():
    yield "fastkd resnet", lambda: create_model("resnet8", 4), 32
    yield "timm, BatchNorm", FAMILIES["ResNet"].student, 32
    yield "timm, BatchNorm with activation", FAMILIES["EfficientNet"].student, 32
    yield "timm ViT", lambda: timm.create_model("test_vit", num_classes=4, img_size=32, drop_path_rate=0.3), 32
    yield "dropout", lambda: timm.create_model("test_vit", num_classes=4, img_size=32, proj_drop_rate=0.3), 32
    yield "torchvision", lambda: create_model("torchvision/mobilenet_v3_small", 4), 32
    yield "blocks that get lists", lambda: _dense(), 32
    yield "NFNet", FAMILIES["NFNet"].student, 32


def _dense():
    from torchvision.models.densenet import DenseNet

    return DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=4)


@pytest.mark.parametrize(
    ("make", "size"), [pytest.param(cache(make), size, id=name) for name, make, size in _other_networks()]
)
@pytest.mark.parametrize("more", [{}, {"amp_dtype": "bfloat16", "ema_decay": 0.9}], ids=["fp32", "bf16 with EMA"])
def test_networks_of_every_library_train_as_without_it(make, size, more):
    torch.manual_seed(0)
    student = make()
    assert_equal(*(trained(networks(student), replace(each, **more), size=size) for each in (PLAIN, ON)))


@pytest.mark.parametrize("method", ["fitnet", "ofd", "rkd"])
def test_maps_of_a_torchvision_network_are_those_without_it(method):
    """The first pass of a view of stages, and of OFD's copies of the last blocks."""
    torch.manual_seed(0)
    student, teacher = (create_model("torchvision/resnet18", 4) for _ in range(2))
    results = []
    for options in (PLAIN, ON):
        torch.manual_seed(2)
        net = METHODS[method](*copy.deepcopy((student, teacher)))
        results.append(trained(net, options, steps=2, size=32))
    assert_equal(*results)


def test_running_statistics_move_once_a_step():
    method = every_method.build("kd")
    trained(method, ON, steps=3)
    assert {int(b) for name, b in method.student.named_buffers() if "num_batches" in name} == {3}


def test_it_saves_memory():
    def saved(options):
        seen = {}

        def note(tensor):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch.manual_seed(0)
        net = METHODS["ce"](create_model("resnet20", 10)).train()
        with (
            checkpointed(blocks_to_checkpoint(net, options.grad_checkpointing)),
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            loss = net(*every_method.batch(0))["ce"]
        loss.backward()
        return sum(seen.values())

    assert saved(ON) < 0.5 * saved(PLAIN)


def test_the_network_is_as_before_outside_of_a_step():
    method = every_method.build("kd")
    step = Step(method, ON, CPU)
    inside = []
    method.student.layer1[0].register_forward_hook(lambda block, *_: inside.append(isinstance(block, Checkpointed)))
    step(*every_method.batch(0))
    assert inside == [True]  # a hook of the block runs once
    assert not any(isinstance(module, Checkpointed) for module in method.modules())


def attempt(student, options=ON, method="ce"):
    net = METHODS[method](student)
    try_step(net, every_method.batch(0), CLASSES, options, CPU)


@pytest.mark.parametrize("name", ["vgg8", "torchvision/alexnet"])
def test_a_network_without_blocks_is_refused(name):
    with pytest.raises(UserError, match=r"finds no blocks in .*--grad-accum"):
        blocks_to_checkpoint(METHODS["ce"](create_model(name, 10)))


class _Net(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 8, 3, 2), nn.Sequential(block(), block())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))


class _Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.two(self.one(x).relu())


class _Overwrites(_Counts):
    def forward(self, x):
        return self.two(self.one(x.sin_()).relu())


class _Unused(_Counts):
    def forward(self, x):
        raise AssertionError("not called")


class _Inside(_Net):
    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block.two(block.one(x))
        return self.head(x)


@pytest.mark.parametrize(
    ("net", "block", "problem"),
    [
        (_Net, _Counts, "_Counts changes its buffer calls"),
        (_Net, _Overwrites, "inplace operation.*may overwrite its input"),
        (_Inside, _Unused, "none of them runs as a whole"),
    ],
)
def test_what_cannot_be_recomputed_is_refused_before_training(net, block, problem):
    with pytest.raises(UserError, match=problem):
        attempt(net(block))


def test_it_does_not_go_with_synchronised_statistics():
    with pytest.raises(UserError, match="--sync-bn and --grad-checkpointing exclude each other"):
        TrainOptions(grad_checkpointing=True, sync_bn=True)


@pytest.mark.every
def test_compiled_steps_move_statistics_once():
    torch.manual_seed(0)
    student, states = create_model("resnet8", 4), []
    for options in (PLAIN, ON):
        torch._dynamo.reset()
        method = METHODS["ce"](copy.deepcopy(student))
        states.append(trained(method, replace(options, compile="on"), size=32, compiled=True)["method"])
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-4)
