"""Weights that are cast together and counters that are counted together: the same bits, fewer operations."""

import copy

import pytest
import torch
from capture import Capture
from every_method import NAMES, batch, build
from replays import CPU, same, trained
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastkd import create_model
from fastkd.engine import Step, TrainOptions
from fastkd.methods import CE

IMAGES, TARGET = batch(0, 8)


def alone(step: Step) -> None:
    """Each layer casts and counts by itself, as it does without fastkd."""
    step.layers = None


@pytest.mark.parametrize("name", NAMES)
def test_the_bits_are_those_of_layers_on_their_own(name):
    options = {"amp_dtype": "bfloat16", "steps": 4, "grad_accum": 1 + NAMES.index(name) % 2}
    assert same(trained(name, **options)[0], trained(name, ready=alone, **options)[0])


def operations(ready=lambda step: None) -> list[str]:
    step = Step(build("ce"), TrainOptions(lr=0.1, amp_dtype="bfloat16"), CPU)
    ready(step)
    step(IMAGES, TARGET)
    with Capture() as seen:
        step(IMAGES, TARGET)
    return seen.names


def test_one_operation_instead_of_one_per_layer():
    together, each = operations(), operations(alone)
    layers = sum(type(layer) in (nn.Conv2d, nn.Linear) for layer in build("ce").modules())
    assert each.count("aten._to_copy.default") - together.count("aten._to_copy.default") >= 2 * layers
    assert together.count("aten._foreach_copy_.default") == 2 and together.count("aten._foreach_add_.ScalarList") == 1
    norms = sum(type(layer) is nn.BatchNorm2d for layer in build("ce").modules())
    assert each.count("aten.add_.Tensor") - together.count("aten.add_.Tensor") == norms


def steps(net: nn.Module, number: int = 3, ready=lambda step: None) -> dict:
    step = Step(CE(net).train(), TrainOptions(lr=0.1, amp_dtype="bfloat16"), CPU)
    ready(step)
    for _ in range(number):
        step(IMAGES, TARGET)
    return step.state_dict()


class Exact(nn.Module):
    """A classifier outside of autocast, which casts its input to the dtype of its weights."""

    def __init__(self):
        super().__init__()
        self.body, self.fc, self.seen = create_model("resnet8", 10), nn.Linear(10, 10), []

    def forward(self, images):
        x = self.body(images)
        with torch.autocast("cpu", enabled=False):
            self.seen.append(self.fc.weight.dtype)
            return self.fc(x.to(self.fc.weight.dtype))


def test_layers_outside_of_autocast_keep_their_weights():
    torch.manual_seed(0)
    net = Exact()
    twin = copy.deepcopy(net)
    assert same(steps(net), steps(twin, ready=alone))
    assert set(net.seen) == {torch.float32}


class Twice(nn.Module):
    """Runs a block twice in a step, the second time in a checkpoint."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
        self.still = nn.BatchNorm2d(3, momentum=None)  # its counter is a factor
        self.fc = nn.Linear(3, 10)

    def forward(self, images):
        x = self.still(self.block(images))
        return self.fc(checkpoint(self.block, x, use_reentrant=False).mean((2, 3)))


def test_a_layer_that_runs_twice_counts_twice():
    torch.manual_seed(0)
    net = Twice()
    twin = copy.deepcopy(net)
    state, want = steps(net), steps(twin, ready=alone)
    assert same(state["method"]["student.still.num_batches_tracked"], torch.tensor(3))
    assert same(state["optimizer"], want["optimizer"])


@pytest.mark.parametrize("norm", [torch.nn.utils.spectral_norm, torch.nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_a_hook_makes_keep_their_bits(norm):
    torch.manual_seed(0)
    net = nn.Sequential(norm(nn.Conv2d(3, 4, 3)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    twin = nn.Sequential(norm(nn.Conv2d(3, 4, 3)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    twin.load_state_dict(net.state_dict())
    assert same(steps(net), steps(twin, ready=alone))


class Named(nn.Module):
    """Calls a layer by keyword."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 10)

    def forward(self, images):
        return self.fc(input=images.mean((2, 3)))


def test_a_layer_that_is_called_by_keyword():
    torch.manual_seed(0)
    net = Named()
    twin = copy.deepcopy(net)
    assert same(steps(net), steps(twin, ready=alone))


def test_a_failed_step_leaves_the_modules_as_they_were():
    method = build("ce")
    step = Step(method, TrainOptions(lr=0.1, amp_dtype="bfloat16"), CPU)
    step(IMAGES, TARGET)
    before = [set(module.__dict__) for module in method.modules()]
    with pytest.raises((IndexError, RuntimeError)):
        step(IMAGES, TARGET + 1000)
    assert [set(module.__dict__) for module in method.modules()] == before
    assert all(isinstance(p, nn.Parameter) for p in method.parameters())
