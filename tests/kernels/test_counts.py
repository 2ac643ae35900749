"""What kernels/README.md says of launches and bytes, counted in Triton's interpreter: no time, no GPU.

A launch is a call of a kernel on a grid. A byte counts each time a program loads or stores it, so a second read counts
even where it would come from a cache; what one load gives to many elements, a margin or a row's sum, counts once.
"""

import importlib
import traceback
from typing import NamedTuple

import numpy as np
import pytest
import torch

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

if torch.cuda.is_available():
    pytest.skip("counted in the interpreter", allow_module_level=True)
from triton.runtime import interpreter

N = 6


class Counts:
    def __init__(self):
        self.launches = self.bytes = 0


@pytest.fixture
def counts(monkeypatch):
    """What the kernels do from here on; the ops take their kernels, not the closed forms."""
    found, builder, executor = Counts(), interpreter.InterpreterBuilder, interpreter.GridExecutor

    def load(self, ptrs, mask, *others, original=builder.create_masked_load):
        found.bytes += moved(ptrs, mask)
        return original(self, ptrs, mask, *others)

    def store(self, ptrs, value, mask, *others, original=builder.create_masked_store):
        found.bytes += moved(ptrs, mask)
        return original(self, ptrs, value, mask, *others)

    def launch(self, *args, original=executor.__call__, **kwargs):
        found.launches += 1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(builder, "create_masked_load", load)
    monkeypatch.setattr(builder, "create_masked_store", store)
    monkeypatch.setattr(executor, "__call__", launch)
    monkeypatch.setattr("fastkd.kernels.op.scale_in_place", lambda *_, **__: False)  # as for tensors on a GPU
    monkeypatch.setattr("fastkd.kernels.op.runs_on_gpu", lambda device, dtype: True)
    return found


def moved(ptrs, mask) -> int:
    return len(np.unique(ptrs.data[mask.data])) * ptrs.get_element_ty().primitive_bitwidth // 8


class Case(NamedTuple):
    loss: object
    learners: int
    others: int
    """Tensors without a gradient."""
    launches: tuple[int, int]
    """Forward, backward."""
    bytes: float | None
    """Per element of one tensor, forward and backward together at an upstream gradient of 1."""


def dense(networks: int, heads: int):
    H = networks * heads
    table = [[float(i // heads != j // heads) for j in range(H)] for i in range(H)]
    return lambda *z: logit_loss(list(z), labels(z[0]), [1.0] * H, table).loss


def labels(z):
    return torch.arange(len(z)) % z.shape[1]


LOGITS = {
    "KD": Case(lambda s, t: kd_loss(s, t, labels(s)).loss, 1, 1, (1, 1), 6),
    "DML": Case(dense(2, 1), 2, 0, (1, 1), 8),
    "DCM 2 x 3": Case(dense(2, 3), 6, 0, (1, 1), 24),
    "DKD": Case(lambda s, t: dkd_loss(s, t, labels(s)), 1, 1, (1, 1), 6),
    "DIST": Case(dist_loss, 1, 1, (2, 1), None),  # rows are read twice in a row, columns' sums by every row: caches
}
MAPS = {
    "IE-KD pair": Case(lambda a, b, t: factor_distance([a, b], t, [1.0, -1.0]).loss, 2, 1, (1, 1), 10),
    "AT": Case(attention_transfer, 1, 1, (2, 1), 8),
    "hint": Case(hint_distance, 1, 1, (1, 1), 6),
    "overhaul": Case(lambda s, t: overhaul_distance(s, t, torch.full((256,), -0.5)), 1, 1, (1, 1), 6),
}


def tensors(case: Case, *shape: int) -> list:
    torch.manual_seed(0)
    made = [torch.randn(shape).bfloat16() for _ in range(case.learners + case.others)]
    if len(shape) == 4:
        made = [x.contiguous(memory_format=torch.channels_last) for x in made]
    return [x.requires_grad_(place < case.learners) for place, x in enumerate(made)]


def run(case: Case, counts: Counts, *shape: int) -> tuple[tuple[int, int], float]:
    """(launches forward and backward, bytes of both per element of one tensor)"""
    given = tensors(case, *shape)
    loss = case.loss(*given)
    forward = counts.launches
    loss.backward()
    return (forward, counts.launches - forward), counts.bytes / given[0].numel()


@pytest.mark.parametrize("name", LOGITS)
def test_losses_from_logits(counts, name):
    launches, each = run(LOGITS[name], counts, N, 1000)
    assert launches == LOGITS[name].launches
    assert name == "DIST" or LOGITS[name].bytes <= each <= LOGITS[name].bytes + 0.5


@pytest.mark.parametrize("name", MAPS)
def test_losses_from_maps(counts, name):
    launches, each = run(MAPS[name], counts, N, 256, 4, 4)
    assert launches == MAPS[name].launches
    assert MAPS[name].bytes <= each <= MAPS[name].bytes + 0.5


@pytest.mark.parametrize("C, most", [(1000, 6.5), (8192, 6.5), (21841, 10.5)])
@pytest.mark.parametrize("name", ["KD", "DKD"])
def test_bytes_of_a_pair_of_logits(counts, name, C, most):
    _, each = run(LOGITS[name], counts, N, C)
    assert most - 0.5 <= each <= most


@pytest.mark.parametrize("name", [*LOGITS, *MAPS])
@pytest.mark.parametrize("upstream", [1.0, 0.5])
def test_no_launch_asks_the_device(counts, monkeypatch, name, upstream):
    """A capture sees no further than the op that calls it."""
    case, shape = (LOGITS[name], (N, 1000)) if name in LOGITS else (MAPS[name], (N, 256, 4, 4))
    given = tensors(case, *shape)
    asked, file = [], interpreter.__file__

    def refused(name, original):
        def asks(*args, **kwargs):
            frames = traceback.extract_stack()
            if not any(frame.filename == file for frame in frames):  # the interpreter plays the device
                asked.append(f"{name}, {frames[-2].filename}:{frames[-2].lineno}")
            return original(*args, **kwargs)

        return asks

    for module in ("logit_loss", "dkd_loss"):  # labels are looked at on a CPU only, and these are
        monkeypatch.setattr(
            importlib.import_module(f"fastkd.kernels.{module}"), "check_labels", lambda *given, **named: None
        )
    for asking in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, asking, refused(asking, getattr(torch.Tensor, asking)))
    (upstream * case.loss(*given)).backward()
    assert counts.launches >= 2 and asked == []


def test_an_upstream_gradient_costs_the_reads_and_the_write_again(counts):
    given = tensors(LOGITS["KD"], N, 1000)
    (2 * LOGITS["KD"].loss(*given)).backward()
    assert counts.launches == 2 and 12 <= counts.bytes / given[0].numel() <= 12.5


def test_options_cost_no_launch(counts):
    student, teacher = tensors(LOGITS["KD"], N, 1000)
    options = {"label_smoothing": 0.1, "standardize": True}
    kd_loss(student, teacher, labels(student), **options).loss.backward()
    assert counts.launches == 2 and counts.bytes / student.numel() <= 6.5


@pytest.mark.parametrize("options, most", [({"reduction": "none"}, 10.5), ({"reduction": "sum"}, 6.5)])
def test_the_losses_of_rows_cost_no_launch(counts, options, most):
    """The gradient of a row waits for what comes from above: the forward pass writes none."""
    student, teacher = tensors(LOGITS["KD"], N, 1000)
    loss = kd_loss(student, teacher, labels(student), **options).loss
    forward = counts.launches
    loss.backward(torch.linspace(0, 1, N) if loss.dim() else None)
    assert (forward, counts.launches) == (1, 2)
    assert most - 0.5 <= counts.bytes / student.numel() <= most


def test_class_weights_and_masked_rows_cost_no_launch_of_the_kernel(counts):
    student, teacher = tensors(LOGITS["KD"], N, 1000)
    options = {"class_weights": torch.ones(1000), "ignore_index": 1, "mask_kd": True}
    kd_loss(student, teacher, labels(student), **options).loss.backward()
    assert counts.launches == 2 and counts.bytes / student.numel() <= 6 + 4 + 0.5  # a weight is read for each logit


def test_a_missing_target_is_not_read(counts):
    found = []
    for target in (labels(torch.empty(N, 1000)), None):
        student, teacher = tensors(LOGITS["KD"], N, 1000)
        before = counts.bytes
        kd_loss(student, teacher, target, ce_weight=0.0).loss.backward()
        found.append(counts.bytes - before)
    assert found[0] - found[1] == 8 * N
