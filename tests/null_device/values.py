"""A pytest plugin for the null device, where every value is whatever the memory holds.

- What a program reads back from the device has a fixed value: 0, or 1 in each place of a list. A condition is True,
  but no element is the one that `any()` looks for. So no training diverges and every teacher form agrees. The device
  is still asked, so waits and captures show as before.
- With --any-values no test fails for a value, as kernels compute nothing: a failed assertion is a pass, gradcheck runs
  and is always content, assert_close compares devices, dtypes and shapes but no values. Every other exception stays an
  error: refused calls, invalid captures, host syncs, wrong devices. Use it with --assert=plain.
- The process ends without Python's clean-up, which may call CUDA after its library is gone.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


class SGD(torch.optim.SGD):
    """Without torch's check that a learning rate on the device is not negative. The groups have their own rates."""

    def __init__(self, params: Any, lr: Any = 0.1, **options: Any):
        super().__init__(params, lr=0.1, **options)


def install() -> None:
    """Give everything that is read back from the device a fixed value."""
    _patch(Tensor, "item", lambda value: type(value)(0))
    _patch(Tensor, "any", _marked)
    _patch(Tensor, "__bool__", lambda value: True)
    _patch(Tensor, "__float__", lambda value: 1.0)
    _patch(Tensor, "__int__", lambda value: 1)
    _patch(Tensor, "tolist", _ones)
    _patch(torch, "allclose", lambda value: True)
    _patch(torch, "equal", lambda value: True)
    torch.optim.SGD = SGD


def accept_any_values() -> None:
    """Compare no values, so that a test goes on to its last line."""
    gradcheck = torch.autograd.gradcheck

    def run_gradcheck(*inputs: Any, **options: Any) -> bool:
        gradcheck(*inputs, **options | {"raise_exception": False})
        return True

    torch.autograd.gradcheck = run_gradcheck
    torch.testing.assert_close = _check_kinds


def _check_kinds(
    actual: Any, expected: Any, *, check_device: bool = True, check_dtype: bool = True, **tolerances: Any
) -> None:
    for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            wrong = a.shape != b.shape or check_device and a.device != b.device or check_dtype and a.dtype != b.dtype
            if wrong:  # no AssertionError, which would be a pass
                raise TypeError(f"{a.shape} {a.dtype} {a.device} is compared with {b.shape} {b.dtype} {b.device}")


def _patch(owner: Any, name: str, fixed: Callable[[Any], Any]) -> None:
    own = getattr(owner, name)

    def read(tensor: Tensor, *more: Any, **options: Any) -> Any:
        value = own(tensor, *more, **options)
        if name == "__bool__" and getattr(tensor, "is_any", False):
            return False
        return fixed(value) if tensor.is_cuda else value

    setattr(owner, name, read)


def _marked(result: Tensor) -> Tensor:
    result.is_any = True  # type: ignore[attr-defined]
    return result


def _ones(value: Any) -> Any:
    return [_ones(each) for each in value] if isinstance(value, list) else type(value)(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--any-values", action="store_true", help="failed assertions are passes")
    parser.addoption("--sample", type=int, default=1, help="run the first of each N cases of a test function")


def pytest_configure(config: pytest.Config) -> None:
    install()
    if config.option.any_values:
        accept_any_values()


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the first of each N cases of every test function, so that each function runs."""
    seen: dict[str, int] = {}
    kept = []
    for item in items:
        name = item.nodeid.split("[")[0]
        seen[name] = seen.get(name, -1) + 1
        if seen[name] % config.option.sample == 0:
            kept.append(item)
    items[:] = kept


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    outcome = yield
    report = outcome.get_result()
    if report.failed and item.config.option.any_values and isinstance(call.excinfo.value, AssertionError):
        report.outcome, report.longrepr = "passed", None


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[_STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(config.stash.get(_STATUS, 1))


_STATUS = pytest.StashKey[int]()
