"""How the tests run, and the fixtures they share."""

import os
from pathlib import Path

import pytest
import torch
from tiny import TinyLoader, TinyNet

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: kernels run on the CPU, line by line

for name in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(name, None)  # of the caller's terminal: what is printed depends on them
os.environ["TERM"] = "xterm"

torch.set_num_threads(1)  # the networks here are too small for more

# A process's first backward pass starts a thread for each device; a fork of it can then run none. torch.export pretends
# that there are devices. So the first backward pass comes before every test: without devices there are no threads.
torch.zeros((), requires_grad=True).backward()

TESTS = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run all of tests/ in one process per core, at most 8, where pytest-xdist is installed and nobody chose otherwise.

    One file, tests that need a GPU, `-s` and `--pdb` stay in one process.
    """
    option = config.option
    if not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"):
        return
    chosen = option.numprocesses is not None or option.dist != "no" or option.tx
    alone = option.usepdb or option.capture == "no" or option.collectonly or "not gpu" not in option.markexpr
    everything = TESTS in [(config.invocation_params.dir / argument).resolve() for argument in config.args]
    if everything and not chosen and not alone:
        option.numprocesses, option.maxprocesses, option.dist = "logical", 8, "loadgroup"
        option.benchmark_disable = True  # pytest-benchmark does so anyway, and warns


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector):
    """Skip a test module that imports a package which a machine for measuring may lack."""
    outcome = yield
    report = outcome.get_result()
    for name in ("matplotlib", "rich", "sklearn", "tyro"):
        if report.failed and f"No module named '{name}" in str(report.longrepr):
            report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: {name} is not installed")


@pytest.fixture
def tiny_net():
    """A factory: tiny_net(seed) -> network with weights of that seed and BatchNorm statistics that are not trivial."""

    def make(seed: int = 0, **sizes):
        torch.manual_seed(seed)
        net = TinyNet(**sizes)
        net.bn.running_mean.normal_(0, 0.1)
        net.bn.running_var.uniform_(0.5, 1.5)
        return net

    return make


@pytest.fixture(scope="session")
def tiny_loaders():
    """(training, validation)"""
    return lambda **sizes: (TinyLoader(**sizes), TinyLoader(samples=17, seed=1, shuffle=False))


@pytest.fixture
def few_digits(monkeypatch):
    """The command on a sixth of the digits, without timing the networks."""
    from fastkd.data import digits

    everything = digits.read_digits()
    monkeypatch.setattr(digits, "read_digits", lambda: tuple(part[:300] for part in everything))
    for command in ("train", "eval"):
        monkeypatch.setattr(f"fastkd.commands.{command}.speed", lambda *_: 1.0)


@pytest.fixture
def fastkd(monkeypatch, capsys, tmp_path):
    """Run a command in an empty folder: fastkd("train", "--epochs", "1") -> (exit status, stdout, stderr)."""
    from fastkd.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: str):
        monkeypatch.setattr("sys.argv", ["fastkd", *map(str, arguments)])
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run
