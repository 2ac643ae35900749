"""Imports run one way (see CONTRIBUTING.md), and a plain `import fastkd` needs no extra."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What a method and the engine know of one another.
PROTOCOL = {f"methods.{name}" for name in ("base", "context", "embedding", "forwards", "frozen", "hooks")}

# Folder or file -> the parts of fastkd it may import (besides its own folder).
ALLOWED = {
    "kernels": set(),
    "fastkd/errors.py": set(),
    "fastkd/paths.py": set(),
    "fastkd/signals.py": set(),
    "fastkd/foreign.py": set(),
    "fastkd/torch_files.py": {"files", "foreign"},
    "fastkd/models": {"errors", "foreign", "paths", "torch_files"},
    "fastkd/data": {"kernels", "errors", "foreign", "option_kinds", "signals"},
    "fastkd/losses": {"kernels"},
    # data.base: as a type
    "fastkd/methods": {
        *("kernels", "losses", "models", "data.base", "weights_file", "distributed", "errors", "option_kinds"),
    },
    "fastkd/option_kinds.py": {"errors"},
    "fastkd/rendezvous.py": {"errors"},
    "fastkd/slurm.py": {"errors"},
    "fastkd/distributed.py": {"rendezvous", "errors", "signals", "slurm"},
    "fastkd/engine": {
        *PROTOCOL,
        "curves",
        "data.augment",
        "kernels",
        "models",
        "distributed",
        "errors",
        "option_kinds",
    },
    "fastkd/files.py": {"errors"},
    "fastkd/weights_file.py": {"run.checkpoint", "errors", "files", "foreign", "paths", "torch_files"},
    "fastkd/teacher_cache": {*PROTOCOL, "data.base", "kernels", "files", "foreign", "distributed", "errors"},
    "fastkd/evaluate.py": {"engine", "distributed", "errors"},
    "fastkd/trained.py": {"data.preprocess", "models", "errors", "weights_file"},
    "fastkd/export": {
        *("data.options", "methods", "models", "errors", "files", "foreign", "parser", "trained", "weights_file"),
    },
    "fastkd/html_report": {"curves", "engine", "evaluate", "distributed", "errors", "files"},
    "fastkd/curves.py": set(),
    "fastkd/callbacks.py": {"distributed", "errors", "signals"},
    "fastkd/loggers.py": {"callbacks", "errors", "files"},
    "fastkd/report.py": {
        *("callbacks", "curves", "evaluate", "html_report", "loggers", "methods.frozen"),
        *("engine", "models.own_input", "distributed", "environment", "errors", "files", "run", "weights_file"),
    },
    "fastkd/progress.py": {"callbacks", "curves", "data.wait", "engine", "distributed", "report"},
    "fastkd/train.py": {
        *PROTOCOL,
        *(
            "callbacks",
            "engine",
            "data.adapter",
            "data.base",
            "data.train_size",
            "progress",
            "teacher_cache",
            "run",
            "distributed",
            "evaluate",
        ),
        *("report", "weights_file", "errors", "signals"),
    },
    "fastkd/run": {
        *("data.base", "methods.base", "methods.context", "methods.frozen", "engine", "kernels", "distributed"),
        *("environment", "errors", "files", "foreign", "models.sizes", "signals", "torch_files", "weights_file"),
    },
    "fastkd/option_names.py": {"errors"},
    "fastkd/parser.py": {"errors", "option_names"},
    "fastkd/network_options.py": {"errors", "models"},
    "fastkd/recipes": {"errors", "methods"},
    "fastkd/config.py": {"data", "engine", "errors", "foreign", "methods", "network_options", "parser", "recipes"},
}


def modules(path: Path):
    """The absolute name of every module that the file imports."""
    package = ["fastkd", *path.relative_to(ROOT / "fastkd").parts[:-1]] if path.is_relative_to(ROOT / "fastkd") else []
    if path.is_relative_to(ROOT / "kernels"):
        package = ["fastkd", "kernels", *path.relative_to(ROOT / "kernels").parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names) if base == "fastkd" else [base]


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_run_one_way(part):
    path = ROOT / part
    own = "fastkd.kernels" if part == "kernels" else part.removesuffix(".py").replace("/", ".")
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    assert files
    for file in files:
        for module in modules(file):
            if module.startswith("fastkd.") and not module.startswith(own):
                name = module.removeprefix("fastkd.")
                assert any(name == ok or name.startswith(ok + ".") for ok in ALLOWED[part]), f"{file.name}: {module}"


def test_methods_do_not_import_each_other():
    for file in sorted((ROOT / "fastkd/methods").glob("*.py")):
        if file.stem != "__init__":
            inner = {module.removeprefix("fastkd.") for module in modules(file) if module.startswith("fastkd.methods")}
            assert {name for name in inner if not name.startswith("methods.parts.")} <= PROTOCOL, file


def test_kernels_import_torch_and_triton_alone():
    for file in sorted((ROOT / "kernels").rglob("*.py")):
        tops = {module.split(".")[0] for module in modules(file)} - set(sys.stdlib_module_names)
        assert tops <= {"torch", "triton", "fastkd"}, file  # fastkd: its own, which the rule above checks


def test_the_rule_is_noticed_when_broken(tmp_path, monkeypatch):
    broken = tmp_path / "fastkd/losses/logits.py"
    broken.parent.mkdir(parents=True)
    broken.write_text("from ..engine import Step\nfrom .. import train\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    with pytest.raises(AssertionError, match="engine"):
        test_imports_run_one_way("fastkd/losses")


def test_the_command_line_comes_before_torch():
    code = "import sys, fastkd, fastkd.cli; assert 'torch' not in sys.modules; print(fastkd.losses.KDLoss())"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_losses_need_no_triton():
    """As on macOS and Windows: Triton is imported at the first launch of a kernel."""
    logits = "torch.ones(2, 3, requires_grad=True), torch.ones(2, 3), torch.arange(2)"
    code = "import sys; sys.modules['triton'] = None; import torch, fastkd.losses; "
    subprocess.run([sys.executable, "-c", code + f"fastkd.losses.KDLoss()({logits}).backward()"], check=True)


def test_importing_fastkd_needs_no_extra():
    """With the extras and the command line's libraries out of reach."""
    hidden = [
        "nvidia.dali",
        "tensorboard",
        "wandb",
        "mlflow",
        "IPython",
        "apex",
        "tyro",
        "matplotlib",
        "timm",
        "sklearn",
        "pytest",
    ]
    code = f"import sys; sys.modules.update(dict.fromkeys({hidden}, None)); import fastkd, fastkd.losses, fastkd.train"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("code", ["import fastkd.kernels, kernels", "import kernels, fastkd.kernels"])
def test_the_folder_kernels_is_empty_under_its_own_name(code):
    """Registered twice, an operator is freed under its first owner, whose next call reads freed memory."""
    check = "assert not hasattr(kernels, 'kd_loss') and fastkd.kernels.kd_loss"
    run = python(f"{code}; {check}; import kernels.logit_loss")
    assert run.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'kernels.logit_loss'"


def test_transformers_and_fastkd_are_imported_in_a_clone():
    """transformers imports any package that is called kernels, so it finds our folder."""
    pytest.importorskip("transformers")
    run = python("import transformers.utils as utils, fastkd.kernels; print(utils.is_kernels_available())")
    assert run.stdout == "False\n", run.stderr


@pytest.mark.parametrize(
    "again", ["importlib.reload(k)", "[sys.modules.pop(n) for n in set(sys.modules) if 'fastkd' in n]"]
)
def test_the_kernels_can_be_imported_again(again):
    code = f"import importlib, sys, torch, fastkd.kernels as k; {again}; import fastkd.kernels as k"
    run = python(code + "; assert k.kd_loss(*torch.eye(2, 4)[None].expand(2, 2, 4), torch.arange(2)).loss > 0")
    assert run.returncode == 0, run.stderr


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
