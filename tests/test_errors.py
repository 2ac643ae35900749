"""Error messages on any terminal, and the hints in them."""

import pytest

from fastkd import TrainOptions
from fastkd.data import DataOptions
from fastkd.errors import UserError, as_typed, count_of, nearest, printable
from fastkd.option_kinds import check_kinds


@pytest.mark.parametrize(
    "text, encoding, shown",
    [
        ("caf\xe9.jpg", "ascii", r"caf\xe9.jpg"),
        ("caf\xe9.jpg", "utf-8", "caf\xe9.jpg"),
        ("caf\udce9.jpg", "utf-8", r"caf\udce9.jpg"),  # a byte that is not UTF-8
        ("caf\udce9.jpg", "latin-1", r"caf\udce9.jpg"),
        ("\u732b/1.jpg", "latin-1", r"\u732b/1.jpg"),
        ("a\nb\x1b[31m.jpg", None, r"a\nb\x1b[31m.jpg"),
        ("[dali] <class> :x: {0} %s", "ascii", "[dali] <class> :x: {0} %s"),
    ],
)
def test_what_a_terminal_cannot_show_becomes_escapes(text, encoding, shown):
    assert printable(text, encoding) == shown


@pytest.mark.parametrize(
    "message, arguments",
    [
        ("--opt nesterov needs --momentum above 0; --no-sync-bn, not --opt", "opt=, momentum=, sync_bn=False"),
        ("--seed and --file: make one with `fastkd check-data --out`", "seed="),
    ],
)
def test_a_traceback_names_the_arguments_of_options(message, arguments):
    """Those that Python has: --file is no option, and --out is one of `fastkd check-data`."""
    check_kinds(TrainOptions())
    error = UserError(message)
    assert str(error) == message and error.__notes__ == [f"In Python, options are arguments: {arguments}"]


def test_an_error_without_options_has_no_note():
    assert not hasattr(UserError("'synthetic': a -- b, seed-5"), "__notes__")


def test_an_option_is_shown_as_it_is_typed():
    shown = [as_typed("pad_mode", "zeros"), as_typed("mean", (0.5, 1.0)), as_typed("exif", True), as_typed("pad", 0)]
    assert shown == ["--pad-mode zeros", "--mean 0.5 1.0", "--exif", "--pad 0"]
    assert as_typed("data", "my photos") == "--data 'my photos'"


def test_a_wrong_option_of_data_names_the_argument_too():
    with pytest.raises(UserError, match="^--batch-size 1: give at least 2") as error:
        DataOptions(batch_size=1)
    assert error.value.__notes__ == ["In Python, options are arguments: batch_size="]


def test_a_noun_has_the_form_of_its_number():
    words = [count_of(1, "epoch"), count_of(0, "epoch"), count_of(1000, "image"), count_of(2, "class")]
    assert words == ["1 epoch", "0 epochs", "1,000 images", "2 classes"]
    assert count_of(2, "batch") == "2 batches"


def test_control_characters_can_be_kept():
    assert printable("a\tb\nc\r", "ascii", keep="\n\t") == "a\tb\nc\\r"


@pytest.mark.parametrize(
    "word, choices, near",
    [
        ("kdd", ["kd", "ce", "dkd"], "kd"),
        ("adan", ["sgd", "adamw"], "adamw"),
        ("KD", ["kd", "dkd"], "kd"),
        ("vit_tiny", ["vgg8", "vit_tiny_patch16_224", "vit_tiny_patch16_384_in21k"], "vit_tiny_patch16_224"),
        ("batchsize", ["batch_size"], "batch_size"),
        ("digit", ["digits", "synthetic"], "digits"),
        ("--wandb", ["--mean", "--std", "--data"], ""),
        ("aa", ["data"], ""),
        ("jsd", ["std"], ""),
        ("model", ["method"], ""),
        ("ft", ["at", "kd"], ""),
        ("", ["a", "b"], ""),
        ("x", [], ""),
    ],
)
def test_only_what_is_near_is_offered(word, choices, near):
    assert nearest(word, choices) == (f" (did you mean {near!r}?)" if near else "")
