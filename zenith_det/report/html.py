"""Pages that hold all they need: one HTML file, no network, no script.

The templates beside this file escape what goes in, which is plain text, but for :class:`Html`.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from zenith_det import opencv as cv2
from zenith_det.files import write_whole
from zenith_det.report.figures import Picture
from zenith_det.report.pictures import ByteImage

#: Text that is HTML already.
Html = Markup


def _unbroken(value: object) -> object:
    """A number and its percent sign stay together."""
    return value if isinstance(value, Markup) else str(value).replace(" %", "\N{NO-BREAK SPACE}%")


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")), autoescape=True, trim_blocks=True,
    lstrip_blocks=True, undefined=StrictUndefined, finalize=_unbroken,
)  # fmt: skip
_PARTS: Any = _TEMPLATES.get_template("parts.html").module


@dataclass
class Page:
    """A page in the making.

    Attributes:
        title: of the page, and its heading.
        subtitle: a line below.
        lead_parts: what stands before the first section.
        sections: titles and parts.
    """

    title: str
    subtitle: str = ""
    lead_parts: list[Html] = field(default_factory=list)
    sections: list[tuple[str, list[Html]]] = field(default_factory=list)

    def lead(self, *parts: str) -> None:
        """Add to what stands before the first section."""
        self.lead_parts += map(_part, parts)

    def section(self, title: str, *parts: str) -> None:
        """Add a section; without parts there is none."""
        if kept := [_part(part) for part in parts if part]:
            self.sections.append((title, kept))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page, whole or not at all.

        Raises:
            UserError: it cannot be written.
        """
        return write_whole(path, _TEMPLATES.get_template("page.html").render(page=self))


def _part(part: str) -> Html:
    return part if isinstance(part, Html) else paragraph(part)


def paragraph(text: str, kind: str = "") -> Html:
    """A paragraph; ``kind`` is a CSS class."""
    return Html(_PARTS.paragraph(text, kind))


def heading(text: str) -> Html:
    """A heading within a section."""
    return Html(_PARTS.heading(text))


def verdict(lines: Sequence[str], *, warn: bool = False) -> Html:
    """What matters most, set off from the rest."""
    return Html(_PARTS.verdict(lines, warn))


def bullets(lines: Sequence[str]) -> Html:
    """A list; nothing for none."""
    return Html(_PARTS.bullets(lines) if lines else "")


def table(
    caption: str,
    header: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    text_columns: Sequence[int] = (0,),
    wrap_columns: Sequence[int] = (),
    marked: Sequence[int] = (),
    groups: Sequence[tuple[str, int]] = (),
    shades: Sequence[Sequence[float]] = (),
) -> Html:
    """A table that scrolls sideways where it is too wide; nothing without rows.

    Args:
        text_columns: set left, as words are; numbers are set right.
        wrap_columns: may break into lines.
        marked: rows with another background.
        groups: headings above the header, each with how many columns it stands over.
        shades: 0 to 1 for each cell, how dark it stands out.
    """
    return Html(
        _PARTS.table(caption, header, rows, text_columns, wrap_columns, marked, groups, shades)
        if rows
        else ""
    )


def figure(picture: Picture, caption: str = "", *, wide: bool = False) -> Html:
    """A drawing, sharp at any size."""
    return Html(_PARTS.figure(Html(picture.inline_svg()), caption, wide))


def photo(image: ByteImage, alt: str, caption: str = "", *, width: int = 420) -> Html:
    """A photograph, or a drawing on one, as JPEG.

    Args:
        image: BGR uint8 (H, W, 3).
        alt: what it shows, for who can't see it.
        width: pixels at most.
    """
    if image.shape[1] > width:
        height = max(1, round(image.shape[0] * width / image.shape[1]))
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    _, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 82])
    data = base64.b64encode(encoded.tobytes()).decode()
    return Html(_PARTS.figure(_PARTS.jpeg(data, alt, image.shape[1], image.shape[0]), caption, False))


def grid(parts: Sequence[str], kind: str = "grid") -> Html:
    """Parts beside one another, as many as there is room for; ``kind`` "cells" for small ones."""
    kept = [part for part in parts if part]
    return Html(_PARTS.grid(kept, kind) if kept else "")


def folded(title: str, content: str) -> Html:
    """Something long that opens on a click."""
    return Html(_PARTS.folded(title, _part(content)))


def code(text: str) -> Html:
    """Text as it stands in a file or a terminal."""
    return Html(_PARTS.code(text))


def legend(entries: Sequence[tuple[str, str, str]]) -> Html:
    """What colours and dashes stand for.

    Args:
        entries: (label, colour, SVG dash array, "" for a whole line).
    """
    return Html(_PARTS.legend(entries))
