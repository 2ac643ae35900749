"""One step of every method on networks of every family; docs/networks.md holds the table of what works.

A table that does not say what happened fails. This writes it anew, in about a minute:
    PYTHONPATH=.:tests python tests/methods/test_families.py --write
"""

import copy
import re
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import torch
from every_family import CLASSES, FAMILIES, Family
from torch import nn

from fastkd.errors import UserError
from fastkd.methods import METHODS, Method, RunContext
from fastkd.models.sizes import note_image_size

PAGE = Path(__file__).parents[2] / "docs" / "networks.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->"


def try_method(family: Family, name: str) -> str:
    """What came of one step of a method: "yes", "adapters" if IAKD needs --adapters, else the reason why not."""
    try:
        step(family, name)
        return "yes"
    except UserError as error:
        reason = " ".join(str(error).split())
    if name == "iakd" and "use --adapters" in reason:
        step(family, name, adapters=True)
        return "adapters"
    return reason


def step(family: Family, name: str, **options) -> None:
    """Forward and backward of one batch; errors that no UserError explains fail the test."""
    method = build(family, name, **options)
    before = copy.deepcopy(method.teacher.net.state_dict()) if method.teacher is not None else {}
    torch.manual_seed(2)
    images, target = torch.randn(3, 3, family.size, family.size), torch.arange(3) % CLASSES
    method.prepare([(images, target)], RunContext(epochs=1, steps_per_epoch=4))
    method.train()
    plan = method.plan(0)
    if name == "iakd":  # blocks of both networks, in turns
        plan = tuple(number % 2 == 0 for number in range(len(plan)))
    terms = method(images, target, plan)
    sum(terms.values()).backward()
    gradients = [p.grad for p in method.student.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)
    assert (
        all(torch.equal(before[key], value) for key, value in method.teacher.net.state_dict().items()) if before else 1
    )


def build(family: Family, name: str, **options) -> Method:
    kind = METHODS[name]
    nets = [copy.deepcopy(net) for net in networks(family)]
    if "ae_epochs" in {option.name for option in fields(kind.Options)}:
        options["ae_epochs"] = 1
    teacher = nets[1] if kind.needs_teacher else None
    return kind(nets[0], teacher, kind.Options(**options), nets[1:] if kind.needs_peers else ())


@cache
def networks(family: Family) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    nets = family.student(), family.teacher()
    for net in nets:
        note_image_size(net, family.size)  # as create_model does
    return nets


def written() -> dict[str, dict[str, str]]:
    """The table in the docs: by family and method, as `try_method` says it."""
    text = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", text, re.M))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    header, _, *body = rows
    return {
        row[0]: {name: reasons.get(cell, cell) for name, cell in zip(header[1:], row[1:], strict=True)} for row in body
    }


def table() -> str:
    """The table as Markdown, and below it the reasons by number."""
    found = {title: {name: try_method(family, name) for name in METHODS} for title, family in FAMILIES.items()}
    said = dict.fromkeys(shown(cell) for row in found.values() for cell in row.values())
    reasons = [cell for cell in said if cell not in ("yes", "adapters")]
    numbers = {reason: str(number) for number, reason in enumerate(reasons, 1)}
    lines = [["family", *METHODS], ["---"] * (len(METHODS) + 1)]
    lines += [[title, *(numbers.get(shown(cell), cell) for cell in row.values())] for title, row in found.items()]
    listed = "".join(f"{number}. {reason}\n" for reason, number in numbers.items())
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + "\n" + listed


def shown(cell: str) -> str:
    """The first clause of a reason, without the class of the network that it begins with."""
    return re.sub(r"^[A-Z]\w+ (?=has|cannot|did)", "the network ", re.split(r"[:;,(]", cell)[0]).strip()


@pytest.mark.parametrize("title", FAMILIES)
def test_the_table_says_what_happens(title):
    row = {name: shown(try_method(FAMILIES[title], name)) for name in METHODS}
    assert row == written()[title], "the table in docs/networks.md is stale: see the head of this file"


def test_the_table_has_every_family_and_method():
    assert list(written()) == list(FAMILIES)
    assert all(list(row) == list(METHODS) for row in written().values())


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    torch.set_num_threads(1)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2])
