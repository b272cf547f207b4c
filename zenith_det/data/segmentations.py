"""Polygons and run-length masks of an annotation file: the usable ones, or what is wrong with them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as mask_utils

from zenith_det.data.problems import Fault
from zenith_det.data.values import as_id, number_in
from zenith_det.errors import one_line, quote

#: Polygons of one object: pycocotools merges them in quadratic time.
MAX_POLYGONS = 10_000
#: What the outline of an object's polygons may measure, in (height + width) of its image: pycocotools takes
#: about 60 bytes for each pixel of it.
MAX_OUTLINE = 100
_RUNS_AT_ONCE = 2**16  # of a compressed mask: each takes 70 bytes on the way


_DEEPEST = 4  # lists in lists: more than any tool writes


def polygons_in(value: list[Any]) -> list[Any]:
    """Flat lists of x and y from other ways to write polygons: points as pairs or objects, more lists, texts."""
    return list(itertools.islice(_rings(value, 0), MAX_POLYGONS + 1))


def _rings(value: Any, depth: int) -> Iterator[Any]:
    if not isinstance(value, list) or not value or depth == _DEEPEST:
        yield value
        return
    numbers = [number_in(part) for part in value]
    if None not in numbers:
        yield numbers
        return
    points = [_point(part) for part in value]
    if None not in points:
        yield [number for point in points for number in point or ()]
        return
    for part in value:
        yield from _rings(part, depth + 1)


def _point(value: Any) -> list[int | float] | None:
    if isinstance(value, dict):
        value = [value.get("x"), value.get("y")]
    if not isinstance(value, list) or len(value) != 2:
        return None
    x, y = map(number_in, value)
    return None if x is None or y is None else [x, y]


def check_polygons(polygons: list[Any], height: int, width: int) -> tuple[list[list[float]], list[str]]:
    """The usable polygons and, for each other one, what is wrong with it.

    Usable: at least three points, an even count of finite numbers, none absurdly far from the image, and not
    so long an outline that no object has it (drawing a polygon takes time and memory in proportion to its
    length in pixels).

    Raises:
        Fault: more than :data:`MAX_POLYGONS`.
    """
    if len(polygons) > MAX_POLYGONS:
        raise Fault("broken polygon", f"{len(polygons)} polygons: {MAX_POLYGONS} at most")
    limit = 4 * (height + width) + 1000
    outline_left = MAX_OUTLINE * (height + width) + 1000.0
    usable, faults = [], []
    for number, polygon in enumerate(polygons):
        try:
            length = len(polygon)
            if length >= 6 and length % 2 == 0:
                # sum() is NaN when any number is; min() and max() alone would miss one.
                if (
                    type(polygon) is list
                    and math.isfinite(sum(polygon))
                    and -limit <= (low := min(polygon)) <= (high := max(polygon)) <= limit
                ):
                    # Nearly every polygon is far below, whatever the way it takes between these two.
                    outline = length // 2 * float(high - low)
                    if outline > outline_left / 8:
                        points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
                        outline = float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum())
                    outline_left -= outline
                    if outline_left >= 0:
                        usable.append(polygon)
                        continue
                    reason = f"is longer than {MAX_OUTLINE} times the image's height and width"
                else:
                    reason = "has numbers that are not finite or far outside the image"
            else:
                reason = f"has {length} numbers: at least 6 are needed, in pairs"
        except (TypeError, OverflowError):
            reason = "is not a list of numbers"
        faults.append(f"polygon {number + 1} of {len(polygons)} {reason}")
    return usable, faults


def _compressed_counts(text: bytes) -> npt.NDArray[np.int64]:
    """Run lengths of COCO's compressed RLE (``rleFrString`` in pycocotools' maskApi.c).

    Each number is written in characters of 5 bits from ``0`` up, the lowest first; bit 6 says that more
    follow, and the top bit of the last is the sign. From the fourth on, each is a difference to the last but
    one.
    """
    codes = np.frombuffer(text, dtype=np.uint8)
    if codes.size == 0 or codes.min() < 48 or codes.max() > 111 or (codes[-1] - 48) & 32:
        raise ValueError("characters that no RLE has")
    ends = np.flatnonzero(((codes - 48) & 32) == 0)
    numbers = np.empty(ends.size, dtype=np.int64)
    start = 0
    for block in range(0, ends.size, _RUNS_AT_ONCE):
        here = ends[block : block + _RUNS_AT_ONCE]
        numbers[block : block + _RUNS_AT_ONCE] = _numbers(codes[start : here[-1] + 1], here - start)
        start = int(here[-1]) + 1
    # Undo the differences: counts[i] += counts[i - 2] for i > 2, that is two running sums.
    np.cumsum(numbers[1::2], out=numbers[1::2])
    if numbers.size > 2:
        np.cumsum(numbers[2::2], out=numbers[2::2])
    return numbers


def _numbers(characters: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The signed numbers whose last characters are at ``ends``."""
    codes = characters.astype(np.int64) - 48
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:
        raise ValueError("a run longer than any image")
    place = np.arange(codes.size) - np.repeat(starts, lengths)
    numbers: npt.NDArray[np.int64] = np.add.reduceat((codes & 31) << (5 * place), starts)
    return numbers - np.where(codes[ends] & 16, np.int64(1) << (5 * lengths), 0)


def rle_in(rle: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """A run-length mask from other ways to write one: numbers as text or as floats, no size of its own."""
    size, counts = rle.get("size"), rle.get("counts")
    if isinstance(size, list):
        size = [as_id(side) for side in size]
    if isinstance(counts, list):
        whole = [as_id(count) for count in counts]
        counts = counts if None in whole else whole
    return {"size": [height, width] if size is None else size, "counts": counts}


def check_rle(rle: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """A run-length mask in compressed form: ``{"size": [h, w], "counts": bytes or str}``.

    Raises:
        Fault: of another size than the image, or its runs don't add up to the image's pixels.
    """
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, (list, tuple)) or list(size) != [height, width]:
        raise Fault(
            "broken RLE", f"RLE size is {quote(size)}, the image's (height, width) is [{height}, {width}]"
        )
    try:
        if isinstance(counts, list):
            # Among texts, numpy would make each number as wide as the widest of them.
            if not set(map(type, counts)) <= {int}:
                raise ValueError("counts that are not whole numbers")
            runs = np.array(counts, dtype=None if counts else np.int64)
            if runs.dtype.kind not in "iu":
                raise ValueError("counts that are not whole numbers")
        elif isinstance(counts, (str, bytes)):
            runs = _compressed_counts(counts.encode("ascii") if isinstance(counts, str) else counts)
        else:
            raise ValueError(f"counts of type {type(counts).__name__}")
        if runs.size and (runs.min() < 0 or runs.max() > height * width):
            raise ValueError("a run below 0 or longer than the image")
        if int(runs.sum()) != height * width:
            raise ValueError(f"runs that add up to {int(runs.sum())} pixels, the image has {height * width}")
    except (ValueError, TypeError, OverflowError) as error:
        raise Fault("broken RLE", f"RLE has {one_line(str(error))}") from None
    if isinstance(counts, list):
        return dict(mask_utils.frPyObjects({"size": [height, width], "counts": counts}, height, width))
    return {"size": [height, width], "counts": counts}


def mask_rle(segmentation: list[list[float]] | dict[str, Any], height: int, width: int) -> Any:
    """A checked segmentation as one compressed RLE."""
    if isinstance(segmentation, list):
        return mask_utils.merge(mask_utils.frPyObjects(segmentation, height, width))
    return segmentation
