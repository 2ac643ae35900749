"""The imitation of a CUDA graph, tried on what it must get right and what it must catch."""

import pytest
import torch
from capture import Capture
from torch import nn


def train_step(net, images, target, optimizer):
    optimizer.zero_grad(set_to_none=False)
    loss = nn.functional.cross_entropy(net(images), target)
    loss.backward()
    optimizer.step()
    return loss


def make(tiny_net, lr):
    net = tiny_net(3)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return net, torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=1e-2, fused=True)


def batches(count):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(6, 3, 8, 8, generator=generator), torch.randint(4, (6,), generator=generator))
            for _ in range(count)]  # fmt: skip


@pytest.mark.parametrize("tensor_lr", [True, False])
def test_replayed_steps_are_the_eager_ones_if_the_rate_is_a_tensor(tiny_net, tensor_lr):
    data, rates = batches(12), [0.1 * 0.8**step for step in range(12)]
    eager, optimizer = make(tiny_net, torch.tensor(0.1))
    for (images, target), rate in zip(data, rates, strict=True):
        optimizer.param_groups[0]["lr"].fill_(rate)
        train_step(eager, images, target, optimizer)

    net, optimizer = make(tiny_net, torch.tensor(0.1) if tensor_lr else 0.1)
    static_images, static_target = data[0][0].clone(), data[0][1].clone()
    train_step(net, static_images, static_target, optimizer)  # so that momentum exists, as before a real capture
    state = [*net.state_dict().values(), *(optimizer.state[p]["momentum_buffer"] for p in net.parameters())]
    before = [tensor.clone() for tensor in state]
    with Capture() as graph:
        train_step(net, static_images, static_target, optimizer)
    for tensor, value in zip(state, before, strict=True):
        tensor.copy_(value)
    for (images, target), rate in zip(data[1:], rates[1:], strict=True):
        static_images.copy_(images)
        static_target.copy_(target)
        if tensor_lr:
            optimizer.param_groups[0]["lr"].fill_(rate)
        else:
            optimizer.param_groups[0]["lr"] = rate  # a graph cannot see this
        graph.replay()
    same = all(torch.equal(a, b) for a, b in zip(net.parameters(), eager.parameters(), strict=True))
    assert same == tensor_lr


@pytest.mark.parametrize(
    "question", [lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: bool(x[0] > 0)]
)
def test_questions_to_the_device_are_errors(question):
    with pytest.raises(RuntimeError, match="host sync"), Capture():
        question(torch.randn(5))
