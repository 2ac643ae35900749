"""The learning rate against its formulas, and that a step follows the tensor."""

import math

import pytest
import torch

from fastkd.engine import Schedule, TrainOptions
from fastkd.engine.optim import create_optimizer
from fastkd.errors import UserError

CPU = torch.device("cpu")


def schedule(**options):
    options = TrainOptions(**{"epochs": 10, "lr": 0.2} | options)
    weight = torch.nn.Parameter(torch.ones(2))
    return Schedule(options, create_optimizer([{"params": [weight], "lr": options.lr}], options, CPU)), weight


@pytest.mark.parametrize(
    "options, epoch, rate",
    [
        ({}, 0, 0.2),
        ({}, 5, 0.1),
        ({}, 10, 0.0),
        ({"min_lr": 0.02}, 10, 0.02),
        ({"warmup_epochs": 2, "warmup_lr": 0.01}, 0, 0.01),
        ({"warmup_epochs": 2, "warmup_lr": 0.01}, 1, 0.105),
        ({"warmup_epochs": 2}, 2, 0.2),
        ({"warmup_epochs": 2}, 4, 0.2 * 0.5 * (1 + math.cos(math.pi / 4))),
        ({"sched": "step", "decay_epochs": 3}, 2.99, 0.2),
        ({"sched": "step", "decay_epochs": 3}, 3, 0.02),
        ({"sched": "step", "decay_epochs": 3, "decay_rate": 0.5}, 9, 0.025),
        ({"sched": "multistep", "decay_milestones": (4, 8)}, 3.9, 0.2),
        ({"sched": "multistep", "decay_milestones": (4, 8)}, 4, 0.02),
        ({"sched": "multistep", "decay_milestones": (4, 8)}, 9, 0.002),
        ({"sched": "constant"}, 9, 0.2),
    ],
)
def test_rate(options, epoch, rate):
    plan, _ = schedule(**options)
    assert plan.write(epoch) == pytest.approx(rate, abs=1e-12)
    assert plan.optimizer.param_groups[0]["lr"].item() == pytest.approx(rate, abs=1e-8)


def test_the_rate_is_one_tensor_that_the_step_reads():
    plan, weight = schedule(sched="constant", momentum=0.0, weight_decay=0.0)
    rate = plan.optimizer.param_groups[0]["lr"]
    weight.grad = torch.ones(2)
    plan.write(0)
    plan.optimizer.step()
    rate.fill_(0.5)
    plan.optimizer.step()
    assert plan.optimizer.param_groups[0]["lr"] is rate
    torch.testing.assert_close(weight.detach(), torch.full((2,), 1 - 0.2 - 0.5))


def test_groups_keep_their_own_rates():
    options = TrainOptions(epochs=4, lr=0.1)
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": rate} for rate in (0.1, 0.4)]
    plan = Schedule(options, create_optimizer(groups, options, CPU))
    plan.write(2)
    assert [group["lr"].item() for group in plan.optimizer.param_groups] == pytest.approx([0.05, 0.2])


@pytest.mark.parametrize("opt", ["sgd", "nesterov"])
@pytest.mark.parametrize(
    "drops", [{"sched": "multistep", "decay_milestones": (1.0, 2.0)}, {"sched": "step", "decay_epochs": 1}]
)
def test_momentum_is_reset_as_by_a_new_optimizer(opt, drops):
    """Three epochs of three steps, against a new torch.optim.SGD in each of them."""
    plan, weight = schedule(epochs=3, opt=opt, momentum=0.9, weight_decay=0.01, reset_momentum=True, **drops)
    other = torch.nn.Parameter(weight.detach().clone())
    for step in range(9):
        plan.write(step / 3, (step - 1) / 3)
        if step % 3 == 0:
            rate = 0.2 * 0.1 ** (step // 3)
            new = torch.optim.SGD([other], lr=rate, momentum=0.9, weight_decay=0.01, nesterov=opt == "nesterov")
        weight.grad, other.grad = (torch.tensor([0.3, step - 4.0]) for _ in range(2))
        plan.optimizer.step()
        new.step()
        torch.testing.assert_close(weight.detach(), other.detach(), rtol=1e-6, atol=1e-7)


def test_momentum_stays_without_the_option():
    plan, weight = schedule(epochs=2, sched="multistep", decay_milestones=(1.0,), momentum=0.9)
    weight.grad = torch.ones(2)
    plan.optimizer.step()
    plan.write(1.0, 0.5)
    assert plan.optimizer.state[weight]["momentum_buffer"].abs().min() > 0.9


@pytest.mark.parametrize(
    "options",
    [
        {"opt": "adamw", "sched": "step", "decay_epochs": 3},
        {"sched": "cosine"},
        {"sched": "step", "decay_epochs": 10},
        {"opt": "sgd", "momentum": 0.0, "sched": "step", "decay_epochs": 3},
    ],
)
def test_a_reset_that_never_happens_is_an_error(options):
    with pytest.raises(UserError, match="--reset-momentum .*--no-reset-momentum turns it off"):
        TrainOptions(epochs=10, reset_momentum=True, **options)
