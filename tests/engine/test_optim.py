"""Optimizers against their formulas, and apex's where a stand-in for apex is installed."""

import sys
import types

import pytest
import torch

from fastkd.engine import Schedule, Step, TrainOptions
from fastkd.engine.optim import can_skip, create_optimizer
from fastkd.errors import UserError
from fastkd.methods import CE

CPU = torch.device("cpu")


def make(opt, weight, **options):
    options = TrainOptions(opt=opt, **options)
    return create_optimizer([{"params": [weight], "lr": options.lr}], options, CPU)


@pytest.mark.parametrize("opt", ["sgd", "nesterov"])
def test_sgd_steps_are_the_formula(opt):
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = make(opt, weight, lr=0.1, momentum=0.9, weight_decay=0.01)
    w, buffer = weight.detach().clone(), torch.zeros(2, dtype=torch.float64)
    for step in range(4):
        gradient = torch.tensor([0.3, 0.1 * step], dtype=torch.float64)
        weight.grad = gradient.clone()
        optimizer.step()
        decayed = gradient + 0.01 * w
        buffer = 0.9 * buffer + decayed
        w = w - 0.1 * (decayed + 0.9 * buffer if opt == "nesterov" else buffer)
    torch.testing.assert_close(weight.detach(), w, rtol=1e-6, atol=1e-8)


def test_adamw_decouples_the_decay():
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = make("adamw", weight, lr=0.1, weight_decay=0.5)
    weight.grad = torch.tensor([2.0])
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([1 - 0.1 * 0.5 - 0.1]))


@pytest.mark.parametrize("opt", ["sgd", "nesterov", "adamw"])
def test_a_step_can_be_skipped_on_the_device(opt):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = make(opt, weight)
    weight.grad = torch.full((2,), float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert can_skip(optimizer) and torch.equal(weight.detach(), torch.ones(2))


def test_apex_missing_explains_itself():
    with pytest.raises(UserError, match="fusedlamb.*need NVIDIA apex.*--opt sgd"):
        make("fusedlamb", torch.nn.Parameter(torch.ones(1)))


@pytest.mark.parametrize(
    "opt, name", [("fusedsgd", "FusedSGD"), ("fusedlamb", "FusedLAMB"), ("fusedadam", "FusedAdam")]
)
def test_apex_present_is_used(opt, name, monkeypatch):
    """A stand-in with apex's names: the rate arrives as the Python float that apex needs, and follows the schedule."""

    class StandIn(torch.optim.SGD):
        def __init__(self, groups, lr, momentum=0.0, weight_decay=0.0):
            super().__init__(groups, lr=lr, momentum=momentum, weight_decay=weight_decay)

    optimizers = types.ModuleType("apex.optimizers")
    setattr(optimizers, name, StandIn)
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    options = TrainOptions(opt=opt, epochs=2, lr=0.1)
    optimizer = create_optimizer([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.1}], options, CPU)
    assert isinstance(optimizer, StandIn) and not can_skip(optimizer)
    Schedule(options, optimizer).write(1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_norms_and_biases_can_be_spared_from_decay(opt, tiny_net):
    net = tiny_net()
    options = TrainOptions(opt=opt, lr=0.1, weight_decay=0.5, momentum=0.0, decay_norms=False)
    groups = [{"params": list(net.parameters()), "lr": 0.1}]
    optimizer = create_optimizer(groups, options, CPU)
    assert all(group["base_lr"] == 0.1 and isinstance(group["lr"], torch.Tensor) for group in optimizer.param_groups)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.zeros_like(p)  # whatever moves now is moved by the decay
    optimizer.step()
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"conv.weight", "fc.weight"}


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "levit_128s", "beit_base_patch16_224", "resnet10t"]
)
def test_what_is_spared_from_decay_is_what_timm_spares(name):
    """Position embeddings and class tokens too, which the network names."""
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_weight_decay

    net = timm.create_model(name, num_classes=3)
    spared_by_timm = getattr(net, "no_weight_decay", set)()
    wanted = set(param_groups_weight_decay(net, 0.5, no_weight_decay_list=spared_by_timm)[0]["params"])
    assert name == "resnet10t" or any(p.dim() > 1 for p in wanted)
    options = TrainOptions(lr=0.1, weight_decay=0.5, momentum=0.0, decay_norms=False)
    groups = Step(CE(net), options, CPU).optimizer.param_groups
    decays = {p: group["weight_decay"] for group in groups for p in group["params"]}
    assert {p for p, decay in decays.items() if decay == 0} == wanted
    assert {decay for p, decay in decays.items() if p not in wanted} == {0.5}
