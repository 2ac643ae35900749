"""Options: hints for unknown names, and checks whose messages come through tyro unchanged."""

from dataclasses import dataclass, fields, make_dataclass

import pytest

from fastkd.config import config_type, parse
from fastkd.errors import UserError
from fastkd.methods import METHODS, find_method
from fastkd.option_names import nearest_option
from fastkd.parser import _unboxed, groups, name_of, option_types, run_parser

# As typed, from the options of timm, torchvision, Hugging Face and codes of papers; "": no option is near.
TYPED = {
    "--epoch": "--epochs",
    "--num-epochs": "--epochs",
    "--batchsize": "--batch-size",
    "--bs": "--batch-size",
    "--per-device-train-batch-size": "--batch-size",
    "--learning-rate": "--lr",
    "--arch": "--student",
    "--model": "--student",
    "--student-model": "--student",
    "--teacher-model": "--teacher",
    "--teacher-ckpt": "--teacher-weights",
    "--teacher-weight": "--teacher-weights",
    "--pretrained": "--student-weights",
    "--weight-decy": "--weight-decay",
    "--wd": "--weight-decay",
    "--data-path": "--data",
    "--dataset": "--data",
    "--num-workers": "--workers",
    "--lr-scheduler": "--sched",
    "--milestones": "--decay-milestones",
    "--optimizer": "--opt",
    "--output": "--out",
    "--output-dir": "--out",
    "--temp": "--temperature",
    "--T": "--temperature",
    "--distill": "--method",
    "--img-size": "--image-size",
    "--label-smoothing": "--smoothing",
    "--model-ema": "--ema-decay",
    "--fp16": "--amp-dtype",
    "--gpus": "--device",
    "--grad-clip": "--clip-grad",
    "--gradient-accumulation-steps": "--grad-accum",
    "--warmup": "--warmup-epochs",
    "--momentun": "--momentum",
    "--wandb": "--log",
    "--wandb-project": "",
    "--jsd": "",
    "--num-classes": "",
    "--foo": "",
}


@pytest.mark.parametrize("typed", TYPED)
def test_an_unknown_option_gets_a_near_one_or_none(typed):
    known = option_types(config_type("kd"))
    hint = f" (did you mean {TYPED[typed]!r}?)" if TYPED[typed] else ""
    assert nearest_option(name_of(typed), known, dashes=True) == hint
    with pytest.raises(UserError) as error:
        run_parser(config_type("kd"), [typed, "1"], "fastkd train")
    assert str(error.value) == f"unknown option {typed!r}{hint}; `fastkd train --help` lists them"


def test_a_name_from_elsewhere_is_offered_only_if_the_command_has_it():
    assert nearest_option("arch", ["weights", "model"], dashes=True) == " (did you mean '--model'?)"
    assert nearest_option("arch", ["weights"]) == ""
    assert nearest_option("learning_rate", ["lr"]) == " (did you mean 'lr'?)"  # in a file, names have underscores


@dataclass(frozen=True)
class Checked:
    """Options with checks."""

    text: str = ""
    """Any."""
    number: int = 0
    """Any."""
    needed: str = "given"
    """Any."""

    def __post_init__(self) -> None:
        if self.number < 0:
            raise UserError(f"{self.text}: --number must be >= 0 | [dali] +-- got {self.number}")
        if self.number > 9:
            try:
                int("x")
            except ValueError:
                raise UserError("--number must be a digit") from None


KIND = make_dataclass("Kind", [("checked", Checked)], frozen=True)


@pytest.mark.parametrize("text", ["caf\xe9", "caf\udce9", "[bold]x[/bold]", "a ----- | +", "\u2500\u2502", "y" * 2000])
def test_a_message_comes_through_unchanged(text):
    with pytest.raises(UserError) as error:
        run_parser(KIND, ["--text", text, "--number", "-1"], "fastkd train")
    assert str(error.value) == f"{text}: --number must be >= 0 | [dali] +-- got -1"
    with pytest.raises(UserError, match="^--number must be a digit$"):
        run_parser(KIND, ["--number", "10"], "fastkd train")


def test_the_fallback_reads_both_kinds_of_box():
    plain = "+- Error ------+\n| --a is wrong |\n| ------------ |\n| see --help   |\n+--------------+"
    fine = "╭─ Error ──────╮\n│ --a is wrong │\n│ ──────────── │\n│ see --help   │\n╰──────────────╯"
    assert _unboxed(plain).replace("- ", "") == _unboxed(fine) == "Error --a is wrong see --help"


@pytest.mark.parametrize("before", ["--resume", "--resume auto", "--flip", "--graph", "--quiet", "--no-report"])
def test_a_short_option_is_no_value_of_the_option_before_it(before, tmp_path):
    (tmp_path / "config.yaml").write_text("workers: 0")
    config = parse(["--out", str(tmp_path), *before.split(), "-b", "8"], log=lambda line: None)
    assert config.data.batch_size == 8 and (config.data.flip == "on") == (before == "--flip")
    assert config.train.resume == before.startswith("--resume")


def test_negative_numbers_are_values_and_unknown_letters_are_options():
    assert groups(["--mean", "-1", "-.5", "1", "-b=8"]) == [("--mean", ["-1", "-.5", "1"]), ("--batch-size", ["8"])]
    for typed, hint in (("-j", "--workers"), ("-epochs", "--epochs")):
        with pytest.raises(UserError, match=f"^unknown option '{typed}' .did you mean '{hint}'.*--help` lists them"):
            parse(["--flip", typed, "4"], log=lambda line: None)


@pytest.mark.parametrize(
    "arguments, line",
    [
        ("--teacher A --teacher B", "--teacher is given 2 times; the last one counts: --teacher B"),
        ("--seed 1 --lr 1 --seed=2 --seed 2", "--seed is given 3 times; the last one counts: --seed 2"),
        ("-b 8 --batch-size 9", "--batch-size is given 2 times; the last one counts: --batch-size 9"),
        ("--report --no-report", "--report is given 2 times; the last one counts: --no-report"),
        ("--no-flip --flip", "--flip is given 2 times; the last one counts: --flip on"),
        ("--seed 1 --seed 1 --no-report --no-report", ""),
    ],
)
def test_an_option_with_two_values_gets_a_warning(arguments, line, capsys):
    lines: list[str] = []
    parse(["--recipe", "digits", *arguments.split()], lines.append)
    assert [each for each in lines if "given" in each] == ([f"WARNING: {line}"] if line else [])
    run_parser(config_type("kd"), arguments.split(), "fastkd eval")  # other commands print it
    assert capsys.readouterr().err == (f"fastkd: WARNING: {line}\n" if line else "")


def test_an_error_names_the_help_of_the_command_alone():
    with pytest.raises(UserError, match="; `fastkd predict --help` lists them$"):
        run_parser(KIND, ["--foo"], "fastkd predict IMAGE...")


def test_a_file_in_the_place_of_a_run_is_said():
    with pytest.raises(UserError, match=r"--resume: there is no run in .* \(it is a file, not a folder\)"):
        parse(["--resume", "--out", __file__])


@pytest.mark.parametrize("method", METHODS)
def test_a_negative_number_of_a_method_names_its_option(method):
    kind = find_method(method).Options
    for name in (option.name for option in fields(kind) if option.type is float):
        flag = "--" + name.replace("_", "-")
        with pytest.raises(UserError, match=f"^(--recipe digits: )?{flag} .*-3"):
            parse(["--recipe", "digits", "--method", method, flag, "-3"], log=lambda line: None)
