"""The average of the weights against its definition."""

import pytest
import torch
from torch import nn

from fastkd import Trainer, TrainOptions
from fastkd.engine.ema import Ema, needs_warm_up, warm_decay
from fastkd.methods import CE


def test_average_is_the_recurrence(tiny_net):
    net = tiny_net()
    ema = Ema(net, decay=0.9)
    want = {name: value.clone() for name, value in net.state_dict().items()}
    for step in range(3):
        with torch.no_grad():
            for p in net.parameters():
                p += step + 1
            net.bn.running_mean += 1
            net.bn.num_batches_tracked += 1
        ema.update()
        for name, value in net.state_dict().items():
            want[name] = 0.9 * want[name] + 0.1 * value if value.is_floating_point() else value.clone()
    torch.testing.assert_close(dict(ema.net.state_dict()), want, rtol=1e-5, atol=1e-5)


def test_the_copy_is_apart_and_frozen(tiny_net):
    net = tiny_net()
    ema = Ema(net, decay=0.5)
    assert not any(p.requires_grad for p in ema.net.parameters()) and not ema.net.training
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(ema.net.parameters(), net.parameters(), strict=True))
    assert net.conv.weight.requires_grad


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.9999])
def test_the_warm_up_is_that_of_timm(tiny_net, decay):
    theirs = pytest.importorskip("timm.utils").ModelEmaV3
    net = tiny_net()
    ema, timms = Ema(nn.ModuleDict({"a": net}), decay, warms_up=True), theirs(net, decay, use_warmup=True)
    for step in range(12):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(step)))
            net.bn.running_mean += 1
        ema.write(step)
        ema.update()
        timms.update(net, step=step + 1)  # timm's first step is 1
        assert warm_decay(decay, step) == timms.get_decay(step + 1)
    torch.testing.assert_close(dict(ema.net["a"].state_dict()), dict(timms.module.state_dict()))


def test_the_first_update_forgets_the_initial_weights(tiny_net):
    net = tiny_net()
    ema = Ema(nn.ModuleDict({"a": net}), 0.9999, warms_up=True)
    with torch.no_grad():
        net.fc.weight.copy_(torch.ones_like(net.fc.weight))
    ema.write(0)
    ema.update()
    torch.testing.assert_close(ema.net["a"].fc.weight.data, net.fc.weight.data, rtol=1e-6, atol=0)


@pytest.mark.parametrize("decay, steps, warms", [(0.9999, 49_000, True), (0.9999, 51_000, False), (0.5, 10, False)])
def test_long_runs_need_no_warm_up(decay, steps, warms):
    assert needs_warm_up(decay, steps) == warms == (decay**steps > 0.0070)


@pytest.mark.parametrize("decay", [0.99, 0.999, 0.9999])
def test_a_short_run_evaluates_what_it_has_learnt(tiny_net, tiny_loaders, tmp_path, capsys, decay):
    options = TrainOptions(epochs=12, lr=0.1, ema_decay=decay, out=str(tmp_path / "r"), device="cpu")
    loaders = tiny_loaders(samples=64)
    result = Trainer(CE(tiny_net()), *loaders, options).fit()
    assert f"--ema-decay {decay:g}: 96 steps would leave" in capsys.readouterr().out
    assert result.history[-1]["val_loss"] < 0.6 * result.history[0]["ce"]


def test_the_average_of_a_long_run_keeps_its_bits(tiny_net, tiny_loaders, tmp_path, capsys):
    net, seen = tiny_net(), []
    want = {name: value.clone() for name, value in net.state_dict().items() if value.is_floating_point()}
    options = TrainOptions(epochs=12, lr=0.1, ema_decay=0.5, out=str(tmp_path / "r"), device="cpu")
    trainer = Trainer(CE(net), *tiny_loaders(), options)
    update = trainer.step.ema.update

    def watched():
        for name, average in want.items():
            average.lerp_(net.state_dict()[name], 0.5)
        seen.append(update())

    trainer.step.ema.update = watched
    trainer.fit()
    average = trainer.network.state_dict()
    assert len(seen) == 36 and all(torch.equal(average[name], value) for name, value in want.items())
    assert "--ema-decay" not in capsys.readouterr().out
