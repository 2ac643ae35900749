"""Job: every method's eager step on the null device."""

import functools

import pytest
from every_method import NAMES, batch
from null_device.checks import Watch
from null_device.methods import CUDA, run_steps, step_of

from fastkd.engine.folded_gates import fold_gates


@functools.cache
def watched(name: str) -> Watch:
    step, watch = step_of(name), Watch()
    images = batch(0, 8)[0].to(CUDA)
    fold_gates(step.method, images, "auto", "plain", step.precision, print)  # as a run does before its first step
    run_steps(step, step, range(1))  # the first step makes the optimizer's state
    run_steps(step, step, range(1, 4), watch=watch)
    return watch


@pytest.mark.parametrize("name", NAMES)
def test_a_step_waits_for_nothing_and_has_no_tensor_on_the_cpu(name):
    assert not watched(name).on_cpu, watched(name).on_cpu


@pytest.mark.parametrize("name", NAMES)
def test_convolutions_stay_channels_last(name):
    watch = watched(name)
    assert watch.convolutions and not watch.layouts, watch.layouts
