"""Tests of signals hear them wherever they run."""

import signal

import pytest


@pytest.fixture(autouse=True)
def heard():
    """nohup ignores SIGHUP, and a shell's & SIGINT: these tests hear them there as well."""
    handlers = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
