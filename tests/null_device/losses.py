"""Job: KDLoss with each of its options: no host sync, a captured graph, launches of the forward pass."""

import pytest
import torch
from null_device import device
from null_device.checks import no_host_sync
from null_device.methods import CUDA

from fastkd.losses import UNLABELLED, KDLoss

MASKED = {"ignore_index": UNLABELLED, "mask_kd": True}
CASES = [  # options, launches of the forward pass in bf16
    ({}, 1),
    ({"ce_weight": 0.0}, 1),
    ({"reduction": "sum"}, 1),
    ({"reduction": "none"}, 1),
    ({"reduction": "none", "class_weights": torch.ones(100), **MASKED}, 1),
    ({"ignore_index": UNLABELLED}, 4),  # a comparison, and two for the count
    ({"class_weights": torch.ones(100)}, 4),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options, launches", CASES, ids=str)
def test_options_of_kd(options, launches, dtype):
    student, teacher = (torch.ones(8, 100, device=CUDA, dtype=dtype) for _ in range(2))
    target = torch.ones(8, dtype=torch.int64, device=CUDA) if options.get("ce_weight") != 0 else None
    loss = KDLoss(**options).to(CUDA)
    upstream = torch.ones(8 if options.get("reduction") == "none" else (), device=CUDA)

    def step() -> int:
        x = student.clone().requires_grad_()
        device.reset()
        value = loss(x, teacher, target)
        count = device.count_launches()
        torch.autograd.grad(value, x, upstream.to(value.dtype))
        return count

    step()  # loads the kernels and makes the ticket
    with no_host_sync():
        count = step()
    assert dtype == torch.float64 or count == launches
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        step()
