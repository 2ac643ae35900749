"""The end of a step: sums of loss terms and the check of the gradient, kernels beside formulas of our own."""

import math

import pytest
import torch

from fastkd.kernels.step_end import add_to_sums, add_to_sums_reference, check_gradients, check_gradients_reference

if torch.cuda.is_available():
    SUMS, CHECKS = [add_to_sums], [check_gradients]
else:
    from fastkd.kernels.gpu.step_end import launch_check, launch_sums

    SUMS, CHECKS = [add_to_sums_reference, launch_sums], [check_gradients_reference, launch_check]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
INFINITY, NAN = math.inf, math.nan


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("add", SUMS)
@pytest.mark.parametrize("values", [[0.5], [1.0, -2.5, 3.25], [1.0] * 9])
@pytest.mark.parametrize("bad", [None, INFINITY, -INFINITY, NAN])
def test_sums(add, values, bad, device):
    dtypes = [torch.float32, torch.float64, torch.bfloat16]
    given = [torch.tensor(v, dtype=dtypes[k % 3], device=device) for k, v in enumerate(values)]
    sums = torch.arange(len(values) + 1, dtype=torch.float64, device=device)
    want = [k + 7 * v for k, v in enumerate([*values, 1.0])]
    if bad is not None:
        given[-1] = torch.tensor(bad, device=device)
        want = list(range(len(values) + 1))
    add(sums, given, 7)
    assert sums.tolist() == want


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("parts", [1, 3, 1500])
@pytest.mark.parametrize("size", [0, 5, 2500])
@pytest.mark.parametrize("bad", [None, INFINITY, NAN])
def test_a_bad_gradient_is_counted_and_buffers_are_restored(check, parts, size, bad, device):
    norms = torch.rand(parts, device=device, generator=torch.Generator(device).manual_seed(0))
    if bad is not None:
        norms[parts // 2] = bad
    buffers, saved = torch.full((size,), NAN, device=device), torch.arange(size, device=device).float()
    count, found_inf = torch.tensor(4.0, device=device), torch.tensor(3.0, device=device)
    norm = check(norms, buffers, saved, count, found_inf)
    assert count.item() == 4 + (bad is not None) and found_inf.item() == (bad is not None)
    if bad is None:
        assert buffers.isnan().all()
        assert norm.item() == pytest.approx(math.sqrt(sum(n * n for n in norms.double().tolist())), rel=1e-6)
    else:
        assert torch.equal(buffers, saved) and not norm.isfinite()
