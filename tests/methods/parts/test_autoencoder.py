"""IE-KD's coder: its layers, its start, and an auto-encoder that learns to reconstruct."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastkd.errors import UserError
from fastkd.methods import RunContext
from fastkd.methods.parts.autoencoder import AutoEncoder, Coder, train_auto_encoder


def maps(n: int = 8, channels: int = 6) -> torch.Tensor:
    return torch.randn(n, channels, 4, 4, generator=torch.Generator().manual_seed(0)).relu()


def train(net, maps, epochs, lr, error, run):
    return train_auto_encoder(net, maps, SimpleNamespace(ae_epochs=epochs, ae_lr=lr, ae_error=error), run)


def test_layers_of_the_coder():
    coder = Coder(6, 3)
    convolutions = [m for m in coder if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in convolutions] == [(6, 6), (6, 3), (3, 3)]
    assert [type(m).__name__ for m in coder] == ["LeakyReLU", *["Conv2d", "BatchNorm2d", "LeakyReLU"] * 3]
    assert all(m.negative_slope == 0.1 for m in coder if isinstance(m, nn.LeakyReLU))
    assert sum(p.numel() for p in coder.parameters()) == 9 * (36 + 18 + 9) + 2 * (6 + 3 + 3)  # no biases
    assert coder(maps()).shape == (8, 3, 4, 4)


def test_the_coder_is_the_formula_and_leaves_its_input():
    torch.manual_seed(0)
    coder, x = Coder(6, 3).eval(), maps() - 0.5
    kept, y = x.clone(), F.leaky_relu(x, 0.1)
    for i in (1, 4, 7):
        y = F.leaky_relu(coder[i + 1](F.conv2d(y, coder[i].weight, padding=1)), 0.1)
    assert torch.equal(coder(x), y) and torch.equal(x, kept)


def test_start_of_the_convolutions():
    torch.manual_seed(0)
    stds = [m.weight.std().item() for m in Coder(64, 32) if isinstance(m, nn.Conv2d)]
    assert stds == pytest.approx([(2 / (9 * c)) ** 0.5 for c in (64, 32, 32)], rel=0.05)


def test_the_decoder_has_the_channels_reversed():
    net = AutoEncoder(6, 3)
    convolutions = [m for m in net.decoder if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in convolutions] == [(3, 3), (3, 6), (6, 6)]
    assert net(maps()).shape == (8, 6, 4, 4) and net.encoder(maps()).shape == (8, 3, 4, 4)


@pytest.mark.parametrize("error", ["l1", "l2"])
def test_training_lowers_the_error(error):
    torch.manual_seed(0)
    net = AutoEncoder(6, 3)
    errors = train(net, lambda step: iter(maps().split(4)), 15, 0.1, error, RunContext())
    assert len(errors) == 15 and all(isinstance(value, float) for value in errors) and errors[-1] < 0.8 * errors[0]
    assert net.training and all(p.grad is None for p in net.parameters())


def test_one_epoch_is_sgd_with_nesterov_momentum_and_weight_decay():
    torch.manual_seed(0)
    net, twin = AutoEncoder(6, 3).eval(), AutoEncoder(6, 3)
    twin.load_state_dict(net.state_dict())
    next(net.parameters()).grad = torch.full_like(next(net.parameters()), 9.0)  # of someone else: does not count
    values = []
    optimizer = torch.optim.SGD(twin.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for batch in maps().split(5):  # 5 and 3: the mean is over all maps
        loss = (twin(batch) - batch).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item() * len(batch))
    errors = train(net, lambda step: maps().split(5), 1, 0.05, "l1", RunContext())
    assert errors == pytest.approx([sum(values) / 8])
    for a, b in zip(net.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_progress_autocast_and_no_epochs():
    seen, entered = [], []

    def track(steps, title):
        seen.append(title)
        return steps

    @contextlib.contextmanager
    def autocast():
        entered.append(1)
        with torch.autocast("cpu", torch.bfloat16):
            yield

    net, run = AutoEncoder(6, 3), RunContext(track=track, autocast=autocast)
    errors = train(net, lambda step: [maps(4).bfloat16()], 2, 0.1, "l1", run)
    assert len(errors) == 2 and len(seen) == 1 and len(entered) == 1 + 2  # first to read its dtype
    assert train(net, lambda step: [], 0, 0.1, "l1", run) == []


class Unread(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the single values that the host asks for."""

    reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.reads += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_no_step_reads_the_device():
    with Unread() as mode:
        train(AutoEncoder(6, 3), lambda step: maps().split(1), 3, 0.1, "l1", RunContext())
        assert mode.reads == 0  # the list at the end is one copy, `tolist`
        torch.ones(1).item()
    assert mode.reads == 1


def test_errors():
    with pytest.raises(UserError, match="error is 'l3'"):
        train(AutoEncoder(6, 3), lambda step: [], 1, 0.1, "l3", RunContext())
    once = iter([maps()])
    with pytest.raises(UserError, match="no maps"):
        train(AutoEncoder(6, 3), lambda step: once, 2, 0.1, "l1", RunContext())
