"""Image sizes that an annotation file declares, where the images have others: which of the two do its objects fit?

Converters have written the size of a thumbnail for each image, exchanged height and width, or not turned a photograph.
Objects that fit the picture alone are right as they are; those that fit the declared size alone would have to be
scaled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from zenith_det.data.segmentations import polygons_in
from zenith_det.data.values import as_id, box_in

Size = tuple[int, int]  # height, width
#: Objects reach out of the declared size in so many of the images, of those that have another and objects.
ENOUGH = 0.2
#: In so many of them they may reach out of the picture, too: people draw over the edge.
MISTAKES = 0.05


def reaches_out(entries: Iterable[Any], numbered: Mapping[str, int], declared: Mapping[int, Size]) -> bool:
    """Whether any object of these images lies clearly outside the declared size, or its mask has another."""
    for entry in entries:
        image_id = _image_id(entry, numbered)
        size = None if image_id is None else declared.get(image_id)
        if size is not None and (_is_beyond(_end(entry), size) or _mask_size(entry) not in (None, size)):
            return True
    return False


def fit_the_pictures(
    entries: Iterable[Any],
    numbered: Mapping[str, int],
    declared: Mapping[int, Size],
    found: Mapping[int, Size],
) -> bool:
    """Whether the objects of images whose declared size is wrong were drawn on the pictures as they are.

    Args:
        entries: of ``annotations``, as they stand in the file.
        numbered: image ids that are no numbers -> the number given.
        declared: image id -> the size that the annotation file says, of the images in ``found``.
        found: image id -> the picture's own.
    """
    judged, for_picture, against = set(), set(), set()
    for entry in entries:
        image_id = _image_id(entry, numbered)
        if image_id is None or image_id not in found:
            continue
        judged.add(image_id)
        mask_size, end = _mask_size(entry), _end(entry)
        if _is_beyond(end, found[image_id]) or mask_size == declared[image_id]:
            against.add(image_id)
        elif _is_beyond(end, declared[image_id]) or mask_size == found[image_id]:
            for_picture.add(image_id)
    return len(for_picture - against) >= ENOUGH * len(judged) > 0 and len(against) <= MISTAKES * len(judged)


def _image_id(entry: Any, numbered: Mapping[str, int]) -> int | None:
    value = entry.get("image_id") if isinstance(entry, dict) else None
    number = value if type(value) is int else as_id(value)
    if number is None and isinstance(value, str):
        number = numbered.get(value.strip())
    return number


def _mask_size(entry: dict[str, Any]) -> tuple[int | None, ...] | None:
    mask = entry.get("segmentation")
    size = mask.get("size") if isinstance(mask, dict) else None
    return tuple(map(as_id, size)) if isinstance(size, list) else None


def _end(entry: dict[str, Any]) -> tuple[float, float]:
    """The right and lower end of an object, of its box or else its polygons; (0, 0) where it has none to read."""
    box = entry.get("bbox")
    mask = entry.get("segmentation")
    try:
        if isinstance(box := box_in(box), list) and len(box) == 4:
            return box[0] + box[2], box[1] + box[3]
        rings = polygons_in(mask) if isinstance(mask, list) else []
        return max((max(r[0::2]) for r in rings), default=0), max((max(r[1::2]) for r in rings), default=0)
    except (TypeError, ValueError, IndexError):
        return 0, 0


def _is_beyond(end: tuple[float, float], size: Size) -> bool:
    """By more than what rounding and sloppy drawing make."""
    try:
        return bool(end[0] > 1.01 * size[1] + 2 or end[1] > 1.01 * size[0] + 2)
    except (TypeError, OverflowError):  # texts, added up; thousands of digits
        return False
