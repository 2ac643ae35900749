"""A signal ends a run after a step, saved, with status 75; nothing of the job stays behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from torchrun import TORCHRUN, processes

from fastkd import distributed, signals
from fastkd.signals import Ended, Stopped, StopRequest, end_on_signals, stop_on_signals

OPTIONS = ["--method", "ce", "--student", "resnet8", "--no-baseline", "--warmup-epochs", "0", "--epochs", "40"]


def started(out: Path, *launcher: str) -> subprocess.Popen:
    """A job that has saved once."""
    command = [sys.executable, *launcher, "-m", "fastkd", "train", *OPTIONS, "-b", "128", "--out", str(out)]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 100
    while not (out / "last.pt").exists() and time.monotonic() < until and job.poll() is None:
        time.sleep(0.1)
    return job


def ended(job: subprocess.Popen, out: Path, seconds: float) -> str:
    """stderr of the job, after all its processes have gone within the seconds."""
    until = time.monotonic() + seconds
    text = job.communicate(timeout=seconds)[1]
    while processes(str(out)) and time.monotonic() < until:
        time.sleep(0.2)
    assert not processes(str(out))
    return text


def test_a_worker_whose_parent_died_before_it_began_ends():
    """Between the fork and prctl nothing tells a worker that its parent dies."""
    script = """
import multiprocessing, os, time
from fastkd.signals import begin_worker
def work(parent):
    while os.getppid() == parent:
        time.sleep(0.01)
    begin_worker()
    time.sleep(60)
multiprocessing.get_context("fork").Process(target=work, args=(os.getpid(),)).start()
os._exit(0)
"""
    job = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert job.communicate(timeout=20)[0] == b""  # the worker holds the pipe open as long as it lives


def test_a_first_signal_is_a_request_and_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)]
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):
        with pytest.raises(Stopped), stop_on_signals() as request:
            assert request.name == ""
            os.kill(os.getpid(), signal.Signals[name])
            os.kill(os.getpid(), signal.SIGTERM)  # torchrun sends another one at once
            assert request.name == name
            raise Stopped(name, "")
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)]


def test_a_signal_after_the_last_look_is_not_lost():
    with pytest.raises(Ended) as stop, stop_on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.value.name == "SIGTERM"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_that_a_library_turns_into_an_error_is_still_one(name):
    """As the reader of safetensors does: it raises a ValueError of its own."""
    with pytest.raises(Ended) as stop, end_on_signals():
        try:
            os.kill(os.getpid(), signal.Signals[name])
            time.sleep(5)
        except BaseException:
            raise ValueError("could not determine the shape of an object") from None
    assert stop.value.name == name
    with pytest.raises(ValueError, match="of its own"), end_on_signals():
        raise ValueError("of its own")


def test_a_signal_that_python_drops_in_a_callback_ends_the_next_training(capfd):
    class Callback:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(5)

    with pytest.raises(Ended) as stop, end_on_signals():
        Callback()
        with stop_on_signals():
            pytest.fail("the training began")
    assert stop.value.name == "SIGUSR1" and capfd.readouterr().err == ""


def test_a_stop_names_the_command_that_goes_on():
    with (
        pytest.raises(Stopped, match="stopped by SIGINT; go on with `fastkd x`") as stop,
        signals.names_the_command("fastkd x"),
    ):
        raise KeyboardInterrupt
    assert not stop.value.agreed
    with pytest.raises(Stopped, match="SIGTERM after step 3; go on") as stop, signals.names_the_command("fastkd x"):
        raise Stopped("SIGTERM", "after step 3")
    assert stop.value.agreed
    with pytest.raises(ValueError, match="of its own"), signals.names_the_command("fastkd x"):
        raise ValueError("of its own")


def test_the_death_of_torchrun_is_no_second_signal(monkeypatch):
    monkeypatch.setattr(signals, "TORCHRUN_DIED", threading.Event())
    monkeypatch.setattr(os, "_exit", lambda status: ended_at_once.append(status))
    ended_at_once: list[int] = []
    hear = signals.Repeated(StopRequest())
    hear(signal.SIGUSR1)
    hear.first -= signals.REPEAT_S + 1
    signals.TORCHRUN_DIED.set()
    hear(signal.SIGTERM)
    assert ended_at_once == []
    signals.TORCHRUN_DIED.clear()
    hear(signal.SIGTERM)
    assert ended_at_once == [128 + signal.SIGTERM]


def test_an_ignored_signal_stays_ignored():
    """nohup ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as request, end_on_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            assert request.name == ""
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_of_a_training_a_signal_ends_at_once():
    with pytest.raises(Ended) as stop, end_on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert stop.value.name == "SIGTERM"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
@pytest.mark.parametrize("command", ["train", "methods"])
def test_a_signal_among_imports_ends_at_once(command, name):
    """Where an exception would be lost: Python ignores those of callbacks, of which imports have many."""
    script = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Callback:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})
class Finder:
    def find_spec(self, module, *_):
        if module == "fastkd.commands.{command}":
            Callback()
            sys.exit(9)
sys.meta_path.insert(0, Finder())
from fastkd.cli import main
sys.argv = ["fastkd", "{command}"]
main()
"""
    done = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, timeout=60)
    early = " at the start: nothing was trained or written; run the same command again" * (command == "train")
    assert done.stderr == f"fastkd: stopped by {name}{early}\n"
    assert done.returncode == (75 if command == "train" else 128 + signal.Signals[name])


def test_another_thread_gets_a_request_that_stays_empty():
    found: list[StopRequest] = []

    def work():
        with stop_on_signals() as request:
            found.append(request)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [request.name for request in found] == [""]


def test_a_second_signal_ends_at_once_while_the_main_thread_waits_in_a_library():
    """The main thread holds no interpreter: it waits in C, as for a GPU or another process."""
    script = """
import ctypes, os, signal, sys, time
from fastkd.signals import stop_on_signals
with stop_on_signals():
    print("ready", flush=True)
    libc = ctypes.CDLL(None)
    until = time.monotonic() + 30
    mask = (ctypes.c_ulong * 16)(*[2**64 - 1] * 16)
    libc.sleep(30) or libc.sleep(30)
    while time.monotonic() < until:
        libc.usleep(1000000)
"""
    job = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert job.stdout.readline() == "ready\n"
    job.send_signal(signal.SIGTERM)
    time.sleep(1.3)
    job.send_signal(signal.SIGTERM)
    text = job.communicate(timeout=5)[1]
    assert job.returncode == 143 and text.splitlines()[-1].startswith("fastkd: ended by a second signal, SIGTERM")


def test_a_signal_saves_and_names_the_command(tmp_path):
    job = started(tmp_path / "run")
    job.send_signal(signal.SIGTERM)
    text = ended(job, tmp_path, 20)
    assert job.returncode == 75 and "Traceback" not in text, text
    last = text.splitlines()[-1]
    assert last.startswith("fastkd: stopped by SIGTERM after ")
    assert last.endswith(f"; go on with `fastkd train --out {tmp_path}/run --resume`")


@pytest.mark.every
@pytest.mark.parametrize("name", ["SIGINT", "SIGUSR1", "SIGHUP"])
def test_every_signal_saves(tmp_path, name):
    job = started(tmp_path / "run")
    job.send_signal(signal.Signals[name])
    assert f"stopped by {name} after" in ended(job, tmp_path, 20) and job.returncode == 75


@pytest.mark.every
@pytest.mark.parametrize("name, seconds", [("SIGTERM", 20), ("SIGINT", 20), ("SIGUSR1", 30), ("SIGKILL", 30)])
def test_a_signal_to_torchrun_leaves_no_process(tmp_path, name, seconds):
    """SIGUSR1 and SIGKILL end torchrun itself. Its processes see that, save and end."""
    job = started(tmp_path / "run", *TORCHRUN)
    job.send_signal(signal.Signals[name])
    text = ended(job, tmp_path, seconds)
    ours = [line for line in text.splitlines() if line.startswith("fastkd: stopped")]
    again = f"torchrun --standalone --nproc-per-node 2 -m fastkd train --out {tmp_path}/run --resume`"
    assert len(ours) == 1 and ours[0].endswith(again)


@pytest.mark.every
def test_a_process_that_hangs_ends_the_job(tmp_path):
    """The other one ends after --peer-timeout with one line; torchrun then ends the one that hangs."""
    options = ["--peer-timeout", "15"]
    OPTIONS.extend(options)
    try:
        job = started(tmp_path / "run", *TORCHRUN)
    finally:
        del OPTIONS[-2:]
    assert job.poll() is None, job.communicate()[1]
    hanging = [pid for pid, line in processes(str(tmp_path)) if "distributed.run" not in line][-1]
    os.kill(hanging, signal.SIGSTOP)
    text = ended(job, tmp_path, 100)
    assert sum("has not answered within --peer-timeout" in line for line in text.splitlines()) == 1
    assert text.count("Traceback") == 1  # torchrun's own


def test_resume_auto_starts_and_goes_on(fastkd, few_digits):
    options = [*OPTIONS[:-1], "1", "-b", "128", "--out", "run", "--resume", "auto"]
    status, out, _ = fastkd("train", *options)
    assert status == 0 and "--resume auto: starts a new run in run" in out
    status, out, _ = fastkd("train", *options)
    assert status == 0 and "--resume auto: goes on with the run in run" in out
    status, _, err = fastkd("train", *OPTIONS[:-1], "1", "--resume", "auto")
    assert status == 2 and "--resume auto needs --out FOLDER" in err
    assert fastkd("train", "--out", "new", "--resume=auto", "--print-config")[0] == 0 and not Path("new").exists()


def test_the_command_names_torchrun_where_it_was_used(monkeypatch):
    assert distributed.command("train", "--out", "my run") == "fastkd train --out 'my run'"
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert distributed.command("train") == "torchrun --standalone --nproc-per-node 8 -m fastkd train"
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert distributed.command("train") == "torchrun --nnodes 2 ... --nproc-per-node 8 -m fastkd train"


@pytest.mark.parametrize("rank, lines", [("0", 1), ("1", 0)])
def test_rank_0_alone_says_that_the_job_stopped(fastkd, monkeypatch, rank, lines):
    def run(arguments):
        raise Stopped("SIGTERM", "after step 3 of 9", "fastkd train --resume")

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("fastkd.commands.methods.run", run)
    status, _, err = fastkd("methods")
    assert status == 75 and err.count("\n") == lines
