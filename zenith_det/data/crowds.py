"""Crowd regions that are objects.

COCO keeps ``iscrowd`` 1 for regions of many objects, beside plain ones. Some tools write it for each run-length mask
(CVAT for all that a brush has painted), and a set of nothing but crowds trains nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools import mask as mask_utils

from zenith_det.data.metadata import DatasetMetadata
from zenith_det.data.problems import CROWDS, DatasetReport
from zenith_det.errors import one_line

#: What ``iscrowd`` 1 means: ``regions`` as in COCO, ``objects``, or, ``auto``, what the set as a whole says.
Crowds = Literal["auto", "regions", "objects"]
#: Beside plain objects of other classes, what so many crowds of a class are says something.
MANY_CROWDS = 3
#: Of so many crowds the masks are looked at.
MASKS_LOOKED_AT = 100
#: The share of these that must be in one piece.
IN_ONE_PIECE = 0.8

_LARGEST_MASK = 2**26  # pixels: larger ones are not decoded
_COARSE = 64  # pixels, the longer side at which pieces are told apart
_GAP = 2  # of these pixels: what is so near is one piece


@dataclass(frozen=True)
class Crowd:
    """An annotation with ``iscrowd`` 1.

    Attributes:
        item: as it stands in the record; ``iscrowd`` becomes 0 where it is taken for an object.
        image: its file name as in the annotation file.
        image_id: of its image.
    """

    item: dict[str, Any]
    image: str
    image_id: int


def settle_crowds(
    crowds: Sequence[Crowd],
    plain: Counter[int],
    metadata: DatasetMetadata,
    report: DatasetReport,
    meaning: Crowds,
) -> None:
    """Make objects of the crowds that are meant as such, and tell of it.

    In a set without plain objects those are all, if most of their masks are in one piece; else the set stops. Beside
    plain objects of other classes, those of a class that has :data:`MANY_CROWDS` and no plain object.

    Args:
        crowds: all of the set, but objects that are to be ignored.
        plain: class -> objects that are no crowds.
        metadata: of the set.
        report: takes what is found.
        meaning: of ``iscrowd`` 1.
    """
    if meaning == "objects":
        _take(crowds, "as asked for", report)
    if meaning != "auto" or not crowds:
        return
    if not plain:
        if _in_one_piece(crowds):
            _take(crowds, "no plain object is in the set", report)
            report.add(
                CROWDS,
                "filled",
                f"all {len(crowds)} annotations have iscrowd 1, as CVAT writes brush masks: each is taken for an "
                "object (--crowds regions takes none)",
            )
        else:
            report.add(
                CROWDS,
                "stops",
                f"all {len(crowds)} annotations have iscrowd 1 (crowd regions), many without a mask in one piece: if "
                "each is an object, give --crowds objects",
            )
        return
    by_class: defaultdict[int, list[Crowd]] = defaultdict(list)
    for crowd in crowds:
        by_class[crowd.item["category_id"]].append(crowd)
    for number, some in sorted(by_class.items()):
        name, count = one_line(metadata.thing_classes[number]), plain[number]
        if len(some) < MANY_CROWDS or len(some) <= count:
            continue
        told = f"{name}: {len(some)} annotations have iscrowd 1, {count or 'none'} {'has' if count == 1 else 'have'} 0"
        if not count and _in_one_piece(some):
            _take(some, "its class has no plain object", report)
            report.add(
                CROWDS,
                "filled",
                f"{told}: taken for objects, as CVAT's brush masks (--crowds regions takes none)",
            )
        else:
            report.add(
                CROWDS,
                "kept",
                f"{told}: neither trained nor counted in AP, unless --crowds objects is given",
            )


def _take(crowds: Sequence[Crowd], why: str, report: DatasetReport) -> None:
    for crowd in crowds:
        crowd.item["iscrowd"] = 0
        report.add(
            "crowd taken for an object",
            "filled",
            f"iscrowd 1 read as 0: {why}",
            image=crowd.image,
            image_id=crowd.image_id,
            annotation_id=crowd.item["id"],
        )


def _in_one_piece(crowds: Sequence[Crowd]) -> bool:
    """Whether most masks, of some that are spread over all, are that of one thing each."""
    sample = crowds[:: -(-len(crowds) // MASKS_LOOKED_AT)]
    single = sum(_is_in_one_piece(crowd.item.get("segmentation")) for crowd in sample)
    return single >= IN_ONE_PIECE * len(sample)


def _is_in_one_piece(segmentation: Any) -> bool:
    if isinstance(segmentation, list):
        return len(segmentation) == 1
    if not segmentation or np.prod(segmentation["size"]) > _LARGEST_MASK:
        return False
    mask = mask_utils.decode(segmentation)
    x, y, width, height = map(int, mask_utils.toBbox(segmentation))
    return _largest_piece(mask[y : y + height, x : x + width]) >= IN_ONE_PIECE


def _largest_piece(mask: npt.NDArray[np.uint8]) -> float:
    """The share of a mask ``(H, W)`` that its largest piece has, as seen from afar: a brush leaves gaps and specks."""
    if not mask.size:
        return 0.0
    scale = min(1.0, _COARSE / max(mask.shape))
    size = [max(1, round(side * scale)) for side in reversed(mask.shape)]
    picture = Image.fromarray(mask * np.uint8(255)).resize((size[0], size[1]), Image.Resampling.BOX)
    amount = np.pad(np.asarray(picture, dtype=np.float64), _GAP)
    left = amount > 0
    largest = 0.0
    while left.any():
        piece = np.zeros_like(left)
        piece[np.unravel_index(left.argmax(), left.shape)] = True
        before = 0
        while before < (before := int(piece.sum())):
            for axis in (0, 1):
                piece = np.logical_or.reduce([np.roll(piece, by, axis) for by in range(-_GAP, _GAP + 1)])
            piece &= left
        largest = max(largest, float(amount[piece].sum()))
        left &= ~piece
    return largest / float(amount.sum() or 1)
