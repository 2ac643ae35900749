"""Outputs of stages as maps: tokens without their prefix, and channels first."""

import pytest
import torch
from torch import nn

from fastkd.errors import UserError
from fastkd.models.stages.layout import Layout, layout_of


def numbered(n: int, h: int, w: int, c: int) -> torch.Tensor:
    return torch.arange(n * h * w * c).reshape(n, h, w, c)


@pytest.mark.parametrize(("prefix", "stated"), [(0, 0), (1, 1), (2, 2), (5, 5), (1, 0), (2, 0), (0, 1)])
def test_tokens(prefix, stated):
    """`stated`: what the network says. Some say nothing (0), and some add theirs after the stages (0 of 1)."""
    wanted = numbered(2, 4, 4, 6)
    tokens = torch.cat([torch.zeros(2, prefix, 6, dtype=torch.int64), wanted.flatten(1, 2)], 1)
    assert torch.equal(Layout(prefix=stated).map(tokens), wanted.permute(0, 3, 1, 2))


def test_channels_last():
    x = numbered(2, 3, 3, 8)
    for layout in (Layout(), Layout(channels_last=True)):
        assert torch.equal(layout.map(x), x.permute(0, 3, 1, 2))
    assert Layout(channels_last=False).map(x) is x


def test_channels_first():
    for x in (numbered(2, 8, 3, 3), numbered(2, 3, 3, 3), numbered(2, 8, 3, 5)):
        assert Layout().map(x) is x


@pytest.mark.parametrize("shape", [(2, 7, 3), (2, 8), (2, 2, 2, 2, 2)])
def test_what_is_no_map(shape):
    with pytest.raises(UserError, match=rf"a stage gives \[{', '.join(map(str, shape))}\].*--student-stages"):
        Layout().map(torch.zeros(shape))


def test_what_networks_say():
    class Net(nn.Module):
        output_fmt, num_prefix_tokens = "NHWC", 2

    assert layout_of(Net()) == Layout(channels_last=True, prefix=2)
    assert layout_of(nn.Identity()) == Layout()
