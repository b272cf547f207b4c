"""ProperDocs' hooks (properdocs.yml): the site's pages are the repository's Markdown files, at the same paths.

So a relative link between two of them is right on a code-hosting page and in the site. A link to a folder or to a file
that is no Markdown gets a page that shows it.
"""

from __future__ import annotations

import json
import posixpath
import re
import unicodedata
from pathlib import Path
from textwrap import indent
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
IMAGES = (".png", ".jpg", ".svg", ".gif")
# [text](target#anchor), without those that begin with a scheme.
LINK = re.compile(r"\]\((?![a-z]+:)([^)#\s]+)(#[^)\s]*)?\)")


def documents() -> list[str]:
    """The repository's Markdown files, as paths from its top."""
    patterns = ("*.md", "docs/**/*.md", "datasets/*.md", "examples/*/*.md")
    return sorted(path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern))


def slug(heading: str, separator: str = "-") -> str:
    """A heading's anchor, as code-hosting pages make it."""
    kept = (
        c
        for c in heading.lower()
        if c in " -" or unicodedata.category(c)[0] in "LM" or c.isdecimal() or c == "_"
    )
    return "".join(kept).replace(" ", separator)


def target(page: str, link: str) -> str:
    """The path from the repository's top that a relative link on a page is to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def shown_as(path: str) -> str:
    """The site's page or image for a path of the repository."""
    if (ROOT / path / "README.md").is_file():
        return f"{path}/README.md"
    if (ROOT / path).is_dir():
        return f"{path}/index.md"
    if (ROOT / path).is_file() and not path.endswith((".md", ".js", *IMAGES)):
        return f"{path}.md"
    return path


def made_page(path: str) -> str:
    """The Markdown of a page that shows a folder or a file."""
    if (ROOT / path).is_dir():
        files = sorted(file.name for file in (ROOT / path).iterdir() if file.is_file())
        return f"# {path}\n\n" + "".join(f"- [{name}]({name})\n" for name in files)
    text = (ROOT / path).read_text(encoding="utf-8")
    if not path.endswith(".ipynb"):
        return f"# {path}\n\n{indent(text, '    ')}"
    cells = [("".join(cell["source"]), cell["cell_type"]) for cell in json.loads(text)["cells"]]
    return "\n\n".join(source if kind == "markdown" else indent(source, "    ") for source, kind in cells)


def on_config(config: Any) -> Any:
    config.mdx_configs["toc"] = {"slugify": slug}
    return config


def on_files(files: Any, config: Any) -> Any:
    """The theme's files, the documents, and what they show or link to."""
    from properdocs.structure.files import File, InclusionLevel

    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for path in [*documents(), "docs/mathjax.js", "docs/site.css"]:
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    pages = [(path, (ROOT / path).read_text(encoding="utf-8")) for path in documents()]
    for page, text in pages:  # grows on the way: a folder's page links to its files
        for link, _ in LINK.findall(text):
            path = target(page, link)
            place = shown_as(path)
            if files.get_file_from_path(place) or not (ROOT / path).exists():
                continue
            if place == path:
                files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
            else:
                made = made_page(path)
                files.append(File.generated(config, place, content=made, inclusion=InclusionLevel.NOT_IN_NAV))
                pages.append((place, made))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to what has a page of its own, and formulas as MathJax wants them."""
    here = page.file.src_uri

    def to_page(match: re.Match[str]) -> str:
        path = target(here, match[1])
        place = shown_as(path)
        if place == path:
            return match[0]
        return f"]({posixpath.relpath(place, posixpath.dirname(here) or '.')}{match[2] or ''})"

    markdown = re.sub(r"^```math\n(.*?)^```$", r"<div>\\[\n\1\\]</div>", markdown, flags=re.M | re.S)
    return LINK.sub(to_page, markdown)
