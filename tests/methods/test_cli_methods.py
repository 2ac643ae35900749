"""`fastkd methods`, and the options of methods and of their sums in `fastkd train --help`."""

import inspect
import re
from dataclasses import fields

import pytest

from fastkd.methods import METHODS, Method, find_method


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")


def row(out, name):
    """The cells of a method's row."""
    return next(cells for line in out.splitlines() if len(cells := cells_of(line)) == 4 and cells[0] == name)


def cells_of(line):
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_every_method_with_its_paper_and_needs(fastkd, wide):
    status, out, err = fastkd("methods")
    assert status == 0 and not err
    for name, kind in METHODS.items():
        cells = row(out, name)
        assert cells[1] == kind.__doc__.splitlines()[0] and kind.paper in cells[2]
        assert ("teacher" in cells[3].split("; ")) == kind.needs_teacher
        assert ("peers" in cells[3].split("; ")) == kind.needs_peers
    assert row(out, "ce")[2:] == ["-", "-"] and row(out, "kd")[2:] == ["arXiv:1503.02531", "teacher"]
    assert row(out, "dml")[3] == "peers"
    assert row(out, "at")[3] == "teacher; both staged, equally many stages"


def test_a_new_method_is_in_the_table(fastkd, wide, monkeypatch):
    class Toy(Method):
        """A toy.

        More about it.
        """

        paper = "arXiv:0000.00000"
        needs_stages = "both staged"

    monkeypatch.setitem(METHODS, "toy", Toy)
    assert row(fastkd("methods")[1], "toy") == ["toy", "A toy.", "arXiv:0000.00000", "teacher; both staged"]


def test_sums_are_explained(fastkd):
    out = fastkd("methods")[1]
    for words in ("--method iekd+kd", "--kd-temperature", "--kd-weight", "counted once", "--method NAME --help"):
        assert words in out


@pytest.mark.parametrize("columns", [80, 100])
def test_the_table_fits_the_screen_and_splits_no_name_or_paper(fastkd, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = fastkd("methods")[1]
    assert all(len(line) <= max(columns, 100) for line in out.splitlines())
    for name, kind in METHODS.items():
        assert row(out, name)[2] == (kind.paper or "-")


def help_of(fastkd, method):
    lines = fastkd("train", "--method", method, "--help")[1].splitlines()
    return " ".join(" ".join(line.strip("│| ") for line in lines).split())  # without the frame


def explained(options):
    """Option -> the text below it in the source."""
    found = re.findall(r'^    (\w+): [^\n]*\n    """(.+?)"""', inspect.getsource(options), re.DOTALL | re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


@pytest.mark.parametrize("name", METHODS)
def test_every_option_of_a_method_is_explained_alone_and_in_a_sum(name):
    options, partner = METHODS[name].Options, "dkd" if name == "kd" else "kd"
    texts = explained(options)
    assert all(texts.get(option.name) for option in fields(options))
    lines = find_method(f"{name}+{partner}").Options.__doc__.splitlines()
    for option, text in texts.items():
        assert f"    {name}_{option}: {text}" in lines


def test_the_help_of_a_sum_shows_the_explanations(fastkd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = help_of(fastkd, "at+kd")
    for words in (
        "--kd-temperature FLOAT Softens both networks' logits before they are compared; above 0. (default: 4.0)",
        "--at-attention-weight FLOAT Weight of the squared distance of the attention maps",
        "--kd-weight FLOAT Factor on all terms of kd; above 0. (default: 1.0)",
    ):
        assert words in text


def test_a_sum_needs_what_its_parts_need():
    kind = find_method("at+dml+kd")
    assert kind.needs_teacher and kind.needs_peers and METHODS["at"].needs_stages in kind.needs_stages
    assert not find_method("ce+dml").needs_teacher
