"""The networks of a run: several teachers, fine-tuning, class names, and options of older versions."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from fastkd import create_model
from fastkd.commands.networks import NetworkMaker, teacher_of
from fastkd.config import Config, defaults, parse
from fastkd.errors import UserError
from fastkd.models.own_input import InputSpec
from fastkd.network_options import NetworkOptions
from fastkd.weights_file import save_network

SHORT = ["--epochs", "1", "--warmup-epochs", "0", "-b", "256", "--no-baseline"]
QUICK = [*SHORT, "--teacher-epochs", "1"]


def ok(result) -> str:
    """The output of a command that succeeded."""
    status, out, err = result
    assert status == 0, err
    return out


def refused(result) -> str:
    """The one line of a command that was refused."""
    status, out, err = result
    assert status == 2 and err.startswith("fastkd: ") and err.count("\n") == 1, (status, out, err)
    return err


def test_a_run_whose_file_names_one_teacher_as_text_resumes(fastkd, few_digits):
    ok(fastkd("train", *QUICK, "--teacher", "resnet8", "--out", "run"))
    for file in (Path("run/config.yaml"), Path("run/teacher/config.yaml")):
        options = yaml.safe_load(file.read_text())
        options |= {"teacher": options["teacher"][0], "teacher_weights": ""}
        for new in ("teacher_ratios", "ensemble", "student_sha256"):
            del options[new]
        file.write_text(yaml.safe_dump(options))
    assert "resuming run after epoch 1 of 1" in ok(fastkd("train", "--out", "run", "--resume"))
    assert "trained before" in ok(fastkd("train", *QUICK, "--teacher", "resnet8", "--out", "other"))
    assert "teacher was ['resnet8']" in refused(fastkd("train", "--out", "run", "--resume", "--teacher", "resnet20"))


def test_two_teachers(fastkd, few_digits):
    out = ok(fastkd("train", *QUICK, "--teacher", "resnet8", "resnet8", "--out", "run"))
    assert "student resnet8: kd from resnet8, resnet8" in out and "teachers' mean" in out
    first, second = (Path(f"run/{name}/student.safetensors").read_bytes() for name in ("teacher", "teacher2"))
    assert first != second
    given = [*SHORT, "--teacher-epochs", "0", "--teacher", "resnet8", "resnet8", "--teacher-ratios", "2", "1"]
    given += ["--teacher-weights", "run/teacher/student.safetensors", "run/teacher2/student.safetensors"]
    out = ok(fastkd("train", *given, "--ensemble", "logits"))
    assert "trained before" not in out and "teachers' mean" in out
    assert "one teacher" in refused(fastkd("train", *given, "--method", "iekd"))


def test_a_teacher_from_a_folder_of_weights_counts_by_their_content(fastkd, few_digits):
    Path("folder").mkdir()
    save_network(Path("folder/model.safetensors"), create_model("resnet8", 10), {})
    given = [*QUICK, "--teacher", "resnet8", "--teacher-weights", "folder"]
    assert "fine-tuning it" in ok(fastkd("train", *given, "--out", "first"))
    assert "trained before" in ok(fastkd("train", *given, "--out", "again"))
    save_network(Path("folder/model.safetensors"), create_model("resnet8", 10), {})
    assert "fine-tuning it" in ok(fastkd("train", *given, "--out", "other"))


def test_the_mean_has_the_temperature_of_a_sums_methods():
    nets = [create_model("resnet8", 3), create_model("resnet8", 3)]
    assert teacher_of(nets, two_teachers("kd+sp", "--kd-temperature", "3")).temperature == 3
    assert teacher_of(nets, two_teachers("kd", "--temperature", "2")).temperature == 2
    with pytest.raises(UserError, match="--kd-temperature 4, --dist-temperature 1: .* one temperature"):
        teacher_of(nets, two_teachers("kd+dist", "--dist-temperature", "1"))
    assert teacher_of(nets, two_teachers("kd+dist", "--dist-temperature", "1", "--ensemble", "logits")).mean == "logits"


def two_teachers(method: str, *options: str) -> Config:
    """The configuration of a run with two teachers."""
    teachers = ["--teacher", "resnet8", "resnet8", "--teacher-epochs", "1"]
    return parse(["--data", "digits", "--method", method, "--student", "resnet8", *teachers, *options], print)


def test_weights_and_ratios_are_counted():
    assert NetworkOptions(teacher=("a", "b"), teacher_weights=("f", "none")).weights_of_teachers == ("f", "")
    assert NetworkOptions(teacher=("a", "b"), teacher_weights=("",)).weights_of_teachers == ("", "")
    with pytest.raises(UserError, match="1 for 2 teachers"):
        NetworkOptions(teacher=("a", "b"), teacher_weights=("f",))
    with pytest.raises(UserError, match="--teacher-ratios 1.0 2.0: 2 for 1 teachers"):
        NetworkOptions(teacher_ratios=(1.0, 2.0))


def test_a_run_folder_stands_for_its_student(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = create_model("resnet8", 4)
    for folder in ("run", "half"):
        Path(folder).mkdir()
        save_network(Path(folder, "student.safetensors"), net, {"model": "resnet8"})
    names = NetworkOptions(teacher=("resnet8",), teacher_weights=("run",), student_weights="run")
    assert names.teacher_weights == ("run/student.safetensors",) and names.student_weights == "run/student.safetensors"
    assert torch.equal(maker("abcd", teacher_weights=("run",)).teachers()[0].fc.weight, net.fc.weight)
    assert torch.equal(create_model("resnet8", 4, "run").fc.weight, net.fc.weight)
    Path("half/student.safetensors").rename("half/best.pt")
    with pytest.raises(UserError, match="the run is not finished; half/best.pt is its best state so far"):
        maker("abcd", teacher_weights=("half",)).teachers()


@pytest.fixture
def seven(tmp_path):
    """A file with the weights of a resnet8 of seven classes."""
    torch.manual_seed(3)
    torch.save(create_model("resnet8", 7).state_dict(), tmp_path / "seven.pth")
    return "seven.pth"


def test_a_student_from_weights_of_other_classes(fastkd, few_digits, seven):
    out = ok(fastkd("train", *SHORT, "--method", "ce", "--student", "resnet8", "--student-weights", seven))
    assert f"student resnet8: {seven} has 7 classes, the data 10 classes: a new classifier" in out
    assert "these keys start fresh: fc.weight, fc.bias" in out


def test_a_fine_tuned_teacher_is_reused_by_the_content_of_its_file(fastkd, few_digits, seven):
    given = [*SHORT, "--teacher", "resnet8", "--teacher-weights"]
    hint = refused(fastkd("train", *given, seven, "--teacher-epochs", "0"))
    assert hint.startswith(f"fastkd: --teacher-weights {seven} is for 7 classes, and resnet8 for 10 classes")
    assert "[7, 64]" in hint and "--teacher-epochs N" in hint and not Path("runs").exists()
    out = ok(fastkd("train", *given, seven, "--teacher-epochs", "1", "--out", "a"))
    assert "a new classifier" in out and f"fine-tuning it from {seven}, 1 epoch" in out
    shutil.copy(seven, "copy.pth")
    assert "trained before from copy.pth" in ok(
        fastkd("train", *given, "copy.pth", "--teacher-epochs", "1", "--out", "b")
    )
    torch.save(create_model("resnet8", 7).state_dict(), "copy.pth")
    assert "fine-tuning it" in ok(fastkd("train", *given, "copy.pth", "--teacher-epochs", "1", "--out", "c"))
    again = ["--config", "a/teacher/config.yaml", "--student-weights", "copy.pth", "--out", "d"]
    assert "SHA-256" in refused(fastkd("train", *again))


def maker(classes: str, ignore: bool = False, **options) -> NetworkMaker:
    images = InputSpec(32, (0.5,) * 3, (0.5,) * 3)
    names = NetworkOptions(student="resnet8", teacher=("resnet8",), **options)
    return NetworkMaker(names, tuple(classes), images, 0, ignore)


def test_weights_of_another_network_are_named_before_they_do_not_fit(tmp_path, capsys):
    file = tmp_path / "t.safetensors"
    save_network(file, create_model("resnet20", 4), {"model": "resnet20"})
    with pytest.raises(UserError, match=r"^--teacher-weights \S+ does not fit resnet8: unexpected 72"):
        maker("abcd", teacher_weights=(str(file),)).teachers()
    assert f"teacher resnet8: the weights {file} are of resnet20, says their note" in capsys.readouterr().out


def test_a_teachers_classes_are_put_into_the_order_of_the_data(tmp_path, capsys):
    net, file = create_model("resnet8", 4), tmp_path / "t.safetensors"
    save_network(file, net, {"data": {"classes": list("dbca")}})
    (teacher,) = maker("abcd", teacher_weights=(str(file),)).teachers()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(teacher.eval()(images), net.eval()(images)[:, [3, 1, 2, 0]])
    assert "in another order" in capsys.readouterr().out
    with pytest.raises(UserError, match="--ignore-class-names"):
        maker("abcx", teacher_weights=(str(file),)).teachers()
    (teacher,) = maker("abcx", ignore=True, teacher_weights=(str(file),)).teachers()
    assert torch.equal(teacher.fc.weight, net.fc.weight) and "go by position" in capsys.readouterr().out
    maker("abcx", teacher_weights=(str(file),), teacher_epochs=1).teachers()
    assert "is trained further" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, said",
    [
        ("--method ce --teacher resnet8", "the method has no teacher (ce)"),
        ("--method dml --teacher-epochs 3", "the method has no teacher (dml)"),
        ("--method ce --baseline", "method ce is the student alone"),
        ("--ensemble logits", "there is one teacher"),
        ("--teacher-ratios 1", "there is one; drop the option"),
        ("--sched step --decay-epochs 3 --min-lr 0.1", "--min-lr has no effect: it ends the cosine"),
        ("--decay-rate 0.5", "--decay-rate has no effect"),
        ("--warmup-epochs 0 --warmup-lr 0.01", "--warmup-lr has no effect: --warmup-epochs is 0"),
        ("--student-sha256 abc", "no file is given"),
    ],
)
def test_an_option_without_effect_is_an_error(fastkd, words, said):
    assert said in refused(fastkd("train", *words.split(), "--out", "run")) and not Path("run").exists()


def test_an_option_at_its_default_is_no_error(fastkd):
    ok(fastkd("train", "--method", "ce", "--teacher-epochs", "0", "--print-config"))
    assert defaults("ce")["teacher_epochs"] == 0


def test_stages_by_name(fastkd, few_digits):
    given = ["--method", "at", "--student", "torchvision/mnasnet0_5", "--teacher", "resnet8", "--out", "run"]
    ends = ["layers.8", "layers.9", "layers.10"]
    assert "has no module 'layers.8x' (did you mean" in refused(
        fastkd("train", *QUICK, *given, "--student-stages", "layers.8x", *ends[1:])
    )
    assert not Path("run").exists()
    ok(fastkd("train", *QUICK, *given, "--student-stages", *ends))
    assert yaml.safe_load(Path("run/config.yaml").read_text())["student_stages"] == ends
