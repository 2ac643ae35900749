"""The learning rate against its formulas, and that a step follows the tensor."""

import math

import pytest
import torch

from fastkd.engine import Schedule, TrainOptions
from fastkd.engine.optim import create_optimizer

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
