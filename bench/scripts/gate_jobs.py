"""The jobs of the GPU gate, in order of worth: a rented GPU may be gone before the last one."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fastkd.bench import ROOT, Record, log_rank0, timing
from fastkd.bench.fashion import FOLDER
from fastkd.bench.losses import measure as losses_measure
from fastkd.bench.losses.cases import cases
from fastkd.bench.scripts.isolated import Keep, Work, die_with_parent
from fastkd.bench.steps import measure as steps_measure
from fastkd.bench.steps import workload
from fastkd.bench.steps.baselines import BOUNDS, SETTINGS
from fastkd.bench.steps.workload import CIFAR, IMAGENET, Workload
from fastkd.engine import teacher_forms
from fastkd.engine.precision import Precision

GPU = torch.device("cuda")
TESTS = {
    "poisoned memory": ["-m", "gpu", "-k", "poison", "tests/engine"],
    "kernels": ["-m", "gpu", "-k", "not compile", "tests/kernels"],
    "steps": ["-m", "gpu", "-k", "not compile and not poison", "tests", "--ignore=tests/kernels"],
    "compile": ["-m", "gpu", "-k", "compile", "tests"],
    "every option": ["-m", "every", "tests"],
}
LOSSES = {"logits": ("KD", "DCM", "DKD", "DIST"), "maps": ("IE-KD", "AT", "hint", "overhaul", "augment")}
"""The losses that share a process, by the first word of their names."""
BASELINES = ("official eager", "eager channels-last", "compile", "compile reduce-overhead", "timm task")
FULL = (*SETTINGS, *BASELINES, *BOUNDS)  # what is measured in bf16; in fp16 only whether it is faster:
BRIEF = (*list(SETTINGS)[:4], "eager channels-last", "compile reduce-overhead", "timm task")
AUTOTUNE = ("fastkd eager", "fastkd compiled graph", "compile reduce-overhead", "compile max-autotune")
DRY = ("fastkd eager", "fastkd graph", "fastkd graph, fused teacher", "official eager")
DRY_TESTS = 2  # of each group
PROCESSES = 8  # of pytest, where xdist is installed
SEEDS = 3


class Job(NamedTuple):
    kind: str  # "tests", "steps", "forms", "losses" or "accuracy"
    name: str
    work: Work

    @property
    def key(self) -> str:
        return f"{self.kind} {self.name}"


def all_jobs(quick: bool, fashion: Path | None, path: Path, end: float) -> list[Job]:
    """Every job. `path` is the gate's file, `end` the end of the slice by time.perf_counter()."""
    tests = {name: Job("tests", name, partial(run_tests, words)) for name, words in TESTS.items()}
    step = partial(step_job, quick=quick)
    (kd56, iekd, *cifar), (kd50, kd152, *imagenet) = CIFAR, IMAGENET
    jobs = [tests["poisoned memory"], tests["kernels"], tests["steps"]]
    jobs += [step(pair, *how) for pair in (kd50, kd56) for how in (("bfloat16", FULL), ("float16", BRIEF))]
    jobs += [step(kd152, "bfloat16", FULL), forms_job("timm/resnet50", 256, 224, 1000)]
    jobs += [losses_job(name, brief=True) for name in LOSSES]
    jobs += [step(pair, "bfloat16", FULL) for pair in cifar]
    jobs += [tests["compile"]]
    jobs += [step(pair, "bfloat16", FULL) for pair in (iekd, *imagenet)]
    jobs += [step(pair, "float16", BRIEF) for pair in (kd152, *cifar, iekd, *imagenet)]
    if not quick:
        jobs += [losses_job(name, brief=False) for name in LOSSES]
        jobs += [step(kd50, "bfloat16", AUTOTUNE, " max-autotune")]
    return [*jobs, tests["every option"], Job("accuracy", "fashion", partial(run_accuracy, fashion, path, end))]


def dry_jobs() -> list[Job]:
    """Each kind of job once, small. Nothing is compiled by torch: that takes minutes on two cores."""
    groups = {name: TESTS[name] for name in ("poisoned memory", "kernels")}
    groups["steps"] = ["-m", "gpu", "-k", "not compile and not poison", "tests/engine"]  # DALI cannot start there
    jobs = [Job("tests", name, partial(run_tests, words, dry=True)) for name, words in groups.items()]
    jobs += [step_job(CIFAR[0], "bfloat16", DRY, quick=True), step_job(CIFAR[0], "float16", DRY[:2], quick=True)]
    jobs += [forms_job("resnet20", 8, 32, 10), losses_job("logits", brief=True, most=1)]
    return [job._replace(work=partial(dry, job.work)) for job in jobs]


def step_job(pair: Workload, dtype: str, only: tuple[str, ...], more: str = "", *, quick: bool) -> Job:
    def work(keep: Keep) -> Record:
        compiled = any("compile" in way for way in only) and not quick
        return steps_measure.measure_step(pair, GPU, quick, compiled, log_rank0, dtype, only)

    return Job("steps", f"{pair.name} {dtype}{more}", work)


def forms_job(name: str, batch_size: int, image_size: int, classes: int) -> Job:
    """Each form of a teacher, in both dtypes."""
    pair = Workload("kd", name, name, (), batch_size, image_size, classes)

    def work(keep: Keep) -> Record:
        found: Record = {}
        for dtype in ("bfloat16", "float16"):
            teacher = pair.build(GPU).teacher
            assert teacher is not None
            log_rank0(f"{name}: {dtype}")
            images, precision = pair.batch(GPU, dtype)[0], Precision(dtype, GPU)
            results = teacher_forms.try_forms(teacher, images, "auto", precision, wants_features=False)
            names = ("name", "reason", "milliseconds", "error", "agreement")
            found[dtype] = [{key: getattr(form, key) for key in names} for form in results]
            keep({"forms": found})
        return {"forms": found}

    return Job("forms", f"{name} {batch_size} x {image_size} px", work)


def losses_job(name: str, brief: bool, most: int | None = None) -> Job:
    """The losses of a group; `brief`: few rounds, without torch.compile. At most `most` of them."""

    def work(keep: Keep) -> Record:
        chosen = [case for case in cases(GPU) if case.name.split()[0] in LOSSES[name]][:most]
        return losses_measure.measure_losses(chosen, GPU, brief, log_rank0, keep)

    return Job("losses", name if brief else f"{name}, compiled", work)


class Results:
    """A plugin of pytest that keeps what each test gave. `dry`: few tests, and a wrong value is not a failure."""

    def __init__(self, keep: Keep, command: list[str], dry: bool):
        self.keep, self.dry, self.running = keep, dry, dict[str, None]()
        self.found: Record = {"command": " ".join(command), "passed": 0, "skipped": 0, "wrong values": 0, "failed": {}}

    @pytest.hookimpl(trylast=True)  # after the deselection by marks and names
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        if self.dry:
            del items[DRY_TESTS:]

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.found["failed"][report.nodeid] = f"cannot be collected: {str(report.longrepr).splitlines()[-1][:200]}"

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running[nodeid] = None
        self.save()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = (crash.message if crash else str(report.longrepr)).splitlines()[0][:200]
            if self.dry and said.startswith(("AssertionError", "assert ", "Failed: ")):
                self.found["wrong values"] += 1
            else:
                self.found["failed"][report.nodeid] = said
        elif report.skipped:
            self.found["skipped"] += 1
        elif report.when == "call":
            self.found["passed"] += 1

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.running.pop(nodeid, None)
        self.save()

    def save(self) -> None:
        self.keep(self.found | {"running": list(self.running)})


def run_tests(words: list[str], keep: Keep, dry: bool = False) -> Record:
    """How many tests passed, and which failed and why. "running": the tests that had begun when time was up."""
    os.chdir(ROOT)
    words = [*words, "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", *["--assert=plain"] * dry]
    if importlib.util.find_spec("xdist"):
        words += ["-n0"] if dry else [f"-n{PROCESSES}", "--dist=loadgroup"]
    results = Results(keep, words, dry)
    status = int(pytest.main(words, plugins=[results]))
    if status == pytest.ExitCode.NO_TESTS_COLLECTED:
        return results.found | {"error": "no test was selected"}
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return results.found | {"error": f"pytest ended with status {status}"}
    return results.found


def run_accuracy(folder: Path | None, path: Path, end: float, keep: Keep) -> Record:
    """accuracy.py, whose file lies beside the gate's. It resumes by itself."""
    missing = [name for name in ("tyro", "rich", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing or not any((folder or FOLDER).glob("train-images-idx3-ubyte*")):
        reason = f"{', '.join(missing)} missing" if missing else f"no files in {folder or FOLDER}"
        return {"skipped": f"not run: {reason}"}
    own, left = path.with_name(path.stem + "-accuracy-fashion.json"), (end - time.perf_counter()) / 60
    words = ["bench/scripts/accuracy.py", "--data", "fashion", "--seeds", SEEDS, "--folder", folder or FOLDER]
    words += ["--file", own, *(["--minutes", max(left - 1, 0.1)] if left < float("inf") else [])]
    lines = run_script(words)
    table = [line for line in lines if line.startswith("|")]
    unfinished = any("are over" in line for line in lines)
    return {"runs": json.loads(own.read_text()), "output": table} | ({"unfinished": True} if unfinished else {})


def run_script(words: list[object]) -> list[str]:
    """The lines that a script of this folder prints. Raises RuntimeError if it fails."""
    command = [sys.executable, *map(str, words)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=die_with_parent)
    lines = (run.stdout + run.stderr).strip().splitlines()
    if run.returncode:
        raise RuntimeError(lines[-1] if lines else f"{words[0]} ended with {run.returncode}")
    return lines


class Anything:
    """A limit that no value exceeds, not even NaN."""

    def __ge__(self, value: object) -> bool:
        return True


def dry(work: Work, keep: Keep) -> Record:
    """A job on the device that computes nothing: few rounds, no compiler, and what is read back is not judged.

    This changes modules for good; a job has a process of its own.
    """
    changes: list[tuple[Any, str, object]] = [
        (timing, "BOUT", 0.0),
        (steps_measure, "QUICK", 0.0),
        (steps_measure, "WARM_UP", 2),
        (steps_measure, "AT_ONCE", {"cuda": 1}),
        (steps_measure, "compare", lambda *_: None),
        (losses_measure, "difference", lambda *_: ""),
        (workload, "update_bn", lambda *_: None),  # it reads a counter back
        (teacher_forms, "FORMS", ("plain", "folded", "fused")),
        (teacher_forms, "LARGEST_ERROR", defaultdict(Anything)),
    ]
    for owner, name, value in changes:
        assert hasattr(owner, name), f"{owner.__name__}.{name} is gone; the dry run must change something else"
        setattr(owner, name, value)
    sys.path.insert(0, str(ROOT / "tests"))
    importlib.import_module("null_device.values").install()  # what is read back is the same in every run
    return work(keep)
