"""Names in scripts that DejaVu lacks are drawn where a font has them, and told where none has."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib.tables._g_l_y_f import Glyph
from matplotlib import font_manager

from zenith_det.data import DatasetMetadata
from zenith_det.report import fonts
from zenith_det.report.curves import plot_curves
from zenith_det.report.pictures import draw_instances

CELL = "细胞"


def make_font(path: Path, letters: str) -> str:
    """A font of black squares for these letters."""

    def square() -> Glyph:
        pen = TTGlyphPen(None)
        pen.moveTo((100, 0))
        for point in ((100, 800), (900, 800), (900, 0)):
            pen.lineTo(point)
        pen.closePath()
        return pen.glyph()

    names = {ord(letter): f"uni{ord(letter):04X}" for letter in letters}
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", *names.values()])
    builder.setupCharacterMap(names)
    builder.setupGlyf({name: square() for name in [".notdef", *names.values()]})
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", *names.values()], (1000, 100)))
    builder.setupHorizontalHeader(ascent=900, descent=-200)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=900, usWinAscent=900, usWinDescent=200)
    builder.setupPost()
    builder.save(path)
    return str(path)


@pytest.fixture(params=[True, False], ids=["a font has it", "no font has it"])
def installed(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[bool]:
    """Whether the machine's only font has Chinese letters."""
    path = make_font(tmp_path / "squares.ttf", CELL if request.param else "Ж")

    def forget() -> None:
        for cached in (fonts._installed, fonts._font_for, fonts._parts):
            cached.cache_clear()
        fonts._told.clear()

    monkeypatch.setattr(font_manager, "findSystemFonts", lambda *args, **kwargs: [path])
    forget()
    yield request.param
    forget()


def test_labels(installed: bool, caplog: pytest.LogCaptureFixture) -> None:
    metadata = DatasetMetadata("", "", "", (f"RBC {CELL}", "wbc"), {0: 0, 1: 1})
    image = np.full((60, 640, 3), 128, np.uint8)

    def drawn(names: tuple[str, str]) -> np.ndarray:
        other = DatasetMetadata("", "", "", names, {0: 0, 1: 1})
        return draw_instances(image, [[10, 30, 200, 50]], [0], metadata=other)

    with caplog.at_level(logging.WARNING):
        labelled = [draw_instances(image, [[10, 30, 200, 50]], [0], metadata=metadata) for _ in range(2)]
    assert np.array_equal(*labelled)
    by_number = drawn(("class 0", "wbc"))
    if installed:
        assert caplog.messages == []
        assert not np.array_equal(labelled[0], by_number)
        # Two squares, each of 80 % of a letter's height and width, in white on the label.
        white = (labelled[0] > 200).all(axis=2).sum() - (drawn(("RBC ", "wbc")) > 200).all(axis=2).sum()
        assert white > 2 * (0.6 * 14) ** 2
    else:
        [told] = caplog.messages  # once, not once an image
        assert f"RBC {CELL}" in told
        assert "wbc" not in told
        assert "fonts-noto-cjk" in told
        assert np.array_equal(labelled[0], by_number)


def test_curves(
    installed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    folder = tmp_path / CELL
    folder.mkdir()
    (folder / "metrics.json").write_text('{"iteration": 0, "total_loss": 1.5, "lr": 0.1}\n')
    with caplog.at_level(logging.WARNING):
        assert plot_curves(folder).exists()
    assert len(caplog.messages) == (0 if installed else 1)
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


def test_words_of_one_script_stay_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    if not installed:
        assert fonts._parts(f"a {CELL} b", False) is None
        return
    parts = fonts._parts(f"a {CELL} b", False)
    assert parts is not None
    assert [part for part, _ in parts] == ["a ", f"{CELL} ", "b"]
    assert "".join(part for part, _ in parts) == f"a {CELL} b"
