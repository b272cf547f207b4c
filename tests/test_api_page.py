"""docs/API.md is what the docstrings say, and has every public name."""

from __future__ import annotations

import runpy

import zenith_det
from tests.conftest import ROOT

MAKE = runpy.run_path(str(ROOT / "docs" / "make_api.py"))
PAGE = (ROOT / "docs" / "API.md").read_text(encoding="utf-8")


def test_the_page_is_up_to_date() -> None:
    assert MAKE["page"]() == PAGE, "run: python docs/make_api.py"


def test_every_public_name_is_on_it_with_words() -> None:
    sections = dict(part.split("\n", 1) for part in PAGE.split("\n### ")[1:])
    assert sections.keys() == set(zenith_det.__all__)
    for name, text in sections.items():
        prose = " ".join(text.partition("\n## ")[0].split("```")[::2])  # without the code
        assert len(prose.split()) > 6, f"{name}: no docstring"


def test_markup_becomes_markdown() -> None:
    text = "See :class:`~a.b.Name` and :func:`a.f`, ``x``::\n\nArgs:\n    lr, wd: one\n        two.\n\nAfter."
    assert MAKE["markdown"](text) == (
        "See `Name` and `a.f`, `x`:\n\n**Args**\n\n- `lr, wd`: one\n  two.\n\nAfter."
    )
