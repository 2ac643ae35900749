"""Options: hints for unknown names, and checks whose messages come through tyro unchanged."""

from dataclasses import dataclass, make_dataclass

import pytest

from fastkd.config import config_type
from fastkd.errors import UserError
from fastkd.parser import _unboxed, name_of, nearest_option, option_types, run_parser

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
