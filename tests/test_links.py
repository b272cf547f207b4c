"""The documents' links lead somewhere: between the Markdown files, and in the site made of them."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from markdown import Markdown

from tests.conftest import ROOT

SITE_PAGES = runpy.run_path(str(ROOT / "docs" / "site_pages.py"))
DOCUMENTS = SITE_PAGES["documents"]()


class Page(HTMLParser):
    """The links (``href``, ``src``) and anchors (``id``, ``<a name>``) of one page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif value and (name == "id" or (tag, name) == ("a", "name")):
                self.anchors.add(value)


def read(path: Path) -> Page:
    """A page as HTML has it, or as a code-hosting page shows Markdown."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        extensions = ["fenced_code", "tables", "toc"]
        settings = {"toc": {"slugify": SITE_PAGES["slug"]}}
        text = Markdown(extensions=extensions, extension_configs=settings).convert(text)
    return Page(text)


def broken_links(path: Path, index: str = "") -> list[str]:
    """The relative links of a page that lead to no file or to no anchor; ``index``: a folder's own page."""
    found = []
    for link in read(path).links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = path.parent / unquote(parts.path) if parts.path else path
        if index and target.is_dir():
            target = target / index
        anchor = unquote(parts.fragment)
        if not target.exists() or (anchor and anchor not in read(target).anchors):
            found.append(link)
    return found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document_has_no_broken_link(document: str) -> None:
    assert broken_links(ROOT / document) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "other.md").write_text("## Bits & `pieces`, of it\n", encoding="utf-8")
    (tmp_path / "page.md").write_text(
        "# Top\n\n[a](sub/other.md) [b](sub/other.md#bits--pieces-of-it) [c](#top) [d](https://example.org/x)\n\n"
        "[e](sub)\n\n"
        "![f](missing.png) [g](sub/missing.md) [h](sub/other.md#bits) [i](#bottom)\n\n    [j](in/code.md)\n",
        encoding="utf-8",
    )
    assert broken_links(tmp_path / "page.md") == [
        "missing.png",
        "sub/missing.md",
        "sub/other.md#bits",
        "#bottom",
    ]


def test_every_markdown_file_is_looked_at() -> None:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: the list of its files is git's")
    assert set(listed.stdout.split()) <= set(DOCUMENTS)


def test_every_document_has_a_place_in_the_site() -> None:
    entries = [yaml.safe_load((ROOT / "properdocs.yml").read_text(encoding="utf-8"))["nav"]]
    pages = []
    while entries:
        entry = entries.pop()
        if isinstance(entry, str):
            pages.append(entry)
        else:
            entries += entry.values() if isinstance(entry, dict) else entry
    assert sorted(pages) == DOCUMENTS, "the menu (nav) of properdocs.yml"


def test_the_site_builds_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    pytest.importorskip("properdocs", reason="needs ProperDocs: pip install -e '.[docs]'")
    command = [
        sys.executable,
        "-m",
        "properdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path),
    ]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > len(DOCUMENTS)
    # 404.html and the search page are the theme's, with addresses from the server's top.
    broken = {str(page): broken_links(page, "index.html") for page in pages if page.parent != tmp_path}
    broken["index"] = broken_links(tmp_path / "index.html", "index.html")
    assert not {page: links for page, links in broken.items() if links}
    # What is no Markdown has a page, too: a folder, a program.
    before = (tmp_path / "docs" / "DETECTRON2" / "index.html").read_text(encoding="utf-8")
    assert 'href="../../examples/existing_project/own_optimizer.py/"' in before
    shown = tmp_path / "examples" / "pytorch_loop" / "train_spirals.py" / "index.html"
    assert "ZENITH(" in shown.read_text(encoding="utf-8")
    assert os.path.isfile(tmp_path / "docs" / "images" / "curves.png")
