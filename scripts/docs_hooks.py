"""mkdocs.yml calls these hooks. They make every link of the documentation work on the site.

Pages link to files of the repository by relative paths, such as ../fastkd/train.py. Those files become pages below
source/: code is shown as code, a folder as the list of its files. So the site needs no repository host.
README.md is the first page. The links are rewritten when a page is read; the files in docs/ stay as GitHub shows them.
"""

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}  # what has a page of its own outside of docs/
IMAGES = (".png", ".svg", ".jpg")
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
CODE = re.compile(r"^(```|~~~).*?^\1", re.S | re.M)
NO_SEARCH = "---\nsearch:\n  exclude: true\n---\n\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README.md, CHANGELOG.md, and each file that a page links to, directly or through another one."""
    waiting = [*PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    known = set(waiting)
    for path in waiting:  # grows
        if not path.startswith("docs/"):
            files.append(_file(path, config))
        new = [target for target in dict.fromkeys(_targets(path, _markdown(path))) if target not in known]
        waiting += [target for target in new if not target.startswith("docs/")]
        known.update(new)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with links to the site's pages in place of the repository's paths."""
    path = _repository_path(page.file.src_uri)
    folder = PurePosixPath(page.file.src_uri).parent

    def rewritten(match: re.Match[str]) -> str:
        target = _resolve(path, match[2])
        return match[0] if target is None else match[1] + os.path.relpath(_place(target), folder) + match[3]

    parts = _parts(markdown)
    return "".join(text if is_code else LINK.sub(rewritten, text) for text, is_code in parts)


def _place(path: str) -> str:
    """Where the site has a file of the repository, as mkdocs' source path."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}" + ("" if path.endswith((".md", *IMAGES)) else ".md")


def _repository_path(place: str) -> str:
    """The inverse of `_place`."""
    for path, own in PAGES.items():
        if own == place:
            return path
    if not place.startswith("source/"):
        return f"docs/{place}"
    path = place.removeprefix("source/")
    return path if (ROOT / path).exists() else path.removesuffix(".md")


def _file(path: str, config: MkDocsConfig) -> File:
    """The site's file for a file or a folder of the repository."""
    if path.endswith(IMAGES):
        return File.generated(config, _place(path), abs_src_path=str(ROOT / path))
    note = "" if path in PAGES else NO_SEARCH
    return File.generated(config, _place(path), content=note + _markdown(path))


def _markdown(path: str) -> str:
    """A file of the repository as Markdown. Of a folder it is the list of its files; an image has none."""
    source = ROOT / path
    if path.endswith(IMAGES):
        return ""
    if source.is_dir():
        names = sorted(each.name for each in source.iterdir() if each.is_file() and each.suffix != ".pyc")
        return f"# `{path}/`\n\n" + "".join(f"- [`{name}`]({source.name}/{name})\n" for name in names)
    text = source.read_text()
    if path.endswith(".md"):
        return text
    return f"# `{path}`\n\n~~~~{source.suffix[1:]}\n{text.rstrip()}\n~~~~\n"


def _parts(markdown: str) -> list[tuple[str, bool]]:
    """The text in pieces, and whether each is a block of code."""
    pieces, end = [], 0
    for block in CODE.finditer(markdown):
        pieces += [(markdown[end : block.start()], False), (block[0], True)]
        end = block.end()
    return [*pieces, (markdown[end:], False)]


def _targets(path: str, markdown: str) -> list[str]:
    """The files and folders of the repository that the text links to, as paths from its root."""
    links = [match[2] for text, is_code in _parts(markdown) if not is_code for match in LINK.finditer(text)]
    return [target for link in links if (target := _resolve(path, link))]


def _resolve(path: str, link: str) -> str | None:
    """The path from the repository's root that a link in the file `path` means; None for an address."""
    if ":" in link:
        return None
    return os.path.normpath(os.path.join(os.path.dirname(path), link))
