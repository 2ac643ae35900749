"""The average of the weights against its definition."""

import torch

from fastkd.engine.ema import Ema


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
