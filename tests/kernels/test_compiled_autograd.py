"""Two backward passes inside compiled autograd, whose ctx is a copy: each finds what it would find outside."""

import pytest
import torch
from torch._dynamo import compiled_autograd

from fastkd.kernels import (
    attention_transfer,
    dist_loss,
    dkd_loss,
    factor_distance,
    hint_distance,
    kd_loss,
    logit_loss,
    overhaul_distance,
)

LABELS = torch.arange(4)
FROM_LOGITS = {
    "kd": lambda s, t: kd_loss(s, t, LABELS).loss,
    "kd, options": lambda s, t: kd_loss(s, t, LABELS, label_smoothing=0.1).loss,
    "mutual": lambda s, t: logit_loss([s, t], LABELS, [1.0, 0.0], [[0.0, 1.0], [0.0, 0.0]], temperature=2.0).loss,
    "dkd": lambda s, t: dkd_loss(s, t, LABELS),
    "dist": dist_loss,
}
FROM_MAPS = {
    "factors": lambda s, t: factor_distance([s], t, [1.0]).loss,
    "hint": hint_distance,
    "overhaul": lambda s, t: overhaul_distance(s, t, torch.full((3,), -0.5)),
    "attention": attention_transfer,
}


@pytest.mark.parametrize("name", [*FROM_LOGITS, *FROM_MAPS])
def test_two_backward_passes(name):
    loss, shape = (FROM_LOGITS[name], (4, 6)) if name in FROM_LOGITS else (FROM_MAPS[name], (4, 3, 2, 2))
    s, t = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).unbind()
    s.requires_grad_()
    want = torch.autograd.grad(3 * loss(s, t), s)[0]
    value = 3 * loss(s, t)
    with compiled_autograd._enable(torch.compile(backend="eager")):
        for backward in (1, 2):
            value.backward(retain_graph=True)
            torch.testing.assert_close(s.grad, backward * want)
