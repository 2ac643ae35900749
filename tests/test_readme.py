"""README and docs: snippets run or compile, commands parse, links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = ["README.md", "CONTRIBUTING.md", *(str(page.relative_to(ROOT)) for page in sorted(ROOT.glob("docs/*.md")))]


def snippets(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.S)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)", text, re.M)}


def train_commands() -> list[str]:
    text = "\n".join((ROOT / page).read_text() for page in PAGES)
    return sorted({line for line in re.findall(r"^fastkd train .*?[^\\]$", text, re.S | re.M) if "--help" not in line})


def test_python_snippets(tiny_net, tiny_loaders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_loader, val_loader = tiny_loaders()
    images, target = next(iter(train_loader))
    names = {"student": tiny_net(0), "teacher": tiny_net(1), "images": images, "target": target}
    names |= {"train_loader": train_loader, "val_loader": val_loader}
    for snippet in snippets(README):
        exec(snippet, names)
    assert len(snippets(README)) == 2
    assert torch.is_tensor(names["loss"]) and names["result"].student.exists()


def test_readme_is_short():
    assert len(README.split()) <= 1200
    assert README.lower().count("not measured yet") <= 2


@pytest.mark.parametrize("page", PAGES)
def test_python_snippets_compile(page):
    for number, snippet in enumerate(snippets((ROOT / page).read_text())):
        compile(snippet, f"{page}, snippet {number}", "exec")


@pytest.mark.parametrize("line", train_commands())
def test_train_lines_parse(fastkd, line):
    arguments = line.partition("#")[0].replace("\\\n", " ").split()[1:]
    if "--resume" in arguments:  # of a run that is not here
        arguments.remove("--resume")
    assert fastkd(*arguments, "--print-config")[0] == 0


@pytest.mark.parametrize("page", PAGES)
def test_links_exist(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target.read_text()), f"{page}: {link}"
