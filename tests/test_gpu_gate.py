"""The gate works in slices of time, keeps what it finds, and survives what breaks; its jobs are small ones here."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from fastkd import bench
from fastkd.bench.losses.baselines import kd
from fastkd.bench.losses.cases import Case, logits
from fastkd.bench.losses.measure import measure_losses
from fastkd.bench.scripts import gate_jobs, gpu_gate
from fastkd.bench.scripts.gate_jobs import Job, all_jobs, run_accuracy, run_tests
from fastkd.bench.scripts.gate_report import all_right, defaults, report
from fastkd.bench.scripts.gpu_gate import check_device, new_record, opened, place, work_off
from fastkd.bench.scripts.isolated import run_isolated
from fastkd.bench.steps.measure import measure_step
from fastkd.bench.steps.workload import CIFAR, IMAGENET, Workload
from fastkd.errors import UserError

ROOT = Path(__file__).parent.parent
CPU, NEVER = torch.device("cpu"), float("inf")
ABOUT = {"gpu": "CPU", "environment": {"torch": "2", "cpus": 2}, "quick": True, "dry_run": False}
GREEN = {"command": "", "passed": 1, "skipped": 0, "wrong values": 0, "failed": {}}


def record():
    return new_record(ABOUT, "abc")


@pytest.fixture
def done(tmp_path):
    """`done()`: what the jobs have written. They have processes of their own, so they write into a file."""
    file = tmp_path / "done"
    file.touch()

    def read():
        return file.read_text().split()

    read.write = lambda word: file.open("a").write(f"{word}\n")
    return read


@pytest.fixture
def job(done):
    """A job that writes its name, and then does its work."""

    def make(kind, name, work=lambda keep: {"forms": {}}):
        return Job(kind, name, lambda keep: (done.write(name), work(keep))[1])

    return make


def test_all_of_it_and_the_markdown(tmp_path, monkeypatch):
    monkeypatch.setattr("fastkd.bench.timing.BOUT", 0)
    monkeypatch.setattr("fastkd.bench.steps.measure.QUICK", 0)
    monkeypatch.setattr("fastkd.bench.losses.measure.copy_rate", lambda *_, **__: 1e9)
    path, found = tmp_path / "a-gate.json", record()
    case = Case("KD 6 x 5", partial(logits, 2, 6, 5), kd, kd, 1)
    pair = Workload("kd", "resnet14", "resnet8", (), 4, 16, 10)
    ways = ("fastkd eager", "official eager")
    jobs = [
        Job("tests", "kernels", lambda keep: GREEN),
        Job("losses", "logits", lambda keep: measure_losses([case], CPU, True, print, keep)),
        Job("steps", pair.name, lambda keep: measure_step(pair, CPU, True, False, print, only=ways)),
        Job("accuracy", "fashion", partial(run_accuracy, tmp_path, path, NEVER)),
    ]
    assert work_off(jobs, found, path, NEVER) == 0
    kept = json.loads(path.read_text())
    assert kept == json.loads(json.dumps(found)) and [len(run["cases"]) for run in kept["losses"].values()] == [1]
    assert {way["status"] for way in kept["steps"][pair.name]["contenders"].values()} == {"right"}
    assert kept["steps"][pair.name]["contenders"].keys() == set(ways) and kept["steps"][pair.name]["commit"] == "abc"
    text = path.with_suffix(".md").read_text()
    assert "| kernels | 1 | 0 | 0 |" in text and "KD 6 x 5" in text and f"| {pair.name} | fastkd" in text
    assert f"not run: no files in {tmp_path}" in text and "Dry run" not in text


def test_slices_resume(tmp_path, job, done):
    path, found = tmp_path / "a-gate.json", record()
    jobs = [job("forms", name) for name in ("one", "two", "three")]
    found["seconds"] = {"forms zero": 100.0}
    assert work_off(jobs, found, path, time.perf_counter() + 30) == 3 and done() == ["one"]
    found = json.loads(path.read_text())
    assert work_off(jobs, found, path, NEVER) == 0 and done() == ["one", "two", "three"]


def test_a_report_that_cannot_be_written_stops_nothing(tmp_path, job, done, monkeypatch):
    monkeypatch.setattr(gpu_gate, "report", lambda record: record["no such key"])
    path = tmp_path / "a-gate.json"
    assert work_off([job("forms", name) for name in ("one", "two")], record(), path, NEVER) == 0
    assert done() == ["one", "two"] and "'no such key'" in path.with_suffix(".md").read_text()


def test_a_job_that_does_not_fit_is_not_begun(tmp_path, job, done):
    found = record()
    found["seconds"] = {"forms zero": 100.0}
    jobs = [job("forms", name) for name in ("zero", "one", "two")]
    assert work_off(jobs, found, tmp_path / "a-gate.json", time.perf_counter() + 50) == 3 and done() == ["one"]


def test_unfinished_work_is_taken_up_again(tmp_path, job, done):
    path, found = tmp_path / "a-gate.json", record()

    def work(keep):
        return {"output": [], "unfinished": True} if len(done()) < 2 else {"runs": {}, "output": ["| a |"]}

    jobs = [job("accuracy", "fashion", work)]
    assert [work_off(jobs, found, path, NEVER) for _ in range(3)] == [3, 0, 0]
    assert len(done()) == 2 and "| a |" in report(found)


def test_a_red_test_does_not_stop_the_timing(tmp_path, job, done):
    red = GREEN | {"failed": {"test_a.py::test_b": "AssertionError: 1 is not 2"}}
    found, jobs = record(), [job("tests", "kernels", lambda keep: red), job("forms", "one")]
    assert work_off(jobs, found, tmp_path / "a-gate.json", NEVER) == 1 and done() == ["kernels", "one"]
    text = report(found)
    assert "| kernels | 1 | 1 | 0 |" in text and "- test_a.py::test_b: AssertionError: 1 is not 2" in text


def raises(keep):
    raise RuntimeError("out of memory\nand a long story")


def dies(keep):
    print("the last words", flush=True)
    os.abort()


@pytest.mark.parametrize("work, said", [(raises, "out of memory"), (dies, "status -6; its last line: the last words")])
def test_what_breaks_is_kept_and_the_others_go_on(tmp_path, job, done, work, said):
    found, jobs = record(), [job("forms", "broken", work), job("forms", "fine")]
    assert work_off(jobs, found, tmp_path / "a-gate.json", NEVER) == 1 and done() == ["broken", "fine"]
    assert found["forms"]["broken"]["error"].endswith(said) and "\n" not in found["forms"]["broken"]["error"]
    assert f"broken failed: {found['forms']['broken']['error']}" in report(found)


def hangs(file, keep):
    """Keeps something, starts a process, and then both wait."""
    keep({"cases": []})
    file.write_text(str(subprocess.Popen(["sleep", "60"]).pid))
    time.sleep(60)


def running(file):
    """Whether the process with the number in `file` lives."""
    stat = Path(f"/proc/{file.read_text()}/stat")
    return stat.exists() and stat.read_text().split()[2] != "Z"


def ended(file, seconds=10):
    end = time.monotonic() + seconds
    while running(file) and time.monotonic() < end:
        time.sleep(0.05)
    return not running(file)


def test_what_hangs_is_killed_with_all_it_has_started(tmp_path, job, done, monkeypatch):
    monkeypatch.setitem(gpu_gate.LIMITS, "losses", 3.0)
    found, jobs = record(), [job("losses", "hung", partial(hangs, tmp_path / "pid")), job("forms", "fine")]
    assert work_off(jobs, found, tmp_path / "a-gate.json", NEVER) == 1 and done() == ["hung", "fine"]
    assert found["losses"]["hung"]["error"] == "timed out after 3 s; its last line: none"
    assert found["losses"]["hung"]["cases"] == [] and ended(tmp_path / "pid")


def test_a_job_cut_by_the_end_of_the_slice_is_run_again_but_not_for_ever(tmp_path, job, done, monkeypatch):
    monkeypatch.setattr(gpu_gate, "GUESS", 0.0)
    path, found = tmp_path / "a-gate.json", record()
    jobs = [job("forms", "fine"), job("losses", "hung", partial(hangs, tmp_path / "pid")), job("forms", "last")]
    assert work_off(jobs, found, path, time.perf_counter() + 4) == 3 and done() == ["fine", "hung"]
    assert work_off(jobs, found, path, time.perf_counter() + 4) == 3 and done() == ["fine", "hung", "hung"]
    assert work_off(jobs, found, path, NEVER) == 1 and done()[3:] == ["last"]


def test_a_job_does_not_outlive_a_killed_gate(tmp_path):
    code = (
        "import os, pathlib, sys, time\nfrom fastkd.bench.scripts.isolated import run_isolated\n"
        "def work(keep):\n"
        "    pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "run_isolated(work, 60, print)"
    )
    file = tmp_path / "pid"
    gate = subprocess.Popen([sys.executable, "-c", code, str(file)], cwd=ROOT)
    while not (file.is_file() and file.read_text()):
        assert gate.poll() is None
        time.sleep(0.05)
    assert running(file)
    gate.kill()
    gate.wait()
    assert ended(file)


def test_a_file_is_of_one_commit(tmp_path):
    old = tmp_path / "2020-01-01-gate.json"
    old.write_text(json.dumps({"commit": "old", "quick": True, "dry_run": False}))
    new = place(tmp_path, True, "new")
    assert new != old and not new.exists() and new.name.endswith("-gate.json")
    assert place(tmp_path, True, "old") == old and place(tmp_path, False, "old") != old
    old.write_text(json.dumps({"commit": "old", "quick": True, "seconds": {}}))  # of an earlier gate
    assert place(tmp_path, True, "old") != old


def test_the_commit_is_that_of_the_file_or_the_given_one(tmp_path, monkeypatch):
    monkeypatch.setattr("fastkd.bench.commit", lambda: None)  # as without git
    path = tmp_path / "gate.json"
    assert opened(ABOUT, path, None)[1]["commit"] is None and opened(ABOUT, path, "abc")[1]["commit"] == "abc"
    bench.write_json(path, record())
    assert opened(ABOUT, path, None)[1]["commit"] == opened(ABOUT, path, "abc")[1]["commit"] == "abc"
    for about, commit, word in [(ABOUT, "def", "commit 'abc'"), (ABOUT | {"gpu": "H100"}, None, "gpu 'CPU'"),
                                (ABOUT | {"quick": False}, None, "quick True")]:  # fmt: skip
        with pytest.raises(UserError, match=f"{word}.*another --file"):
            opened(about, path, commit)
    path.write_text("{}")
    with pytest.raises(UserError, match="no file of this gate"):
        opened(ABOUT, path, None)


def test_a_tree_without_git_has_no_commit_also_inside_another_repository(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(tmp_path), *who, "commit", "-q", "--allow-empty", "-m", "a"], check=True)
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    assert len(bench.commit()) == 40
    (tmp_path / "inner").mkdir()
    monkeypatch.setattr(bench, "ROOT", tmp_path / "inner")
    assert bench.commit() is None


def test_what_cannot_be_run_is_said(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="TRITON_INTERPRET"):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        check_device(False, None)
    monkeypatch.delenv("TRITON_INTERPRET")
    for file in (None, ROOT / "bench" / "results" / "h100" / "gate.json"):
        with pytest.raises(UserError, match="outside of bench/results"):
            check_device(True, file)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device here"):
            check_device(False, None)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "H100")
    with pytest.raises(UserError, match="null_device/run"):
        check_device(True, tmp_path / "gate.json")
    assert check_device(False, None)["gpu"] == "H100"
    monkeypatch.setenv("NULL_DEVICE", "libnull.so")
    with pytest.raises(UserError, match="give --dry-run"):
        check_device(False, None)


def test_jobs_are_in_order_of_worth(tmp_path):
    jobs = all_jobs(False, None, tmp_path / "gate.json", NEVER)
    names = [job.key.replace("timm/", "") for job in jobs]
    assert names[:7] == [
        "tests poisoned memory",
        "tests kernels",
        "tests steps",
        *(f"steps kd {pair} {dtype}" for pair in ("resnet50 -> resnet18", "resnet56 -> resnet20")
          for dtype in ("bfloat16", "float16")),
    ]  # fmt: skip
    assert names[7:11] == [
        "steps kd resnet152 -> resnet50 bfloat16",
        "forms resnet50 256 x 224 px",
        "losses logits",
        "losses maps",
    ]
    assert [name.split()[1] for name in names[11:14]] == ["sokd", "dcm", "iakd"]
    assert len(set(names)) == len(names) and {job.kind for job in jobs} == set(gpu_gate.LIMITS)
    steps = [name for name in names if name.startswith("steps")]
    for pair in (*CIFAR, *IMAGENET):
        assert all(f"steps {pair.name} {dtype}".replace("timm/", "") in steps for dtype in ("bfloat16", "float16"))
    quick = {job.key for job in all_jobs(True, None, tmp_path / "gate.json", NEVER)}
    assert len(quick) < len(names) and not any("max-autotune" in name or "compiled" in name for name in quick)


def test_every_loss_is_in_a_group():
    words = [word for group in gate_jobs.LOSSES.values() for word in group]
    assert {case.name.split()[0] for case in gate_jobs.cases(CPU)} == set(words) and len(words) == len(set(words))


def test_the_pairs_of_the_gate_have_the_sizes_of_their_data():
    cuda = torch.device("cuda")
    sizes = {(p.batch_size, p.image_size, p.classes) for p in (pair.filled(cuda) for pair in CIFAR)}
    large = {(p.batch_size, p.image_size, p.classes) for p in (pair.filled(cuda) for pair in IMAGENET)}
    assert sizes == {(128, 32, 100)} and large == {(256, 224, 1000)}
    assert len({pair.name for pair in (*CIFAR, *IMAGENET)}) == len(CIFAR) + len(IMAGENET) == 12


def way(img_per_s, *notes):
    return {"status": "right", "img_per_s": img_per_s, "notes": list(notes)}


def test_the_best_defaults_are_said():
    graph = way(100.0, "teacher form fused 1 ms", "teacher form: fused")
    wrong = {"status": "wrong", "reason": "", "notes": []}
    first = {"fastkd graph": graph, "fastkd compiled graph": wrong, "fastkd eager": way(50.0), "compile": way(300.0)}
    faster = {"fastkd compiled graph": way(101.0, *graph["notes"])}
    runs = {
        "a bf16": {"pair": "a", "dtype": "bfloat16", "contenders": first},
        "a fp16": {"pair": "a", "dtype": "float16", "contenders": faster},
        "b bf16": {"pair": "b", "dtype": "bfloat16", "contenders": first | {"fastkd compiled graph": way(200.0)}},
        "c bf16": {"error": "out of memory"},
    }  # fmt: skip
    text = defaults(runs)
    assert "bfloat16, teacher form auto, graph on, compile on" in text and "in 1 of 2 pairs" in text
    assert "| a | fastkd compiled graph | float16 | auto (fused) | on | on | 101 | - |" in text
    assert "| b | fastkd compiled graph | bfloat16 | auto | on | on | 200 | 1.00 |" in text


@pytest.mark.parametrize(
    "kind, run",
    [
        ("tests", GREEN | {"failed": {"a": "b"}}),
        ("tests", GREEN | {"error": "no test was selected"}),
        ("losses", {"cases": [{"contenders": {"fastkd": {"status": "wrong"}}}]}),
        ("steps", {"contenders": {"fastkd graph": {"status": "unavailable"}}}),
    ],
)
def test_what_is_red(kind, run):
    found = record()
    assert all_right(found)
    found[kind]["name"] = run
    assert not all_right(found)


TESTS = """
import pytest
def test_passes(): pass
def test_wrong(): assert 1 == 2
def test_skipped(): pytest.skip("not here")
def test_crashes(): raise RuntimeError("illegal memory access")
"""


def results(tmp_path, limit=60.0, **more):
    """Of the tests, run as a group of the gate."""
    (tmp_path / "test_group.py").write_text(TESTS + more.pop("tests", ""))
    words = [f"--rootdir={tmp_path}", f"-c{ROOT / 'pyproject.toml'}", str(tmp_path)]
    return run_isolated(partial(run_tests, words, **more), limit, print)


def test_tests_are_counted_and_failures_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gate_jobs.importlib.util, "find_spec", lambda name: None)  # without xdist
    found = results(tmp_path)
    assert (found["passed"], found["skipped"], found["wrong values"]) == (1, 1, 0) and "error" not in found
    failed = {name.split("::")[1]: said for name, said in found["failed"].items()}
    assert failed.keys() == {"test_wrong", "test_crashes"} and "illegal memory access" in failed["test_crashes"]
    (tmp_path / "test_broken.py").write_text("import no_such_module")
    found = results(tmp_path)
    assert found["passed"] == 1 and any("cannot be collected" in said for said in found["failed"].values())


def test_tests_are_counted_over_processes(tmp_path, monkeypatch):
    pytest.importorskip("xdist")
    monkeypatch.setattr(gate_jobs, "PROCESSES", 2)
    found = results(tmp_path)
    assert "-n2" in found["command"] and (found["passed"], found["skipped"], len(found["failed"])) == (1, 1, 2)


def test_a_dry_run_counts_crashes_and_not_values(tmp_path, monkeypatch):
    monkeypatch.setattr(gate_jobs, "DRY_TESTS", 4)
    found = results(tmp_path, dry=True)
    assert found["wrong values"] == 1 and [name.split("::")[1] for name in found["failed"]] == ["test_crashes"]
    monkeypatch.setattr(gate_jobs, "DRY_TESTS", 2)
    found = results(tmp_path, dry=True)
    assert (found["passed"], found["wrong values"], found["failed"]) == (1, 1, {})


def test_a_hung_group_keeps_what_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(gate_jobs.importlib.util, "find_spec", lambda name: None)
    found = results(tmp_path, 20.0, tests="def test_hangs():\n    import time\n    time.sleep(60)\n")
    assert found["passed"] == 1 and len(found["failed"]) == 2 and found["error"].startswith("timed out after 20 s")
    assert [name.split("::")[1] for name in found["running"]] == ["test_hangs"]
    assert "still running when the time was up" in report(record() | {"tests": {"a": found}})


def test_a_group_without_tests_is_red(tmp_path, monkeypatch):
    monkeypatch.setattr(gate_jobs.importlib.util, "find_spec", lambda name: None)
    assert run_isolated(partial(run_tests, [str(tmp_path)]), 60, print)["error"] == "no test was selected"


def test_it_imports_without_what_a_machine_for_measuring_lacks():
    hidden = [
        "nvidia.dali",
        "liger_kernel",
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
        "from fastkd.bench import show_table; show_table(['a', 'b'], [['long', '1']], 1); "
        "from fastkd.bench.scripts.gate_jobs import run_accuracy; print(run_accuracy(gate.ROOT, gate.ROOT, 0.0, print))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[:2] == ["a     b", "long  1"]


def test_its_tests_are_found_without_what_a_machine_for_measuring_lacks(tmp_path):
    """Tests that need more are skipped; none is an error."""
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
    command = [sys.executable, str(tmp_path / "collect.py"), "-m", "gpu or every", "tests"]
    settings = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    run = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    assert "test_gpu.py::test_graphs_learn" in run.stdout and "test_logit_loss.py::" in run.stdout
