"""The gate works in slices of time, keeps what it finds, and needs little; its jobs are small ones here."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from fastkd.bench.losses.baselines import kd
from fastkd.bench.losses.cases import Case, logits
from fastkd.bench.losses.measure import measure_losses
from fastkd.bench.scripts import gpu_gate
from fastkd.bench.scripts.gpu_gate import CIFAR, IMAGENET, new_record, place, report, run_accuracy, shown, work_off
from fastkd.bench.steps.measure import measure_step
from fastkd.bench.steps.report import show_step
from fastkd.bench.steps.workload import Workload

ROOT = Path(__file__).parent.parent
CPU, NEVER = torch.device("cpu"), float("inf")
GREEN = {"command": "pytest", "status": 0, "seconds": 1.0, "output": ["1 passed"]}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr("fastkd.bench.timing.BOUT", 0)
    monkeypatch.setattr("fastkd.bench.steps.measure.QUICK", 0)
    monkeypatch.setattr("fastkd.bench.losses.measure.copy_rate", lambda *_, **__: 1e9)


def jobs(done: list[str], **more) -> list:
    """One of each kind that counts, and then those of `more`."""
    case = Case("KD 6 x 5", partial(logits, 2, 6, 5), kd, kd, 1)

    def tests():
        done.append("tests")
        return GREEN

    found = [("tests", "gpu", tests)]
    found.append(("losses", case.name, lambda: (done.append("losses"), measure_losses([case], CPU, True, print))[1]))
    found += [("steps", name, work) for name, work in more.items()]
    return found


def test_all_of_it_and_the_markdown(tmp_path):
    path, record = tmp_path / "a-gate.json", new_record("CPU", True)
    pair = Workload("kd", "resnet14", "resnet8", (), 4, 16, 10)
    todo = jobs([], **{pair.name: partial(shown, show_step, measure_step, pair, CPU, True, False)})
    todo.append(("accuracy", "fashion", lambda: run_accuracy(tmp_path, path, NEVER)))
    assert work_off(todo, record, path, NEVER) == 0
    kept = json.loads(path.read_text())
    assert kept == json.loads(json.dumps(record)) and [len(run["cases"]) for run in kept["losses"].values()] == [1]
    assert kept["steps"][pair.name]["contenders"]["fastkd eager"]["status"] == "right"
    text = path.with_suffix(".md").read_text()
    assert "| gpu | passed | 1 | 1 passed |" in text and "KD 6 x 5" in text and f"| {pair.name} | fastkd" in text
    assert f"not run: no files in {tmp_path}" in text


def test_slices_resume(tmp_path):
    path, record, done = tmp_path / "a-gate.json", new_record("CPU", True), []
    todo = jobs(done, one=lambda: {}, two=lambda: {})
    assert work_off(todo, record, path, time.perf_counter()) == 3 and done == ["tests"]
    record = json.loads(path.read_text())
    assert work_off(todo, record, path, time.perf_counter()) == 3 and done == ["tests", "losses"]
    assert work_off(todo, record, path, NEVER) == 0 and done == ["tests", "losses"]
    assert list(json.loads(path.read_text())["steps"]) == ["one", "two"]


def test_a_slice_that_does_not_fit_is_not_begun(tmp_path):
    record, done = new_record("CPU", True), []
    record["seconds"] = {"tests gpu": 1.0, "losses KD 6 x 5": 1.0, "steps zero": 100.0}
    record["tests"] = {"gpu": GREEN}
    todo = jobs(done, one=lambda: done.append("one") or {}, two=lambda: done.append("two") or {})
    assert work_off(todo, record, tmp_path / "a-gate.json", time.perf_counter() + 50) == 3 and done == ["one"]


def test_unfinished_work_is_taken_up_again(tmp_path):
    record, answers = (
        new_record("CPU", True),
        iter([{"output": [], "unfinished": True}, {"runs": {}, "output": ["| a |"]}]),
    )
    todo = [*jobs([]), ("accuracy", "fashion", lambda: next(answers))]
    statuses = [work_off(todo, record, tmp_path / "a-gate.json", NEVER) for _ in range(3)]
    assert statuses == [3, 0, 0]


def test_after_a_red_test_nothing_is_timed(tmp_path):
    path, record, done = tmp_path / "a-gate.json", new_record("CPU", True), []
    todo = jobs(done)
    todo[0] = ("tests", "gpu", lambda: GREEN | {"status": 1, "output": ["1 failed"]})
    assert work_off(todo, record, path, NEVER) == 1 and done == []
    assert "| gpu | failed |" in report(record) and "losses" not in report(record)


def test_what_breaks_is_kept_and_the_others_go_on(tmp_path):
    record, done = new_record("CPU", True), []

    def breaks():
        raise RuntimeError("out of memory\nand a long story")

    todo = jobs(done, broken=breaks, fine=lambda: done.append("fine") or {})
    assert work_off(todo, record, tmp_path / "a-gate.json", NEVER) == 1 and "fine" in done
    assert record["steps"]["broken"] == {"error": "out of memory"}
    assert "broken failed: out of memory" in report(record)


def test_a_file_is_of_one_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("fastkd.bench.commit", lambda: "new")
    old = tmp_path / "2020-01-01-gate.json"
    old.write_text(json.dumps({"commit": "old", "quick": True, "seconds": {}}))
    reinit = place(tmp_path, True)
    assert reinit != old and not reinit.exists() and reinit.name.endswith("-gate.json")
    old.write_text(json.dumps({"commit": "new", "quick": True, "seconds": {}}))
    assert place(tmp_path, True) == old and place(tmp_path, False) != old


def test_the_pairs_of_the_gate_have_the_sizes_of_their_data(monkeypatch):
    cuda = torch.device("cuda")
    sizes = {(p.batch_size, p.image_size, p.classes) for p in (pair.filled(cuda) for pair in CIFAR)}
    large = {(p.batch_size, p.image_size, p.classes) for p in (pair.filled(cuda) for pair in IMAGENET)}
    assert sizes == {(128, 32, 100)} and large == {(256, 224, 1000)}
    assert len({pair.name for pair in (*CIFAR, *IMAGENET)}) == len(CIFAR) + len(IMAGENET) == 12


def test_it_imports_without_what_a_machine_for_measuring_lacks():
    hidden = [
        "nvidia.dali",
        "tyro",
        "docstring_parser",
        "rich",
        "matplotlib",
        "tensorboard",
        "sklearn",
        "hypothesis",
        "apex",
    ]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({hidden}, None)); import fastkd.bench.scripts.gpu_gate as gate; "
    )
    code += "from fastkd.bench import show_table; show_table(['a', 'b'], [['long', '1']], 1); "
    code += "print(gate.run_accuracy(gate.ROOT, gate.ROOT, 0.0))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[:2] == ["a     b", "long  1"]


def test_its_tests_are_found_without_what_a_machine_for_measuring_lacks(tmp_path):
    """Tests that need more are skipped; none is an error, which would end the gate before it has begun."""
    (tmp_path / "collect.py").write_text(
        "import sys, pytest\n"
        "LACKING = ('rich', 'hypothesis', 'sklearn', 'matplotlib', 'tyro', 'docstring_parser', 'tensorboard',\n"
        "           'nvidia.dali')\n"
        "class Without:\n"
        "    def __init__(self, finder): self.finder = finder\n"
        "    def __getattr__(self, name): return getattr(self.finder, name)\n"
        "    def find_spec(self, name, *more):\n"
        "        return None if name.startswith(LACKING) else self.finder.find_spec(name, *more)\n"
        "sys.meta_path[:] = map(Without, sys.meta_path)\n"
        "sys.exit(pytest.main(['-q', '--collect-only', *sys.argv[1:]]))\n"
    )
    command = [sys.executable, str(tmp_path / "collect.py"), *gpu_gate.TESTS["gpu"]]
    settings = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    run = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    assert "test_gpu.py::test_graphs_learn" in run.stdout and "test_logit_loss.py::" in run.stdout
