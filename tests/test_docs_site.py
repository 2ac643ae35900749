"""`mkdocs build --strict` makes a site whose every link, anchor and image exists."""

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent


class Page(HTMLParser):
    """The links, the anchors and the text of a page."""

    def __init__(self, file: Path):
        super().__init__()
        self.links, self.anchors, self.text = [], set(), ""
        self.feed(file.read_text())

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.links += [values[name] for name in ("href", "src") if values.get(name)]
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {file.resolve(): Page(file) for file in folder.rglob("*.html") if file.name != "404.html"}


@pytest.mark.libraries
def test_every_link_of_the_site_exists(site):
    checked = 0
    for file, page in site.items():
        for link in map(urlsplit, page.links):
            if link.scheme or link.netloc:
                continue
            target = (file.parent / unquote(link.path)).resolve() if link.path else file
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{file} links to {link.geturl()}"
            if link.fragment and target in site:
                assert unquote(link.fragment) in site[target].anchors, f"{file} links to {link.geturl()}"
            checked += 1
    assert checked > 1000


@pytest.mark.libraries
@pytest.mark.parametrize(
    "path, text",
    [
        ("index.html", "fastkd trains a small image classifier from a big one"),  # README.md
        ("source/fastkd/train.py/index.html", "class Trainer:"),
        ("source/fastkd/recipes/index.html", "digits.yaml"),  # a folder
        ("source/bench/results/cpu/2026-11-29-checkpoint-cost.txt/index.html", "ms"),
    ],
)
def test_pages_show_the_files_of_the_repository(site, path, text):
    root = min(site, key=lambda file: len(file.parts)).parent
    assert text in " ".join(site[root / path].text.split())
