"""The commands as a person types them. Bad input: one line that names it, exit status 2, nothing written."""

import ast
import inspect
import io
import pickle
import re
import resource
import shutil
import subprocess
import sys
import textwrap
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from refused import check_refused

from fastkd import create_model
from fastkd.commands.bench import DataBenchOptions, LossOptions, StepOptions
from fastkd.commands.doctor import DoctorOptions
from fastkd.commands.eval import EvalOptions
from fastkd.commands.export import ExportOptions
from fastkd.commands.predict import PredictOptions
from fastkd.config import RunOptions, config_type
from fastkd.data import DataOptions
from fastkd.methods import METHODS

QUICK = ["--epochs", "1", "--warmup-epochs", "0", "--teacher-epochs", "1", "-b", "256"]
FROZEN = ["--epochs", "1", "--warmup-epochs", "0", "--teacher-epochs", "0", "-b", "256"]
ALONE = ["--epochs", "1", "--warmup-epochs", "0", "-b", "256", "--no-baseline", "--method", "ce"]


@pytest.fixture
def images(tmp_path):
    """Two classes of JPEGs, six each in train and three in val: several sizes, RGB, gray and CMYK."""
    for split, count in (("train", 6), ("val", 3)):
        for label, colour in (("cat", (200, 30, 30)), ("dog", (30, 30, 200))):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for number, mode in zip(range(count), ["RGB", "L", "CMYK"] * 2, strict=False):
                Image.new("RGB", (40 + 9 * number, 50), colour).convert(mode).save(folder / f"{number}.jpg")
    return tmp_path / "images"


def test_the_whole_job_and_its_table(fastkd, tmp_path):
    status, out, _ = fastkd("train", *QUICK)
    assert status == 0
    for words in ("teacher", "student alone", "student, kd", "top-1 %", "parameters", "78,042"):
        assert words in out
    run = tmp_path / "runs/digits-kd-resnet8"
    for folder in (run, run / "teacher", run / "alone"):
        assert (folder / "student.safetensors").exists() and (folder / "curves.png").exists()
    again = fastkd("train", *QUICK, "--no-baseline")[1]  # a second run: a folder of its own, the same teacher
    assert "trained before" in again and not (tmp_path / "runs/digits-kd-resnet8-2/teacher").exists()
    status, out, _ = fastkd("eval", "--weights", run / "student.safetensors")
    assert status == 0 and "resnet8" in out and "355" in out


def test_resume_takes_the_runs_own_options(fastkd, tmp_path):
    assert fastkd("train", *QUICK, "--no-baseline", "--temperature", "3", "--out", "run")[0] == 0
    status, out, _ = fastkd("train", "--out", "run", "--resume")
    assert status == 0 and "resuming run after epoch 1 of 1" in out
    assert "the run had all of its 1 epoch; --resume --extend --epochs N goes on for more" in out
    check_refused(fastkd("train", "--out", "run", "--resume", "--method", "dkd"), "got dkd; drop --method")
    check_refused(fastkd("train", "--out", "run", "--resume", "--lr", "0.3"), "lr was 0.05, now 0.3")
    check_refused(fastkd("train", *QUICK, "--out", "run"), "--out run is not empty", "--resume")


def test_resume_with_nothing_to_resume_is_an_error(fastkd, tmp_path):
    check_refused(fastkd("train", *QUICK, "--resume"), "--resume needs --out")
    check_refused(fastkd("train", "--out", "e9", "--resume"), "no run in e9", "check the path", "drop --resume")
    Path("mine.yaml").write_text("out: e9\nrecipe: digits\n")
    check_refused(fastkd("train", "--config", "mine.yaml", "--resume"), "no run in e9")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_resume_before_the_first_checkpoint_starts_from_the_beginning(fastkd):
    options = ALONE
    Path("run").mkdir()
    Path("run/config.yaml").write_text(fastkd("train", *options, "--out", "run", "--print-config")[1])
    status, out, _ = fastkd("train", "--out", "run", "--resume")
    assert status == 0 and "--resume: the training of the student has not begun in run" in out


def test_a_folder_of_something_else_is_not_offered_for_resuming(fastkd):
    Path("img").mkdir()
    Path("img/cat.jpg").write_text("x")
    result = fastkd("train", *QUICK, "--out", "img")
    check_refused(result, "--out img is not empty and holds no run; choose another folder")
    assert "--resume" not in result[2]


def test_an_interrupt_says_how_to_go_on(fastkd, monkeypatch):
    def interrupted(*job):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastkd.commands.train.Trainings._fit", interrupted)
    options = ALONE
    status, _, err = fastkd("train", *options, "--out", "my run")
    assert (status, err) == (75, "fastkd: stopped by SIGINT; go on with `fastkd train --out 'my run' --resume`\n")
    assert "--out runs/digits-ce-resnet8 --resume" in fastkd("train", *options)[2]
    monkeypatch.setattr("fastkd.commands.job.Job.claim", interrupted)
    status, _, err = fastkd("train", *options)
    assert status == 75 and "stopped by SIGINT before the training began; go on with `fastkd train" in err


def test_a_short_run_needs_one_option(fastkd):
    """The warm-up of the recipe shrinks with the epochs, said aloud; one that was typed does not."""
    status, out, _ = fastkd("train", "--epochs", "1", "--print-config")
    shown = yaml.safe_load(out)
    assert status == 0 and "# recipe digits, made for 12 epochs, over 1: warmup_epochs 1 -> 0.0833" in out
    assert shown["epochs"] == 1 and shown["warmup_epochs"] == pytest.approx(1 / 12)
    assert "made for" not in fastkd("train", "--epochs", "12", "--print-config")[1]
    check_refused(fastkd("train", "--epochs", "1", "--warmup-epochs", "1"), "--warmup-epochs", "--epochs 1", "got 1.0")
    assert "made for 12 epochs, over 1" in fastkd("train", "--epochs", "1", "--method", "ce", "--student", "resnet8")[1]


def test_teacher_and_average_are_the_same_fresh_and_resumed(fastkd):
    """With EMA the teacher is its saved average, whether it was trained just now or earlier."""
    options = [*QUICK, "--ema-decay", "0.5", "--teacher", "resnet8", "--teacher-epochs", "3", "--out", "run"]
    first = fastkd("train", *options)[1]
    again = fastkd("train", *options, "--resume")[1]
    line = next(line for line in first.splitlines() if line.startswith("teacher resnet8: top-1"))
    assert "training it first" in first and "trained before" in again and line in again


def test_warmup_longer_than_the_teachers_training(fastkd):
    options = ["--epochs", "3", "--warmup-epochs", "2", "--teacher-epochs", "1", "-b", "256", "--no-baseline"]
    assert fastkd("train", *options, "--teacher", "resnet8")[0] == 0


def test_a_teacher_of_other_data_is_not_reused(fastkd, images):
    options = ["--data", images, "--student", "resnet8", "--teacher", "resnet8", "--teacher-epochs", "1"]
    options += ["--epochs", "1", "--image-size", "32", "-b", "4", "--loader", "folder"]
    assert "training it first" in fastkd("train", *options, "--out", "a/one")[1]
    assert "trained before" in fastkd("train", *options, "--out", "a/two")[1]
    for split in ("train", "val"):
        shutil.copytree(images / split / "cat", images / split / "bird")
    status, out, _ = fastkd("train", *options, "--out", "a/three")
    assert status == 0 and "training it first" in out


def test_sources_override_each_other(fastkd, tmp_path):
    Path("mine.yaml").write_text("batch-size: 32\nlr: 0.5\ndecay_milestones: [3, 5]\nchannels_last: false\n")
    status, out, _ = fastkd("train", "--recipe", "digits", "--config", "mine.yaml", "--lr", "0.25", "--print-config")
    shown = yaml.safe_load(out)
    assert status == 0 and (shown["batch_size"], shown["lr"], shown["epochs"]) == (32, 0.25, 12)
    assert shown["decay_milestones"] == [3, 5] and shown["channels_last"] is False
    Path("named.yaml").write_text("recipe: digits\nlr: 0.125\n")
    named = yaml.safe_load(fastkd("train", "--config", "named.yaml", "--print-config")[1])
    assert (named["lr"], named["teacher"]) == (0.125, ["resnet20"])
    Path("again.yaml").write_text(out)
    assert yaml.safe_load(fastkd("train", "--config", "again.yaml", "--print-config")[1]) == shown
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_help_shows_every_option_and_its_default(fastkd):
    status, out, _ = fastkd("train", "--help")
    assert status == 0
    names = (
        "epochs batch-size lr opt sched warmup-epochs weight-decay momentum clip-grad smoothing mixup cutmix ema-decay"
    )
    names += " amp-dtype channels-last workers seed out resume data loader student teacher teacher-weights temperature"
    for name in names.split():
        assert f"--{name}" in out
    assert "also -b." in out and "default: 4.0" in out and "default: none" in out and "default: )" not in out
    assert "method options" in out and "options options" not in out


def test_the_text_of_an_option_fills_its_lines(fastkd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    first, second = (fastkd("train", "--help")[1] for _ in range(2))
    assert first == second and max(map(len, first.splitlines())) == 80
    assert "torchvision/NAME. Peers of the same name get them" in first  # its source has a line break after "of"


HELP = [["doctor", "--help"], ["methods", "-h"]]


@pytest.mark.parametrize("command", [[], ["--help"], ["doctor"], ["methods"], ["--version"], ["eval", "--help"], *HELP])
def test_commands_that_only_tell(fastkd, command):
    status, out, err = fastkd(*command)
    assert status == 0 and out and not err


def explained(kind: type) -> dict[str, str]:
    """By option, the text below it in the source of the dataclass `kind` and its bases."""
    texts = {}
    for base in kind.__mro__[-2::-1]:
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        except OSError:  # made by make_dataclass
            continue
        for option, text in pairwise(body):
            if isinstance(option, ast.AnnAssign) and isinstance(text, ast.Expr):
                texts[option.target.id] = " ".join(text.value.value.split())
    return texts


def shown_by(fastkd, *arguments: str) -> str:
    """The help without the lines of its boxes and without line breaks."""
    status, out, _ = fastkd(*arguments, "--help")
    assert status == 0
    return " ".join(re.sub("[─│╭╮╰╯]", " ", out).split())


@pytest.mark.parametrize("method", METHODS)
def test_help_shows_the_whole_text_of_every_option(fastkd, method):
    kind, shown = config_type(method), shown_by(fastkd, "train", "--method", method)
    assert "method" in explained(RunOptions) and "data" in explained(DataOptions)
    for section in fields(kind):
        for name, text in explained(section.type).items():
            assert text in shown, (name, text)


@pytest.mark.parametrize(
    "command, kind",
    [
        ("eval", EvalOptions),
        ("export", ExportOptions),
        ("predict", PredictOptions),
        ("doctor", DoctorOptions),
        ("bench loss", LossOptions),
        ("bench step", StepOptions),
        ("bench data", DataBenchOptions),
    ],
)
def test_help_of_the_other_commands_is_whole(fastkd, command, kind):
    shown = shown_by(fastkd, *command.split())
    for name, text in explained(kind).items():
        assert f"--{name.replace('_', '-')}" in shown and text in shown, (name, text)


def test_help_shows_markup_as_it_is(fastkd, monkeypatch):
    monkeypatch.setattr("fastkd.commands.methods.ABOUT", "pip install 'fastkd[dali]' [bold]x[/bold] :cat: {0} <class>")
    assert "pip install 'fastkd[dali]' [bold]x[/bold] :cat: {0} <class>" in shown_by(fastkd, "methods")


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        (["train", "--epochs", "0"], "--epochs must be 1 or more, got 0"),
        (["train", "--temperature", "0"], "--temperature must be a number above 0, got 0.0"),
        (["eval"], "--weights is missing; `fastkd eval --help` explains it"),
        (["train", "--teacher-epochs", "-1"], "--teacher-epochs must not be negative, got -1"),
        (["caf\udce9\n"], r"unknown command 'caf\udce9\n'; see `fastkd --help`"),
        (
            ["train", "--config", "caf\udce9\n.yaml"],
            r"--config caf\udce9\n.yaml: there is no such file; check the path, or make one by "
            "`fastkd train --print-config`",
        ),
    ],
)
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_errors_are_the_same_on_every_terminal(fastkd, monkeypatch, arguments, wanted, encoding):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    monkeypatch.setenv("COLUMNS", "40")
    assert fastkd(*arguments)[::2] == (2, f"fastkd: {wanted}\n")


@pytest.mark.parametrize("command", ["train --help", "methods", "doctor", "train --print-config"])
def test_a_plain_terminal_gets_plain_letters(fastkd, monkeypatch, command):
    stream = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(stream, encoding="ascii"))
    monkeypatch.setattr("fastkd.commands.doctor.platform.python_version", lambda: "3.11 caf\xe9")
    assert fastkd(*command.split())[0] == 0
    sys.stdout.flush()
    assert len(stream.getvalue().decode("ascii")) > 500


def test_doctor_names_the_paths(fastkd):
    out = fastkd("doctor")[1]
    for words in ("torch", torch.__version__.split("+")[0], "--amp-dtype auto", "--loader auto", "DALI"):
        assert words in out


def test_doctor_names_the_dali_that_fits_torch(fastkd, monkeypatch):
    monkeypatch.setattr("fastkd.data.dali_package.find_spec", lambda name: None)
    monkeypatch.setattr("fastkd.data.dali_package.installed", dict)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setenv("COLUMNS", "200")
    out = fastkd("doctor")[1]
    assert "pip install 'fastkd[dali-cuda12]'" in out and "folder (torchvision)" in out


def test_doctor_warns_of_a_dali_for_another_cuda(fastkd, monkeypatch):
    monkeypatch.setattr("fastkd.data.dali_package.import_problem", str)
    monkeypatch.setattr("fastkd.data.dali_package.installed", lambda: {"nvidia-dali-cuda130": "2.4.0"})
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setenv("COLUMNS", "300")
    out = fastkd("doctor")[1]
    assert "2.4.0 (nvidia-dali-cuda130)" in out and "warning: torch is built for CUDA 12.8" in out


def test_doctor_survives_a_broken_dali(fastkd, monkeypatch):
    monkeypatch.setattr("fastkd.data.dali_package.import_problem", lambda: "is installed but cannot be imported (x)")
    monkeypatch.setenv("COLUMNS", "300")
    status, out, _ = fastkd("doctor")
    assert status == 0 and "warning: DALI is installed but cannot be imported (x)" in out
    assert "folder (torchvision)" in out


@pytest.mark.parametrize(
    "command", [["train"], ["eval", "--weights", "w.pth", "--model", "resnet20", "--data", "digits"]]
)
def test_the_processes_choose_a_decoder_together(fastkd, monkeypatch, command):
    from fastkd import distributed
    from fastkd.errors import UserError

    def create_loaders(*options, gather, **more):
        raise UserError(f"together: {gather is distributed.gather}")

    name = "create_loaders" if command[0] == "train" else "create_eval_loader"
    module = "job" if command[0] == "train" else command[0]
    monkeypatch.setattr(f"fastkd.commands.{module}.{name}", create_loaders)
    check_refused(fastkd(*command), "together: True")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["trian"], ["'trian'", "'train'"]),
        (["train", "--epoch", "3"], ["'--epoch'", "'--epochs'"]),
        (["train", "--batchsize", "3"], ["'--batchsize'", "'--batch-size'"]),
        (["train", "--temprature", "3"], ["'--temprature'", "'--temperature'"]),
        (["train", "--method", "kdd"], ["'kdd'", "'kd'"]),
        (["train", "--recipe", "digit"], ["'digit'", "'digits'"]),
        (["train", "--student", "resnet21"], ["resnet21", "resnet2"]),
        (["train", "--teacher", "timm/resnet5O"], ["resnet5O", "resnet50"]),
        (["train", "--teacher", "timm/resnet10", "--teacher-epochs", "0"], ["timm has no model 'resnet10'"]),
        (["train", "--teacher", "torchvision/resnet10", "--teacher-epochs", "0"], ["model 'resnet10' (did you mean"]),
        (["train", "--teacher", "resnet10", "--teacher-epochs", "0"], ["unknown model 'resnet10' (did you mean"]),
        (["train", "--teacher", "tim/resnet10", "--teacher-epochs", "0"], ["unknown model library 'tim'"]),
        (["train", "--opt", "adamx"], ["adamx", "--opt", "adamw"]),
        (["--verison"], ["'--verison'", "'--version'"]),
        (["doctor", "--foo"], ["'--foo'", "fastkd doctor --help"]),
        (["methods", "foo"], ["'foo'", "fastkd methods --help"]),
        (["train", "foo"], ["fastkd: unexpected 'foo';"]),
        (["train", "/"], ["fastkd: unexpected '/' (did you mean --data /?)"]),
        (["train", "x.yaml"], ["(did you mean --config x.yaml?)"]),
        (["train", "--epochs", "many"], ["--epochs must be a whole number, got 'many'"]),
        (["train", "--epochs", "1", "2"], ["--epochs takes one value, got '1 2': '2' belongs to no option;"]),
        (["train", "-b", "16", "a", "b"], ["--batch-size takes one value, got '16 a b': 'a b' belongs to no option;"]),
        (["train", "-b", "16", "/"], ["'/' belongs to no option (did you mean --data /?);"]),
        (["train", "-b", "x", "16"], ["--batch-size must be a whole number, got 'x 16'"]),
        (["train", "--mean", "0.5", "x"], ["--mean must be numbers, got '0.5 x'"]),
        (["train", "--opt", "sgd", "adam"], ["--opt takes one value, got 'sgd adam': 'adam' belongs to no option"]),
        (["train", "--out", "a", "b"], ["'b' belongs to no option; put quotes around all of it, if it is one"]),
        (["train", "--mean", "0.5"], ["--mean 0.5: give three finite numbers"]),
        (["train", "--baseline", "maybe"], ["--baseline takes no value, got 'maybe'"]),
        (["train", "--resume", "maybe"], ["no value but auto, got 'maybe': write --resume, --resume auto or --no-re"]),
        (["train", "--method", "ce", "--temperature", "3"], ["method ce has no option temperature", "have it: kd"]),
        (["train", "--seed", "-1"], ["--seed must be >= 0", "got -1"]),
        (["train", "--ce-weight", "0", "--kd-weight", "0"], ["--ce-weight", "--kd-weight", "all 0"]),
        (["train", "--sched", "multistep", "--decay-milestones", "50", "-3"], ["--epochs 12", "got 50 -3"]),
        (["train", "--epochs", "0"], ["--epochs", "got 0"]),
        (["train", "--epochs", "-3"], ["--epochs", "-3"]),
        (["train", "-b", "0"], ["--batch-size 0"]),
        (["train", "--batch-size", "-8"], ["--batch-size -8"]),
        (["train", "--temperature", "0"], ["--temperature must be a number above 0, got 0"]),
        (["train", "--temperature", "-4"], ["temperature", "-4"]),
        (["train", "--lr"], ["--lr must be a number, got nothing"]),
        (["train", "--opt", "fusedlamb"], ["apex"]),
        (["train", "--device", "gpu"], ["gpu"]),
        (["train", "--device", "meta"], ["meta"]),
        (["train", "--device", "cuda:7"], ["cuda:7"]),
        (["train", "--data", "nowhere"], ["nowhere"]),
        (["train", "--config", "nowhere.yaml"], ["nowhere.yaml", "no such file"]),
        (["train", "--teacher-weights", "nowhere.pth"], ["nowhere.pth"]),
        (["train", "--teacher-epochs", "0"], ["resnet20", "--teacher-weights", "--teacher-epochs"]),
        (["eval"], ["--weights"]),
        (["eval", "--weight", "F"], ["'--weight'", "'--weights'"]),
        (["eval", "F"], ["unexpected 'F'", "--weights F"]),
        (["eval", "--weights", "nowhere.safetensors"], ["nowhere.safetensors: there is no such file or run folder"]),
        (["eval", "--weights", "/tmp"], ["--weights /tmp holds no student.safetensors: it is no run folder"]),
        (["eval", "--weights", "nowhere.safetensors", "--model", "resnet8"], ["nowhere.safetensors"]),
    ],
)
def test_bad_options(fastkd, tmp_path, arguments, words):
    check_refused(fastkd(*arguments), *words)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text, words",
    [
        ("epoch: 3", ["mine.yaml", "'epoch'", "'epochs'"]),
        ("epochs: ten", ["mine.yaml: epochs must be a whole number, got 'ten'"]),
        ("epochs: {a: 1}", ["mine.yaml: epochs must be a whole number, got {'a': 1}"]),
        ("epochs: [1, 2]", ["mine.yaml: epochs must be a whole number, got [1, 2]"]),
        ("lr: [0.1, 0.2]", ["mine.yaml: lr must be a number, got [0.1, 0.2]"]),
        ("lr: true", ["mine.yaml: lr must be a number, got True"]),
        ("lr:", ["mine.yaml: lr must be a number, got None"]),
        ("baseline: maybe", ["mine.yaml: baseline must be true or false, got 'maybe'"]),
        ("seed: yes\nlr: true", ["mine.yaml: seed must be a whole number, got True"]),
        ("mean: [0.1, 0.2]", ["--config mine.yaml: --mean 0.1 0.2: give three finite numbers"]),
        ("momentum: 2", ["--config mine.yaml: --momentum"]),
        ("method: kd\ntemperature: -1", ["--config mine.yaml: --temperature"]),
        ("opt: adamx", ["--config mine.yaml: --opt 'adamx' is not known (did you mean", "one of sgd", "lamb"]),
        ("batch-size: 8\nbatch_size: 9", ["mine.yaml: batch_size is given 2 times"]),
        ("epochs: 8\nepochs: 8", ["mine.yaml: epochs is given 2 times"]),
        ("method: ce\ntemperature: 3", ["mine.yaml: method ce has no option temperature", "have it: kd"]),
        ("- a\n- b", ["mine.yaml", "name: value"]),
        ("a: [", ["mine.yaml", "not valid YAML"]),
        ("resume: true", ["mine.yaml", "resume", "command line only"]),
        ("recipe: digit", ["'digit'", "'digits'"]),
    ],
)
def test_bad_files_of_options(fastkd, text, words):
    Path("mine.yaml").write_text(text)
    check_refused(fastkd("train", "--config", "mine.yaml"), *words)


def test_a_bad_value_of_the_command_line_is_not_the_file_s(fastkd):
    Path("mine.yaml").write_text("opt: adamw\nlr: 0.1\n")
    _, _, err = fastkd("train", "--config", "mine.yaml", "--opt", "adamx")
    assert err.startswith("fastkd: --opt 'adamx' is not known")


def spoil_empty(images):
    shutil.rmtree(images)
    images.mkdir()
    return ["images"]


def spoil_class(images):
    for path in (images / "train/dog").iterdir():
        path.unlink()
    return ["dog"]


def spoil_image(images):
    (images / "train/dog/3.jpg").write_text("this is no image")
    return ["3.jpg"]


def spoil_split(images):
    (images / "val/dog").rename(images / "val/wolf")
    return ["dog", "wolf"]


@pytest.mark.parametrize("spoil", [spoil_empty, spoil_class, spoil_image, spoil_split])
def test_bad_folders(fastkd, images, spoil):
    words = spoil(images)
    options = ["--student", "resnet8", "--teacher", "resnet8", "--teacher-epochs", "1", "--epochs", "1"]
    check_refused(fastkd("train", "--data", images, "--image-size", "32", *options), *words)
    assert not Path("runs").exists()


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("touched"),)


def test_bad_weights(fastkd, tmp_path):
    torch.save(create_model("resnet20", 10).state_dict(), "good.pth")
    Path("short.pth").write_bytes(Path("good.pth").read_bytes()[:5000])
    torch.save(create_model("resnet14", 10).state_dict(), "other.pth")
    torch.save(create_model("resnet20", 100).state_dict(), "hundred.pth")
    Path("evil.pth").write_bytes(pickle.dumps(Evil()))
    torch.save({"state_dict": Evil()}, "evil2.pth")
    for name, words in {
        "short.pth": ["short.pth"],
        "other.pth": ["other.pth", "missing"],
        "hundred.pth": ["hundred.pth", "[100, 64]", "[10, 64]"],
        "evil.pth": ["evil.pth"],
        "evil2.pth": ["evil2.pth"],
    }.items():
        check_refused(fastkd("train", *FROZEN, "--teacher-weights", name), *words)
        check_refused(fastkd("eval", "--model", "resnet20", "--weights", name, "--data", "digits"), *words)
    remedy = "--teacher-epochs N fine-tunes"
    check_refused(fastkd("train", *FROZEN, "--teacher-weights", "hundred.pth"), "--teacher-weights hundred", remedy)
    assert not Path("touched").exists() and not Path("runs").exists()


def test_a_teacher_that_knows_nothing_is_a_loud_warning(fastkd):
    torch.manual_seed(1)
    torch.save(create_model("resnet20", 10).state_dict(), "fresh.pth")
    status, out, _ = fastkd("train", *FROZEN, "--no-baseline", "--teacher-weights", "fresh.pth")
    assert status == 0 and "WARNING: the teacher's top-1 is" in out and "chance is 10.00 %" in out


def test_a_teacher_that_is_worse_than_the_student_alone_gets_a_hint():
    from fastkd.commands.train import hint_of_teacher

    rows = [["teacher", "a", "50.00"], ["student alone", "b", "60.00"], ["student, kd", "b", "55.00"]]
    assert "(top-1 50.00 %) is worse" in hint_of_teacher(rows) and "--teacher-epochs" in hint_of_teacher(rows)
    assert hint_of_teacher([["teacher 2", "a", "60.00"], *rows]) == ""  # the best counts
    assert hint_of_teacher(rows[::2]) == "" and hint_of_teacher(rows[1:]) == ""


def test_the_best_epoch_is_named_if_it_is_not_the_last():
    from fastkd.commands.train import hint_of_best

    rows = [{"epoch": epoch, "top1": top1} for epoch, top1 in ((1, 25.35), (2, 22.54))]
    assert "best.pt has epoch 1, top-1 25.35 %" in hint_of_best(rows)
    assert hint_of_best(rows[::-1]) == hint_of_best(rows[:1]) == ""


def test_given_teacher_weights_are_used(fastkd):
    fastkd("train", *ALONE, "--student", "resnet20", "--out", "t")
    status, out, _ = fastkd("train", *FROZEN, "--no-baseline", "--teacher-weights", "t/student.safetensors")
    assert status == 0 and "training it first" not in out and "teacher resnet20: top-1" in out


def test_no_permission(fastkd, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    try:  # root may write there all the same; what the kernel owns refuses root too
        (locked / "probe").mkdir()
        locked = Path("/sys")
    except PermissionError:
        pass
    check_refused(fastkd("train", *QUICK, "--out", locked / "run"), str(locked / "run"), "choose another folder")


def test_a_folder_that_may_not_be_looked_into(fastkd, monkeypatch):
    iterdir = Path.iterdir

    def denied(path):
        if path == Path("run"):
            raise PermissionError(13, "Permission denied")
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", denied)
    check_refused(fastkd("train", *QUICK, "--out", "run"), "--out run: Permission denied", "choose another folder")


def test_a_disk_that_takes_no_more(tmp_path):
    """The real command with a limit of the system on the size of a file: 200 kB are too few for a checkpoint."""
    done = subprocess.run(
        [sys.executable, "-m", "fastkd", "train", *QUICK, "--no-baseline", "--out", "run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )
    result = (done.returncode, done.stdout, done.stderr)
    check_refused(result, "cannot write run/teacher/last.pt", "File too large", "--resume")
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("*.pt"))


def test_folder_end_to_end(fastkd, images):
    options = [
        "--student",
        "resnet8",
        "--teacher",
        "resnet14",
        "--teacher-epochs",
        "1",
        "--epochs",
        "2",
        "--lr",
        "0.01",
    ]
    options += ["--image-size", "32", "-b", "4", "--workers", "1", "--mixup", "0.2", "--ema-decay", "0.9"]
    for loader in ("folder", "auto"):
        status, out, err = fastkd("train", "--data", images, "--loader", loader, *options, "--out", f"run-{loader}")
        assert status == 0, err
        assert "student, kd" in out
    assert "data: decoding with" in out
    weights = ["--weights", "run-folder/student.safetensors", "--loader", "folder", "-b", "2"]
    status, out, _ = fastkd("eval", "--data", images, *weights)
    assert status == 0 and "│      6 │" in out and "as in training: --image-size 32 --mean 0.485" in out
    assert "--image-size" not in fastkd("eval", "--data", images, *weights, "--image-size", "64")[1]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--graph", "on", "--device", "cpu"], "--graph on: there is no CUDA device"),
        (["--method", "iakd", "--teacher-form", "fused"], "never runs the teacher as a whole"),
        (["--method", "ofd", "--teacher-form", "fused"], "before the activation"),
        (["--method", "dml", "--teacher-form", "folded"], "the method has no teacher"),
        ("--method iakd --gates block --student resnet56 --teacher resnet56 --compile on".split(), "paths"),
        (["--grad-accum", "100"], "--grad-accum 100: a batch of 64"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_said_before_anything_is_written(fastkd, tmp_path, words, said):
    teacher = [] if "dml" in words else ["--teacher", "resnet56"]
    status, _, err = fastkd("train", "--out", "run", *teacher, *words)
    assert status == 2 and said in err and not (tmp_path / "run").exists()


def test_a_teacher_serves_for_other_forms_and_epochs(fastkd, few_digits, tmp_path):
    """The cached one is taken whatever says nothing of it: the form it runs in, epochs of a schedule without steps."""
    short = ["--teacher-epochs", "1", "--no-baseline", "--method", "kd"]
    fastkd("train", "--out", "a", "--epochs", "1", *short)
    status, out, _ = fastkd("train", "--out", "b", "--epochs", "2", "--teacher-form", "fused", *short)
    assert status == 0 and "trained before, taken from" in out


def test_a_full_disk_behind_stdout():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fastkd", "--help"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (2, "fastkd: cannot write the output: No space left on device\n")
