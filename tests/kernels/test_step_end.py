"""The end of a step: sums of loss terms and the check of the gradient, kernels beside formulas of our own."""

import math

import pytest
import torch

from fastkd.kernels.step_end import (
    KEPT,
    StepState,
    add_to_sums,
    add_to_sums_reference,
    check_gradients,
    check_gradients_reference,
)

if torch.cuda.is_available():
    SUMS, CHECKS = [add_to_sums], [check_gradients]
else:
    from fastkd.kernels.gpu.step_end import launch_check, launch_sums

    SUMS, CHECKS = [add_to_sums_reference, launch_sums], [check_gradients_reference, launch_check]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
INFINITY, NAN = math.inf, math.nan


def new_state(device, counts=(0, 0, 0, 0, 0)):
    counts = torch.tensor(counts, device=device)
    return StepState(counts, torch.tensor(NAN, device=device), torch.tensor(3.0, device=device))


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
    state = new_state(device)
    add(sums, given, 7, 1.0, True, state, sums.new_zeros(KEPT + 1, len(values) + 1))
    assert sums.tolist() == want and state.mark.isnan() == (bad is not None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("add", SUMS)
@pytest.mark.parametrize("bad", [None, 0, 1])
def test_micro_batches_are_one_row_of_the_ring(add, bad, device):
    """Their mean by images; one bad micro-batch makes the step bad, whichever it is."""
    batches = [torch.tensor(v, device=device) for v in ([1.0, 4.0], [3.0, 8.0])]
    if bad is not None:
        batches[bad][1] = INFINITY
    state, ring = (
        new_state(device, (70, 0, 0, 0, 6)),
        torch.full((KEPT + 1, 3), -1.0, dtype=torch.float64, device=device),
    )
    for number, (batch, share) in enumerate(zip(batches, (0.75, 0.25), strict=True)):
        add(torch.zeros(3, dtype=torch.float64, device=device), batch.unbind(), 7, share, number == 0, state, ring)
    assert ring[6].tolist() == [1.5, 5.0 if bad is None else INFINITY, 70]
    assert (torch.cat([ring[:6], ring[7:]]) == -1).all() and state.mark.isnan() == (bad is not None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("parts", [1, 3, 1500])
@pytest.mark.parametrize("size", [0, 5, 2500])
@pytest.mark.parametrize("bad", [None, INFINITY, NAN, "loss"])
def test_a_bad_step_is_counted_and_buffers_are_restored(check, parts, size, bad, device):
    norms = torch.rand(parts, device=device, generator=torch.Generator(device).manual_seed(0))
    state, ring = new_state(device, (40, 4, 2, 0, 8)), torch.zeros(KEPT + 1, parts, device=device)
    state.mark.fill_(NAN if bad == "loss" else 0.0)
    if bad not in (None, "loss"):
        norms[parts // 2] = bad
    buffers, saved = torch.full((size,), NAN, device=device), torch.arange(size, device=device).float()
    norm = check(norms, buffers, saved, state, ring, 25)
    assert state.counts.tolist() == ([41, 4, 0, 0, 9] if bad is None else [41, 5, 3, 0, 9])
    assert state.found_inf.item() == (bad is not None)
    torch.testing.assert_close(ring[8], norms, rtol=0, atol=0, equal_nan=True)
    assert not ring[:8].any() and not ring[9:].any()
    assert buffers.isnan().all() if bad is None else torch.equal(buffers, saved)
    if bad in (None, "loss"):
        assert norm.item() == pytest.approx(math.sqrt(sum(n * n for n in norms.double().tolist())), rel=1e-6)
    else:
        assert not norm.isfinite()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("add", "check"), list(zip(SUMS, CHECKS, strict=True)))
def test_after_the_limit_nothing_changes_any_more(add, check, device):
    """Good steps after it are skipped as well, and the rings keep what led there."""
    state, ring = new_state(device), torch.zeros(KEPT + 1, 2, device=device)
    terms, sums = (
        torch.full((KEPT + 1, 2), -1.0, dtype=torch.float64, device=device),
        torch.zeros(2, device=device).double(),
    )
    buffers, saved = torch.zeros(3000, device=device), torch.ones(3000, device=device)
    found = []
    for number, good in enumerate([1] * 31 + [0] * 2 + [1] + [0] * 3 + [1] * 2):
        norms = torch.tensor([1.0, number if good else NAN], device=device)
        add(sums, [norms[1]], 1, 1.0, True, state, terms)
        buffers.fill_(7)
        check(norms, buffers, saved, state, ring, 3)
        found.append((int(state.found_inf.item()), state.counts[2].item(), state.counts[3].item()))
        assert buffers.tolist() == [1.0 if found[-1][0] else 7.0] * 3000
    want = [(0, 0, 0)] * 31 + [(1, 1, 0), (1, 2, 0), (0, 0, 0), (1, 1, 0), (1, 2, 0), (1, 3, 37)] + [(1, 3, 37)] * 2
    assert found == want and state.counts.tolist() == [37, 5, 3, 37, KEPT]
    assert ring[:32, 1].nan_to_num(-9).tolist() == [-9, 33, -9, -9, -9, *range(5, 31), -9]
    assert terms[:32, 1].tolist() == [32, 33, 34, 35, 36, *range(5, 32)]
