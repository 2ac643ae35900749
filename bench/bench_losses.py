"""The losses for pytest-benchmark: `pytest bench/`, `pytest bench/ -k "DCM and both"`, `--benchmark-compare`.

One test for each case, way and mode. A wrong way fails and gets no time; one that cannot be built here is skipped, with
the reason. For ratios of alternating calls in one run, see `fastkd bench loss`.
"""

import functools
from typing import Any

import pytest
import torch

from fastkd.bench import Record, default_device
from fastkd.bench.losses.cases import COMPILED, Case, cases, ways
from fastkd.bench.losses.measure import judge, leaves
from fastkd.bench.timing import Work, works
from fastkd.engine.precision import Precision

DEVICE = default_device()
PRECISION = Precision("auto", DEVICE)
ROUNDS = 10
IDS = {"fastkd": "ours", COMPILED: "ours compiled"}  # "fastkd" in every id would make -k "KD" choose all
WAYS = ("fastkd", "eager", COMPILED, "compile")
PARAMETERS = [
    pytest.param(case, name, mode, id=f"{case.name}-{IDS.get(name, name)}-{mode}")
    for case in cases(DEVICE)
    for name in (*WAYS, *case.others)
    for mode in (("forward", "backward", "both") if case.learners else ("forward",))
]


@functools.lru_cache(maxsize=1)  # the tests of a way follow one another; the tensors of all would not fit
def prepared(case: Case, name: str) -> tuple[dict[str, Work], Record]:
    """The calls by mode, and the verdict on the way."""
    function, tensors = ways(case)[name], leaves(case.make(DEVICE, PRECISION.dtype), case.learners)
    return works(function, tensors, case.learners), judge(case, {name: function}, tensors)[name]


@pytest.mark.parametrize(("case", "name", "mode"), PARAMETERS)
def test_loss(benchmark: Any, case: Case, name: str, mode: str) -> None:
    calls, verdict = prepared(case, name)
    if verdict["status"] == "unavailable":
        pytest.skip(verdict["reason"])
    assert verdict["status"] == "right", verdict["reason"]
    benchmark.group = f"{case.name}, {mode}"

    def timed(given: object) -> None:
        calls[mode].run(given)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    with PRECISION.autocast():
        benchmark.pedantic(timed, setup=lambda: ((calls[mode].prepare(),), {}), rounds=ROUNDS, warmup_rounds=2)
