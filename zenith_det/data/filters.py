"""Which images are trained on, Detectron2's filters; which objects losses are of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def filter_empty(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records with at least one annotation that is no crowd region.

    Detectron2's ``DATALOADER.FILTER_EMPTY_ANNOTATIONS`` (``filter_images_with_only_crowd_annotations``).
    """
    return [r for r in records if any(not a.get("iscrowd", 0) for a in r["annotations"])]


def known_classes(records: Sequence[dict[str, Any]], num_classes: int) -> list[dict[str, Any]]:
    """The records without the objects of classes that a model doesn't have, for losses.

    Such are kept in a set that is evaluated on, after the model's classes.
    """
    return [
        {**record, "annotations": [a for a in record["annotations"] if a["category_id"] < num_classes]}
        for record in records
    ]


def filter_few_keypoints(records: Iterable[dict[str, Any]], minimum: int) -> list[dict[str, Any]]:
    """The records with at least ``minimum`` labelled keypoints over all their objects.

    Detectron2's ``MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE`` (``filter_images_with_few_keypoints``).
    Crowd regions count no keypoints, as they have none labelled.
    """

    def labelled(record: dict[str, Any]) -> int:
        return sum(v > 0 for a in record["annotations"] for v in a.get("keypoints", ())[2::3])

    return [record for record in records if labelled(record) >= minimum]
