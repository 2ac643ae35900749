"""Job: launches per step of the gate's pairs are those of budgets.json."""

import pytest
import torch
from null_device import budgets

CASES = [(pair, form) for pair in budgets.PAIRS for form in budgets.FORMS]
VERSION = budgets.read()["torch"]


@pytest.fixture(scope="session")
def counted():
    known: dict = {}

    def count(pair, form):
        key = budgets.title(pair, form)
        if key not in known:
            known[key] = budgets.measure(pair, form)
        return known[key]

    return count


@pytest.mark.skipif(not torch.__version__.startswith(f"{VERSION}."), reason=f"budgets.json is for torch {VERSION}")
@pytest.mark.parametrize(("pair", "form"), CASES, ids=lambda value: getattr(value, "name", value))
def test_launches_are_within_the_budget(pair, form, counted):
    """A count well below its budget fails too, so that the file tells the truth."""
    found, budget = counted(pair, form), budgets.read()["launches"].get(budgets.title(pair, form))
    assert (found is None) == (budget is None), f"{budgets.title(pair, form)}: run budgets.py --write"
    for name, count in (found or {}).items():
        if name == "beside teacher":  # the more the better
            assert count >= budget[name], f"{name}: {count}, was {budget[name]}"
        else:
            assert count <= budget[name], f"{name}: {count} launches, the budget is {budget[name]}"
            low = count < budgets.SLACK * budget[name]
            assert not low, f"{name}: {count} launches of {budget[name]}: lower the budget, budgets.py --write"


@pytest.mark.parametrize(
    "pair",
    [pair for pair in budgets.PAIRS if pair.method in ("kd", "sokd", "sokd+dkd")],
    ids=lambda pair: pair.name,
)
def test_60_nodes_of_the_student_can_run_beside_the_teacher(pair, counted):
    assert counted(pair, "plain")["beside teacher"] >= 60


def test_at_most_6_kernels_end_a_step_beside_the_optimizer(counted):
    assert counted(budgets.PAIRS[0], "plain")["end of step"] <= 6
