"""Job: every method's eager step on the null device."""

import functools

import pytest
import torch
from every_method import NAMES, batch
from null_device.checks import Watch, no_host_sync
from null_device.methods import CUDA, run_steps, step_of

from fastkd.engine.folded_gates import fold_gates
from fastkd.teacher_cache import Lessons, TeacherCache


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


def test_lessons_wait_for_nothing_but_the_batch_before(tmp_path):
    """Asked: the copy to the host is waited for one step later, by an event. Read: from pinned memory."""
    step = step_of("kd")
    about = {"samples": 24, "classes": list("0123456789"), "views": 1, "precision": "fp16", "topk": 0}
    cache = TeacherCache.open(tmp_path, about | {"temperature": 0.0}, {}, 1)
    lessons = Lessons(cache, step.method, step.precision.autocast)
    images = batch(0, 8)[0].to(CUDA, step.precision.dtype)
    for reads in (False, True):
        lessons.start(0)
        with no_host_sync():
            for number in range(3):
                (logits,) = lessons(images, torch.arange(8) + 8 * number)
                assert logits.is_cuda and logits.shape == (8, 10) and logits.dtype == torch.float32
        assert lessons.reads == reads
        lessons.finish()
    assert cache.is_complete(0)
