"""The documentation is true: snippets run, commands parse, links and named scripts exist."""

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch

from fastkd import losses
from fastkd.curves import NOT_TERMS, SCORES

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
LINKED = [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md", "kernels/README.md"]


@cache
def text(page: str) -> str:
    return (ROOT / page).read_text()


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text(page), re.S)


def anchors(page: Path) -> list[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)])
def test_python_snippets(page, tiny_net, tiny_loaders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_loader, val_loader = tiny_loaders()
    images, target = next(iter(train_loader))
    names = {"student": tiny_net(0), "teacher": tiny_net(1), "images": images, "target": target}
    names |= {"train_loader": train_loader, "val_loader": val_loader}
    for snippet in snippets(page):
        exec(snippet, names)
    assert "loss" not in names or torch.is_tensor(names["loss"])
    assert "result" not in names or names["result"].student.exists()


def test_the_pages_show_code():
    assert sum(len(snippets(page)) for page in PAGES) >= 4
    assert len(text("README.md").split()) <= 1200
    assert text("README.md").lower().count("not measured yet") <= 2


def commands() -> list[str]:
    found = [re.findall(r"^fastkd train .*?[^\\]$", text(page), re.S | re.M) for page in PAGES]
    return sorted({line for lines in found for line in lines})


@pytest.mark.parametrize("line", commands())
def test_train_lines_parse(fastkd, line):
    arguments = line.partition("#")[0].replace("\\\n", " ").split()[1:]
    for option in ("--resume", "--extend"):  # the folder of that run does not exist here
        arguments = [each for each in arguments if each != option]
    assert fastkd(*arguments, "--print-config")[0] == 0


def loops() -> list[str]:
    """The lines with which a block of code in bash calls fastkd train within a loop, as bash expands them."""
    blocks = [block for page in PAGES for block in re.findall(r"```bash\n(.*?)```", text(page), re.S)]
    calls = 'fastkd() { echo "$@"; }\n'
    run = [subprocess.check_output(["bash", "-ec", calls + each], text=True) for each in blocks if "\ndone" in each]
    return "".join(run).splitlines()


def test_lines_in_loops_parse_and_have_folders_of_their_own(fastkd):
    lines = [line.split() for line in loops()]
    assert len(lines) > 3 and len({words[words.index("--out") + 1] for words in lines}) == len(lines)
    for words in lines:
        assert words[0] == "train" and fastkd(*words, "--print-config")[0] == 0


def other_commands() -> list[tuple[str, ...]]:
    """(command, options ...) of the lines in blocks of code that call another command than train."""
    found = set()
    for page in PAGES:
        blocks = re.findall(r"```bash\n(.*?)```|((?:^ {4}[^\n]*\n)+)", text(page), re.S | re.M)
        for line in "\n".join("".join(pair) for pair in blocks).replace("\\\n", " ").splitlines():
            words = line.partition("#")[0].split()
            if words[:1] == ["fastkd"] and words[1] != "train":
                chosen = words[2:3] if words[1] == "bench" else []
                found.add((words[1], *chosen, *(word for word in words if word.startswith("--"))))
    return sorted(found)


@pytest.mark.parametrize("words", other_commands(), ids=" ".join)
def test_other_lines_name_options_that_exist(fastkd, words):
    status, text, _ = fastkd(*(word for word in words if not word.startswith("--")), "--help")
    assert status == 0
    if "options are those of `fastkd train`" in text:
        text += fastkd("train", "--help")[1]
    assert {word for word in words if word.startswith("--")} <= set(re.findall(r"--[a-z-]+", text))


@pytest.mark.parametrize("page", LINKED)
def test_links_exist(page):
    for link in re.findall(r"\]\(([^)]+)\)", text(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_page_on_losses_has_every_option_and_says_where_the_cross_entropy_is():
    rows = [
        [cell.strip() for cell in row.split("|")[1:-1]] for row in re.findall(r"^\|.*\|$", text("docs/losses.md"), re.M)
    ]
    options = {row[0]: row[1].strip("`") for row in rows if len(row) == 2}
    has_labels = {name: row[2] for row in rows if len(row) == 4 for name in re.findall(r"`(\w+)`", row[0])}
    for name in (name for name in losses.__all__ if name.endswith("Loss")):
        kind = getattr(losses, name)
        assert repr(kind()) == f"{name}({options[f'`{name}`']})"
        assert has_labels[name].startswith("yes" if "label_smoothing" in kind.__match_args__ else "**no**")


def test_the_page_on_methods_has_the_names_that_a_loss_term_cannot_have():
    (reserved,) = re.findall(r"cannot be terms: (.*?)\n\n", text("docs/method-protocol.md"), re.S)
    assert re.findall(r"`(\w+)`", reserved) == [*NOT_TERMS, *SCORES]


@pytest.mark.parametrize("page", PAGES)
def test_named_scripts_exist(page):
    for script in re.findall(r"\b(?:bench|kernels|fastkd|tests|examples)/[\w/]+\.(?:py|md)\b", text(page)):
        assert (ROOT / script).exists(), script
