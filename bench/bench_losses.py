"""The losses for pytest-benchmark: `pytest bench/`, `pytest bench/ -k "DCM and both"`, `--benchmark-compare`.

One test for each case, contender and mode. A contender that is wrong fails and gets no time; one that cannot be built
here is skipped, with the reason. For ratios from one run, with interleaved calls, see `fastkd bench loss`.
"""

import functools

import pytest
import torch

from fastkd.bench.cases import Case, cases, contenders
from fastkd.bench.clock import Work, works
from fastkd.bench.measure import autocast, judge, leaves, precision

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 10
NAMES = ("fastkd", "eager", "compile")


@functools.lru_cache(maxsize=1)  # the tests of a case follow one another; the tensors of all would be too much
def prepared(case: Case) -> tuple[dict, list]:
    return contenders(case), leaves(case.make(DEVICE, precision(DEVICE)), case.learners)


@functools.lru_cache(maxsize=8)
def judged(case: Case, name: str) -> dict:
    functions, tensors = prepared(case)
    return judge(case, {name: functions[name]}, tensors)[name]


def parameters() -> list:
    """Ours is not called fastkd in the ids, for -k "KD" to mean something."""
    return [
        pytest.param(case, name, mode, id=f"{case.name}-{'ours' if name == 'fastkd' else name}-{mode}")
        for case in cases(DEVICE)
        for name in (*NAMES, *case.others)
        for mode in (("forward", "backward", "both") if case.learners else ("forward",))
    ]


def timed(work: Work, given: object) -> None:
    work.run(given)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize(("case", "name", "mode"), parameters())
def test_loss(benchmark, case, name, mode):
    verdict = judged(case, name)
    if verdict["status"] == "unavailable":
        pytest.skip(verdict["reason"])
    assert verdict["status"] == "right", verdict["reason"]
    functions, tensors = prepared(case)
    work = works(functions[name], tensors, case.learners)[mode]
    benchmark.group = f"{case.name}, {mode}"
    with autocast(DEVICE):
        benchmark.pedantic(
            timed, setup=lambda: ((work, work.prepare()), {}), rounds=ROUNDS, warmup_rounds=2, iterations=1
        )
