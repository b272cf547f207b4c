"""Where a model errs: why each false positive is one, and what is where an object was missed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask

from zenith_det.evaluation import Judgement
from zenith_det.evaluation.judging import MATCH_IOU

#: Below this, a false positive has nothing to do with an object.
NEAR_IOU = 0.1

Boxed = Mapping[str, Any]


@dataclass(frozen=True)
class FalsePositive:
    """A detection that is no object's.

    Attributes:
        detection: in COCO's result format.
        reason: ``background``, ``poor box``, ``duplicate``, ``in truth: CLASS`` or ``near: CLASS``.
        iou: with the object that the reason speaks of.
    """

    detection: Boxed
    reason: str
    iou: float


@dataclass(frozen=True)
class Miss:
    """An object without a detection.

    Attributes:
        annotation: of the object, in COCO's format.
        reason: what is there instead.
    """

    annotation: Boxed
    reason: str


def find_errors(judgement: Judgement, score: float) -> tuple[list[FalsePositive], list[Miss]]:
    """The errors of the detections with this score or a higher one.

    Returns:
        False positives by falling score, and misses by falling area of the box.
    """
    wrong, missed = judgement.errors(score)
    objects = _by_image(judgement.objects())
    detections = _by_image(judgement.detections(score))
    false_positives = [
        FalsePositive(one, *_why_wrong(one, objects[one["image_id"]], judgement.names)) for one in wrong
    ]
    misses = [Miss(one, _why_missed(one, detections[one["image_id"]], judgement.names)) for one in missed]
    return (
        sorted(false_positives, key=lambda found: -found.detection["score"]),
        sorted(misses, key=lambda miss: -miss.annotation["bbox"][2] * miss.annotation["bbox"][3]),
    )


def _by_image(boxed: Sequence[Boxed]) -> Mapping[int, list[Boxed]]:
    images = defaultdict(list)
    for one in boxed:
        images[one["image_id"]].append(one)
    return images


def _nearest(one: Boxed, others: Sequence[Boxed], *, same: bool) -> tuple[float, int]:
    """The highest IoU with a box of the same class, or of another, and the class."""
    compared = [other for other in others if (other["category_id"] == one["category_id"]) == same]
    if not compared:
        return 0.0, 0
    overlaps = coco_mask.iou(
        *(
            np.array(boxes, dtype=np.float64)
            for boxes in ([one["bbox"]], [other["bbox"] for other in compared])
        ),
        [0] * len(compared),
    )[0]
    best = int(overlaps.argmax())
    return float(overlaps[best]), compared[best]["category_id"]


def _why_wrong(detection: Boxed, objects: Sequence[Boxed], names: Mapping[int, str]) -> tuple[str, float]:
    own, _ = _nearest(detection, objects, same=True)
    other, category = _nearest(detection, objects, same=False)
    if own >= MATCH_IOU:
        return "duplicate", own
    if other >= MATCH_IOU:
        return f"in truth: {names[category]}", other
    if own >= NEAR_IOU:
        return "poor box", own
    if other >= NEAR_IOU:
        return f"near: {names[category]}", other
    return "background", max(own, other)


def _why_missed(annotation: Boxed, detections: Sequence[Boxed], names: Mapping[int, str]) -> str:
    own, _ = _nearest(annotation, detections, same=True)
    other, category = _nearest(annotation, detections, same=False)
    if other >= MATCH_IOU:
        return f"taken for {names[category]}"
    if own >= MATCH_IOU:
        return "its detection went to a neighbour"
    if own >= NEAR_IOU:
        return f"only a poor box (IoU {own:.2f})"
    return "no detection there"
