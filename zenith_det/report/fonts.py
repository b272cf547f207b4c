"""Letters for pictures: matplotlib's DejaVu Sans, and where that lacks them a font of the machine that has them.

DejaVu comes with matplotlib, so it is always there, and knows Latin, Greek, Cyrillic, Arabic and more, but neither
Chinese, Japanese and Korean nor the scripts of India.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from pathlib import Path

import matplotlib
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from PIL import ImageDraw, ImageFont

from zenith_det.errors import one_line

logger = logging.getLogger(__name__)

#: Of the name of a font file: shapes instead of letters, or none at all.
_NO_LETTERS = ("lastresort", "adobeblank", "notdef", "tofu")
#: What sets plain labels best, by a font file's name; the first that fits counts.
_PREFERRED = ("sans", "gothic", "hei", "yahei", "pingfang", "mangal", "nirmala")
_LESS_LIKED = ("serif", "mono", "italic", "oblique", "bold", "black", "light", "thin", "emoji", "unifont")


@cache
def _dejavu(bold: bool) -> str:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return os.path.join(matplotlib.get_data_path(), "fonts", "ttf", name)


@lru_cache(maxsize=512)
def _letters_of(path: str) -> frozenset[int]:
    """The characters that a font has; none where it can't be read."""
    try:
        return frozenset(FT2Font(path).get_charmap())
    except (RuntimeError, OSError, ValueError):
        return frozenset()


@cache
def _installed() -> tuple[str, ...]:
    """The machine's font files, those that suit labels first."""

    def rank(path: str) -> tuple[bool, int, str]:
        name = Path(path).stem.lower()
        return not any(word in name for word in _PREFERRED), sum(word in name for word in _LESS_LIKED), path

    found = font_manager.findSystemFonts()
    return tuple(
        sorted((p for p in found if not any(word in Path(p).stem.lower() for word in _NO_LETTERS)), key=rank)
    )


def _needed(text: str) -> frozenset[int]:
    """What a font must have to set a text: neither blanks nor marks that only join letters."""
    return frozenset(
        ord(c)
        for c in text
        if unicodedata.category(c) not in ("Cf", "Cc", "Zs") and not 0xFE00 <= ord(c) <= 0xFE0F
    )


@lru_cache(maxsize=4096)
def _font_for(letters: frozenset[int], bold: bool = False) -> str | None:
    """The file of a font that has all these letters; ``None`` where there is none."""
    if letters <= _letters_of(_dejavu(bold)):
        return _dejavu(bold)
    return next((path for path in _installed() if letters <= _letters_of(path)), None)


@lru_cache(maxsize=4096)
def _parts(text: str, bold: bool) -> tuple[tuple[str, str], ...] | None:
    """A text in parts of one font each, (part, font file); ``None`` where some letter is in no font.

    Words of one script stay whole, as letters join; blanks go with what is before them.
    """
    whole = _font_for(_needed(text), bold)
    if whole is not None:
        return ((text, whole),)
    parts: list[tuple[str, str]] = []
    for c in text:
        needed = _needed(c)
        if parts and (
            not needed
            or (unicodedata.category(c)[0] == "M" and needed <= _letters_of(parts[-1][1]))
            or (parts[-1][1] != _dejavu(bold) and c.isalpha() and needed <= _letters_of(parts[-1][1]))
        ):
            parts[-1] = (parts[-1][0] + c, parts[-1][1])
            continue
        font = _font_for(needed, bold)
        if font is None:
            return None
        if parts and parts[-1][1] == font:
            parts[-1] = (parts[-1][0] + c, font)
        else:
            parts.append((c, font))
    return tuple(parts)


def drawable(text: str) -> bool:
    """Whether fonts of this machine have all its letters."""
    return _parts(text, False) is not None


_told: set[str] = set()


def tell_undrawable(texts: Iterable[str], instead: str) -> None:
    """Warn, once a text, of what no font of this machine can set.

    Args:
        texts: those to be drawn; nothing is said of those that can be.
        instead: what is drawn in their place: ``"their numbers"``.
    """
    new = [text for text in dict.fromkeys(texts) if text not in _told and not drawable(text)]
    if new:
        _told.update(new)
        listed = one_line(", ".join(new[:5]), 200) + (f" and {len(new) - 5} more" if len(new) > 5 else "")
        logger.warning(
            "no font of this machine has the letters of %s: pictures show %s; install one that has them, such as Noto "
            "Sans (on Debian and Ubuntu fonts-noto-cjk for Chinese, Japanese and Korean, fonts-noto-core for others)",
            listed,
            instead,
        )


def _families(text: str) -> list[str]:
    """matplotlib's ``font.family`` for a text: DejaVu Sans, then fonts that have what it lacks."""
    others = [_registered(path) for _, path in _parts(text, False) or () if path != _dejavu(False)]
    return ["DejaVu Sans", *dict.fromkeys(others)]


@contextlib.contextmanager
def fitting_fonts(figure: Figure) -> Iterator[None]:
    """Around the saving of a drawing: each of its texts is set in fonts that have its letters.

    What no font has is told, and drawn as boxes; an SVG's reader may have a font for it.
    """
    texts = figure.findobj(Text)
    for axes in figure.axes:
        texts += [*axes.get_xticklabels(), *axes.get_yticklabels()]
    for text in texts:
        if not _needed(text.get_text()) <= _letters_of(_dejavu(False)):
            text.set(fontfamily=_families(text.get_text()), fontweight="normal")
    tell_undrawable((text.get_text() for text in texts), "boxes")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from")  # told by the line above
        yield


@cache
def _registered(path: str) -> str:
    """The name under which matplotlib knows a font file."""
    font_manager.fontManager.addfont(path)
    return str(font_manager.get_font(path).family_name)


@lru_cache(maxsize=64)
def _opened(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


class Lettering:
    """Draws text of one size, each letter in a font that has it; what none has is a box.

    Args:
        size: pixels.
        bold: where DejaVu has the letters.
    """

    def __init__(self, size: int, bold: bool = False) -> None:
        self.size, self.bold = size, bold
        self.ascent, self.descent = self._font(_dejavu(bold)).getmetrics()

    def _font(self, path: str) -> ImageFont.FreeTypeFont:
        return _opened(path, self.size)

    def _fonts(self, text: str) -> list[tuple[str, ImageFont.FreeTypeFont]]:
        parts = _parts(text, self.bold) or ((text, _dejavu(self.bold)),)
        return [(part, self._font(path)) for part, path in parts]

    def width(self, text: str) -> int:
        """Pixels, rounded up."""
        return math.ceil(sum(font.getlength(part) for part, font in self._fonts(text)))

    def shortened(self, text: str, width: int) -> str:
        """A text no wider than ``width`` pixels, its beginning cut off where need be: names differ at their ends."""
        if self.width(text) <= width:
            return text
        while text and self.width(f"…{text}") > width:
            text = text[1:]
        return f"…{text}"

    def height(self, text: str) -> int:
        """Pixels of a line: of the tallest font in it."""
        return self.ascent_of(text) + max([self.descent, *(f.getmetrics()[1] for _, f in self._fonts(text))])

    def ascent_of(self, text: str) -> int:
        """Pixels from a line's top to its baseline."""
        return max([self.ascent, *(font.getmetrics()[0] for _, font in self._fonts(text))])

    def draw(
        self, pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, color: tuple[int, ...]
    ) -> None:
        """Write a line, its upper left corner at ``at``."""
        left, baseline = at[0], at[1] + self.ascent_of(text)
        for part, font in self._fonts(text):
            pen.text((left, baseline), part, color, font, anchor="ls")
            left += font.getlength(part)
