"""What is printed is what was given: rich must not read markup or pictures in it, and any terminal can show it."""

import io
import sys

import pytest

from fastkd.progress import Bar, track
from fastkd.report import console, log_rank0, show_table

TRICKY = ["pip install 'fastkd[dali]'", "[bold]x[/bold]", ":cat: lr:100: 2", "[/]", "{0} %s {x}", "a\\[b]", "[link=x]y"]


@pytest.mark.parametrize("text", TRICKY)
def test_a_line_a_table_and_a_title(text, capsys):
    log_rank0(text)
    assert capsys.readouterr().out == text + "\n"
    show_table([text, "second"], [["a", text]])
    out = capsys.readouterr().out
    assert out.count(text) == 2
    assert list(track([1, 2], text)) == [1, 2]
    assert text in capsys.readouterr().out


@pytest.fixture
def terminal(monkeypatch):
    """terminal(encoding) -> a function that gives what was printed since, as bytes."""

    def make(encoding: str, size: str = "200", is_terminal: bool = False):
        stream = io.BytesIO()
        out = io.TextIOWrapper(stream, encoding=encoding)
        out.isatty = lambda: is_terminal
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setenv("COLUMNS", size)

        def read() -> bytes:
            out.flush()
            return stream.getvalue()

        return read

    return make


def test_titles_of_a_bar_on_a_terminal(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    read = terminal("ascii", is_terminal=True)
    assert console().is_terminal
    for _ in track([1, 2], "fastkd[dali] caf\udce9"):
        pass
    assert rb"fastkd[dali] caf\udce9" in read().split(b"\n", 1)[1]  # after the line: in the bar itself
    bar = Bar(2, 0, 3)
    with bar:
        bar.show("epoch[1]", "term[x] 1.0", 0)
    assert b"term[x] 1.0" in read()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp1252"])
@pytest.mark.parametrize("size", ["200", "40"])
def test_any_name_can_be_printed(terminal, encoding, size):
    read = terminal(encoding, size)
    name = "caf\xe9 \u732b \udce9"
    log_rank0(name)
    show_table(["name", name], [[name, "1"]], numbers=1)
    shown = read().decode(encoding)
    assert name.encode(encoding, "backslashreplace").decode(encoding) + "\n" in shown
    assert encoding == "utf-8" or not set(shown) & set("─│┃━┏")  # lines of the table
