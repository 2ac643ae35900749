"""The wait for the data: what the loader takes, without what the step takes and what a step on the device takes."""

import json
import time

import pytest
import torch

from fastkd.curves import is_loss_term
from fastkd.data.base import EpochLoader
from fastkd.data.order import ONE_PROCESS
from fastkd.data.wait import DataWait
from fastkd.progress import Bar

alone = lambda thing: [thing]  # noqa: E731


class Clock:
    """Stands for time.perf_counter; `sleep` moves it."""

    def __init__(self):
        self.now = 100.0

    def sleep(self, seconds):
        self.now += seconds

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


class Loader(EpochLoader):
    """Batch i takes `waits[i]` seconds, of which it waits `held` for the device; the end takes `end`."""

    name = "slow"

    def __init__(self, clock, waits, held=0.0, end=0.0):
        super().__init__(("a", "b"), 2 * len(waits), 2, ONE_PROCESS, train=True)
        self.clock, self.waits, self.held, self.end = clock, waits, held, end

    def batches(self, epoch, first):
        for seconds in self.waits:
            self.clock.sleep(seconds - self.held)
            self.hold_until(self)
            yield torch.zeros(2), torch.zeros(2)
        self.clock.sleep(self.end)

    def synchronize(self):
        self.clock.sleep(self.held)


@pytest.mark.parametrize("held", [0.0, 0.5])
def test_the_loader_is_counted_and_the_step_is_not(clock, held):
    wait, loader = DataWait(), Loader(clock, [3.0, 1.0, 2.0], held, end=0.25)
    for _ in wait.batches(loader):
        clock.sleep(7.0)
    assert wait.steps == 3
    assert wait.first == 3.0 - held and wait.seconds == 6.25 - 3 * held
    rates = wait.rates(25.0, alone)
    assert rates["data_wait_ms"] == pytest.approx(1e3 * wait.seconds / 3, abs=1e-3)
    assert rates["data_wait_percent"] == pytest.approx(4 * wait.seconds, abs=1e-2)


def test_the_process_that_waits_longest_counts(clock):
    wait = DataWait()
    for _ in wait.batches(Loader(clock, [1.0, 1.0])):
        pass
    assert wait.rates(8.0, lambda mine: [mine, 4.0, 0.0]) == {"data_wait_ms": 2000.0, "data_wait_percent": 50.0}


def test_each_epoch_begins_at_zero_and_a_list_may_stand_for_the_loader(clock):
    wait = DataWait()
    for _ in range(2):
        for _ in wait.batches([1, 2]):
            clock.sleep(1.0)
        assert (wait.steps, wait.seconds) == (2, 0.0)
    assert list(wait.batches([])) == [] and wait.rates(1.0, alone)["data_wait_ms"] == 0.0


@pytest.mark.parametrize(
    ("waits", "step", "is_large"),
    [([1.0, 1.0, 1.0], 2.6, True), ([1.0, 1.0, 1.0], 2.7, False), ([60.0, 0.1, 0.1], 2.0, False)],
    ids=["above a fifth", "below a fifth", "only the first batch"],
)
def test_a_large_wait_is_logged_once(clock, capsys, waits, step, is_large):
    bar = Bar(3, 0, 3)
    for epoch in range(3):
        bar.start_epoch(epoch)
        loader = Loader(clock, waits)
        for _ in bar.wait.batches(loader):
            clock.sleep(step)
        bar.rates()
    assert capsys.readouterr().out.count("`fastkd bench data`") == is_large


def test_the_history_and_the_epochs_line_have_it(tiny_net, tiny_loaders, tmp_path, capsys):
    from fastkd.engine import TrainOptions
    from fastkd.methods import METHODS
    from fastkd.train import Trainer

    train, val = tiny_loaders()
    batches = type(train).__iter__

    def slowly(self):
        for batch in batches(self):
            time.sleep(0.02)
            yield batch

    slow = type("Slow", (type(train),), {"__iter__": slowly})()
    options = TrainOptions(epochs=2, out=str(tmp_path / "run"), device="cpu")
    result = Trainer(METHODS["ce"](tiny_net()), slow, val, options).fit()
    for row in result.history:
        assert row["data_wait_ms"] > 20 and 0 < row["data_wait_percent"] <= 100
        assert row["data_wait_ms"] * 3 <= 1e3 * row["train_s"] + 10  # the seconds of the row have two digits
    rows = [json.loads(line) for line in (tmp_path / "run/history.jsonl").read_text().splitlines()]
    assert [row["data_wait_ms"] for row in rows] == [row["data_wait_ms"] for row in result.history]
    assert capsys.readouterr().out.count("data wait ") == 2
    assert not is_loss_term("data_wait_ms") and not is_loss_term("data_wait_percent")
