"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_python_snippets(tiny_net, tiny_loaders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_loader, val_loader = tiny_loaders()
    images, target = next(iter(train_loader))
    names = {"student": tiny_net(0), "teacher": tiny_net(1), "images": images, "target": target}
    names |= {"train_loader": train_loader, "val_loader": val_loader}
    snippets = re.findall(r"```python\n(.*?)```", README, re.S)
    for snippet in snippets:
        exec(snippet, names)
    assert len(snippets) == 2
    assert torch.is_tensor(names["loss"]) and names["result"].student.exists()


@pytest.mark.parametrize("line", re.findall(r"^fastkd train .*?[^\\]$", README, re.S | re.M))
def test_train_lines_parse(fastkd, line):
    arguments = line.partition("#")[0].replace("\\\n", " ").split()[1:]
    if "--resume" in arguments:  # of a run that is not here
        arguments.remove("--resume")
    assert fastkd(*arguments, "--print-config")[0] == 0


def test_named_files_exist():
    root = Path(__file__).parent.parent
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(links) >= 4
    for link in links:
        assert (root / link).exists(), link
