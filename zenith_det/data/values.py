"""Numbers of an annotation file: each check returns the usable value, or says what is wrong with it."""

from __future__ import annotations

import math

from zenith_det.data.problems import Fault
from zenith_det.errors import quote

#: Ids must fit what COCO's evaluation and torch keep them in.
MAX_ID = 2**63 - 1
_FAR = 1e9  # pixels; a box at 1e200 would be infinite in single precision, and so would its area


def as_id(value: object) -> int | None:
    """A whole number that fits 64 bits, from an int or a float such as ``7.0``; None for anything else."""
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and -MAX_ID <= value <= MAX_ID else None


def check_side(value: object) -> int | None:
    """An image's height or width: a positive whole number; None for anything else."""
    side = as_id(value)
    return side if side is not None and side > 0 else None


def check_box(box: object, height: int, width: int) -> tuple[list[float], bool]:
    """An (x, y, width, height) box as floats, and whether it reaches more than a pixel out of the image.

    Raises:
        Fault: not four numbers, NaN or infinite, without area, or wholly outside the image.
    """
    try:
        if not isinstance(box, list):
            raise TypeError
        # The sum refuses text, which float() alone would read as a number.
        values = [float(value) for value in box if value + 0 is not None]
        x, y, w, h = values
    except (TypeError, ValueError, OverflowError):
        raise Fault("broken box", f"bbox is not four numbers: {quote(box)}") from None
    right, bottom = x + w, y + h
    if (
        w > 0
        and h > 0
        and right > 0
        and bottom > 0
        and x < width
        and y < height
        and x > -_FAR
        and y > -_FAR
        and right < _FAR
        and bottom < _FAR
    ):
        return values, x < -1 or y < -1 or right > width + 1 or bottom > height + 1
    if not all(map(math.isfinite, (x, y, right, bottom))):
        raise Fault("broken box", f"bbox {values} is not finite")
    if max(map(abs, (x, y, right, bottom))) >= _FAR:
        raise Fault("broken box", f"bbox {values} has numbers far outside any image")
    if w <= 0 or h <= 0:
        kind = "inverted box" if w < 0 or h < 0 else "box without area"
        raise Fault(kind, f"bbox {values} has width {w:g} and height {h:g}")
    raise Fault("box outside the image", f"bbox {values} lies outside the image of {width}x{height}")
