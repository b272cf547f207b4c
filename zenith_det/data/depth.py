"""Images of more than 8 bits: the one scale by which all images of a set become 8 bits.

A scale for each image would have the same thing bright in one and dark in the next; the upper 8 of 16 bits, which suit
what fills these, leave 12-bit and thermal images black or flat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zenith_det.data.images import DeepValues, ValueRange, deep_values
from zenith_det.data.problems import DEPTH, DatasetReport

#: Of so many images the values are looked at.
LOOKED_AT = 32
#: A fourth of what 16 bits hold: values that go no further, or are no further apart, use too little of it.
FEW_VALUES = 2**14
#: What a range taken from values is wider by than these, on either side: other images may go beyond.
MARGIN = 0.1


@dataclass(frozen=True)
class Depth:
    """How a set's images of more than 8 bits are read.

    Attributes:
        value_range: what becomes black and what white; None: as :func:`zenith_det.data.read_image` does by itself.
        told: a line about it; "" where there are no such images.
        fault: why no scale can be right; "" otherwise.
    """

    value_range: ValueRange | None = None
    told: str = ""
    fault: str = ""


def depth_of(paths: Sequence[str], given: ValueRange | None = None) -> Depth:
    """Look at some images of a set, spread over all.

    Args:
        paths: of its images.
        given: the range to take, of the set that was trained on or as asked for.
    """
    sample = paths[:: -(-len(paths) // LOOKED_AT) or 1]
    found = [values for values in map(deep_values, sample) if values is not None]
    if not found:
        return Depth(given)
    kinds = sorted({values.kind for values in found})
    low, high = min(v.low for v in found), max(v.high for v in found)
    looked = f"{len(found)} of {len(sample)} looked at"
    told = f"{' and '.join(kinds)} images have values from {low:g} to {high:g} ({looked})"
    if given is None:
        if len(kinds) > 1:
            return Depth(told=told, fault="kinds of several scales")
        given, fault = _range_of(found, low, high)
        if fault:
            return Depth(told=told, fault=fault)
    if given is None:
        return Depth(told=f"{told}: the upper 8 of the 16 bits are read")
    return Depth(given, f"{told}: {given[0]:g} is read as black, {given[1]:g} as white, in all alike")


def tell_of_depth(depth: Depth, report: DatasetReport) -> None:
    """Put it into a report; what has no scale stops."""
    if depth.fault:
        report.add(
            "images without a usable scale",
            "stops",
            f'{depth.told}: {depth.fault}; save all of them with one scale, or give INPUT.VALUE_RANGE "(BLACK, WHITE)"',
        )
    elif depth.told:
        report.add(DEPTH, "kept", depth.told)


def _range_of(found: Sequence[DeepValues], low: float, high: float) -> tuple[ValueRange | None, str]:
    """The range that suits all images of one kind, or why there is none."""
    kind = found[0].kind
    first, last = min(values.first for values in found), max(values.last for values in found)
    if low == high:
        return None, "there is nothing to see in them"
    if kind == "16-bit":
        if high >= FEW_VALUES and last - first >= FEW_VALUES:
            return None, ""
    elif kind == "float" and low >= 0:
        if high <= 1:
            return (0.0, 1.0), ""
        if any(0 < values.high <= 1 for values in found):
            return None, "some are from 0 to 1, others are not"
    if low >= 0 and high <= 255 and kind != "16-bit":
        return (0.0, 255.0), ""
    if low >= 0 and first < last / 4:  # from 0 on, as a camera counts: 10, 12, 14 bits, …
        return (0.0, float(2 ** max(8, int(last).bit_length()) - 1)), ""
    margin = MARGIN * (last - first)
    if not margin:
        return None, "nearly all have one value"
    return (float(f"{first - margin:.6g}"), float(f"{last + margin:.6g}")), ""
