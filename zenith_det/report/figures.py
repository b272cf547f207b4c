"""Drawings for pages: SVG that takes the page's text colour, and the same as PNG."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from zenith_det.report.curves import BLACK, line_style
from zenith_det.report.fonts import fitting_fonts

#: What is drawn in this colour is drawn in the page's text colour, light or dark.
INK = BLACK
_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.6,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": "#8a8a8a",
    "grid.alpha": 0.28,
    "grid.linewidth": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",  # text stays text: it can be searched and read aloud
    "svg.hashsalt": "zenith_det",  # the same drawing, the same bytes
}
_DPI = 150


@dataclass(frozen=True)
class Picture:
    """A drawing.

    Attributes:
        name: of its files, without an ending.
        alt: what it shows, for who can't see it.
        svg: an ``<svg>`` element.
    """

    name: str
    alt: str
    svg: str
    _figure: Figure = field(repr=False, compare=False)

    @cached_property
    def png(self) -> bytes:
        """The same on white; drawn when it is asked for, as pages need none."""
        pixels = io.BytesIO()
        with matplotlib.rc_context(_STYLE), fitting_fonts(self._figure):
            self._figure.savefig(pixels, format="png", facecolor="white")
        return pixels.getvalue()

    def inline_svg(self) -> str:
        """The element for a page: its ids are its own there, and it has a name."""
        ids = re.sub(r'\bid="', f'id="{self.name}-', self.svg)
        ids = re.sub(r"url\(#", f"url(#{self.name}-", ids)
        ids = re.sub(r'href="#', f'href="#{self.name}-', ids)
        label = html.escape(self.alt, quote=True)
        return ids.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def draw(
    name: str, alt: str, paint: Callable[[Figure], None], width: float = 5.2, height: float = 3.3
) -> Picture:
    """Draw a picture.

    Args:
        name: of its files; letters, digits, ``_`` and ``-``.
        alt: what it shows.
        paint: puts axes on the figure and draws.
        width: inches, 72 points each.
        height: likewise.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
        FigureCanvasAgg(figure)
        paint(figure)
        text = io.StringIO()
        with fitting_fonts(figure):
            figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return Picture(name, alt, _element(text.getvalue()), figure)


def _element(document: str) -> str:
    """The ``<svg>`` element alone, of the page's text colour, as wide as the page lets it be."""
    svg = document[document.index("<svg ") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = svg.replace(INK, "currentColor")
    # What has no colour of its own is black in SVG.
    svg = re.sub(r"<text\b(?![^>]*fill)", '<text fill="currentColor"', svg)
    return re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)


def svg_dashes(index: int) -> str:
    """The dashes of :func:`~zenith_det.report.curves.line_style` as SVG writes them, for a line 3 wide."""
    _, dashes = line_style(index)
    return "" if dashes == "-" else " ".join(f"{3 * part:g}" for part in dashes[1])
