"""When a state is saved, and when a run stops."""

import pytest

from fastkd import distributed
from fastkd.errors import UserError
from fastkd.run import pace
from fastkd.run.pace import Interval, Pace, interval_of
from fastkd.signals import StopRequest


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still: clock[0] is its time in seconds."""
    now = [100.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    "text, interval",
    [("500", (500, 0)), ("90s", (0, 90)), ("10m", (0, 600)), ("2h", (0, 7200)), ("off", (0, 0))],
)
def test_an_interval_is_steps_or_a_time(text, interval):
    assert interval_of(text) == Interval(*interval)


@pytest.mark.parametrize("text", ["0", "-5", "5 m", "m", "", "5d", "1e3", "0s", "5.5m", "always"])
def test_other_intervals_are_refused(text):
    with pytest.raises(UserError, match="--checkpoint-every .*: give a number of steps such as 500"):
        interval_of(text)


def test_states_come_every_so_many_steps(clock):
    saved = Pace("3", StopRequest())
    assert [step for step in range(1, 11) if saved(step).save] == [3, 6, 9]


def test_states_come_every_so_many_seconds(clock):
    saved, steps = Pace("2m", StopRequest()), []
    for step in range(1, 11):
        clock[0] += 50
        if saved(step).save:
            steps.append(step)
    assert steps == [3, 6, 9]


def test_off_saves_nothing_and_still_stops(clock):
    request = StopRequest()
    look = Pace("off", request)
    clock[0] += 1e6
    assert look(1) == (False, "")
    request.name = "SIGTERM"
    assert look(2) == (False, "SIGTERM")


def test_processes_agree_about_once_a_second(clock, monkeypatch):
    """The clock of rank 0 counts, and a signal to any of them stops all."""
    asked = []

    def gather(mine):
        asked.append(mine)
        return [(False, "", 0.1), (True, "SIGUSR1" if len(asked) == 3 else "", 0.05)]

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather", gather)
    look, stops = Pace("10m", StopRequest()), {}
    for step in range(1, 31):
        clock[0] += 0.1
        if (found := look(step)).stop:
            stops[step] = found
    assert len(asked) == 3 and stops == {21: (False, "SIGUSR1")}  # after steps 1, 11 and 21


def test_a_run_that_goes_on_far_within_hears_a_signal_within_seconds(clock, monkeypatch):
    """The steps before its start have taken it no time, so they do not count as fast ones."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather", lambda mine: [(mine[0], mine[1], 0.3), (mine[0], mine[1], mine[2])])
    request = StopRequest()
    look = Pace("10m", request)
    for step in range(5001, 5031):
        clock[0] += 0.3
        if step == 5002:
            request.name = "SIGTERM"
        if look(step).stop:
            break
    assert step <= 5010
