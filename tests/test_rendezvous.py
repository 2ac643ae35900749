"""Processes find each other at each start of a job, whatever an earlier start has left in the store that they share."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from fastkd import rendezvous
from fastkd.errors import UserError
from fastkd.rendezvous import store_of_this_start

WAIT = timedelta(seconds=20)


@pytest.fixture(autouse=True)
def no_start(monkeypatch):
    """Other tests of this process are in no job."""
    monkeypatch.setattr(rendezvous, "prefix_of_this_start", "")


@pytest.fixture
def shared():
    return dist.HashStore()


@pytest.fixture
def start(monkeypatch, shared):
    """`start(delays)` starts one rank for each delay in seconds, in threads that share a store; gives their stores."""
    here = threading.local()
    monkeypatch.setattr(dist, "rendezvous", lambda url, timeout: iter([(shared, here.rank, ranks_in_all[0])]))
    ranks_in_all = [0]

    def one(rank: int, delay: float) -> dist.Store:
        time.sleep(delay)
        here.rank = rank
        store, *place = store_of_this_start(WAIT)
        assert place == [rank, ranks_in_all[0]]
        return store

    def all_of_them(delays):
        ranks_in_all[0] = len(delays)
        with ThreadPoolExecutor(len(delays)) as threads:
            return list(threads.map(one, range(len(delays)), delays))

    return all_of_them


@pytest.mark.parametrize("delays", [(0, 0.2), (0.2, 0), (0, 0.1, 0.3)])
def test_a_start_does_not_see_what_an_earlier_one_has_left(start, delays):
    for _ in range(3):
        stores = start(delays)
        assert not any(store.check(["address of 1"]) for store in stores)
        stores[1].set("address of 1", "here")
        assert [store.get("address of 1") for store in stores] == [b"here"] * len(delays)


def test_the_question_of_a_process_that_was_killed_does_not_count(start, shared):
    """It had asked, and got an answer or not; the one that takes its place is waited for."""
    shared.set("question of 1", "of the one that was killed")
    stores = start((0, 0.3))
    stores[1].set("address of 1", "here")
    assert stores[0].get("address of 1") == b"here"


def test_a_process_that_does_not_start_is_named(monkeypatch):
    monkeypatch.setattr(dist, "rendezvous", lambda url, timeout: iter([(dist.HashStore(), 0, 2)]))
    with pytest.raises(UserError, match="process 1 has not started"):
        store_of_this_start(timedelta(seconds=0.1))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_wait_for_other_processes(name):
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    script = (
        "import signal, threading\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from fastkd.distributed import device_for\n"
        "threading.Timer(1, print, ['waiting'], {'flush': True}).start()\n"
        "device_for('cpu')\n"
    )
    job = subprocess.Popen(
        [sys.executable, "-c", script],
        env=os.environ | place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert job.stdout and job.stdout.readline() == "waiting\n"
    job.send_signal(signal.Signals[name])
    said = job.communicate(timeout=10)[1]
    last = f"fastkd: stopped by {name} at the start: nothing was trained or written; run the same command again"
    assert (job.returncode, said.splitlines()[-1]) == (75, last)
