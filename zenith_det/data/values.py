"""Numbers of an annotation file: each check returns the usable value, or says what is wrong with it."""

from __future__ import annotations

import math
import re

from zenith_det.data.problems import Fault
from zenith_det.errors import quote

#: Ids must fit what COCO's evaluation and torch keep them in.
MAX_ID = 2**63 - 1
_FAR = 1e9  # pixels; a box at 1e200 would be infinite in single precision, and so would its area
# What exporters write for a number; float() alone would also read "nan", "1_000" and other scripts' digits.
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
_LONGEST_NUMBER = 60  # characters
_TRUE_OR_FALSE = {"true": 1, "yes": 1, "false": 0, "no": 0, "": 0}


def number_in(value: object) -> int | float | None:
    """A number, also one that is written as text; None for anything else, true and false among it."""
    if type(value) in (int, float):
        return value  # type: ignore[return-value]
    if isinstance(value, str) and len(value) <= _LONGEST_NUMBER and _NUMBER.fullmatch(value):
        return int(value) if value.strip().lstrip("+-").isdigit() else float(value)
    return None


def as_id(value: object) -> int | None:
    """A whole number that fits 64 bits, from an int, a float such as ``7.0`` or a text such as ``"7"``."""
    if type(value) is not int:
        value = number_in(value)
        if type(value) is float and value.is_integer():
            value = int(value)
    return value if type(value) is int and -MAX_ID <= value <= MAX_ID else None


def as_flag(value: object) -> int | None:
    """0 or 1, from a number, a text of one, or true and false; 0 for null; None for anything else."""
    if value is None:
        return 0
    if isinstance(value, str):
        value = _TRUE_OR_FALSE.get(value.strip().lower(), number_in(value))
    return int(value) if isinstance(value, int | float) and value in (0, 1) else None


def check_side(value: object) -> int | None:
    """An image's height or width: a positive whole number; None for anything else."""
    side = as_id(value)
    return side if side is not None and side > 0 else None


# The corners, or a corner and the sides, as tools that write objects in place of COCO's list name them.
_X, _Y = ("x", "left", "x_min", "xmin", "x1"), ("y", "top", "y_min", "ymin", "y1")
_WIDTH, _HEIGHT = ("width", "w"), ("height", "h")
_RIGHT, _BOTTOM = ("right", "x_max", "xmax", "x2"), ("bottom", "y_max", "ymax", "y2")


def box_in(value: object) -> object:
    """A box in COCO's form from other forms that leave no doubt: texts, an object with names, a list in a list."""
    if isinstance(value, str) and len(value) <= 5 * _LONGEST_NUMBER:
        value = [part for part in re.split(r"[\s,;]+", value.strip().strip("[]()").strip()) if part]
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]
    if isinstance(value, dict):
        named = [
            next((number_in(value[key]) for key in keys if key in value), None)
            for keys in (_X, _Y, _WIDTH, _HEIGHT, _RIGHT, _BOTTOM)
        ]
        x, y, width, height, right, bottom = named
        if x is None or y is None:
            return value
        width = right - x if width is None and right is not None else width
        height = bottom - y if height is None and bottom is not None else height
        return [x, y, width, height] if width is not None and height is not None else value
    if isinstance(value, list):
        numbers = [number_in(part) for part in value]
        return value if None in numbers else numbers
    return value


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
