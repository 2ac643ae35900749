"""docs/methods.md names every option of every method, with the default that the code has."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from fastkd.methods import METHODS

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def documented() -> dict[tuple[str, str], str]:
    """(method, option) -> its default, in the table of defaults."""
    table = PAGE.read_text().partition("## Defaults and their sources")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| .+ \|$", table, re.M)
    pairs = [(method, each) for method, cell in rows for each in re.findall(r"`--(.+?)`", cell)]
    found = {(method, each.partition(" ")[0].replace("-", "_")): each.partition(" ")[2] for method, each in pairs}
    assert len(found) == len(pairs), "an option is in two rows"
    return found


def shown(default: object) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    values = default if isinstance(default, tuple) else (default,)
    return " ".join(value if isinstance(value, str) else f"{value:g}" for value in values)


@pytest.mark.parametrize("method", METHODS)
def test_the_table_of_defaults_is_that_of_the_code(method):
    wanted = {option.name: shown(option.default) for option in fields(METHODS[method].Options)}
    assert {name: value for (kind, name), value in documented().items() if kind == method} == wanted
