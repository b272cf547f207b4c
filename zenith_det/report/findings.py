"""Where a model errs: detections matched with the ground truth by their boxes, at one IoU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask

from zenith_det.data.metadata import DatasetMetadata
from zenith_det.evaluation.judging import MATCH_IOU

#: Below this, a false positive has nothing to do with an object.
NEAR_IOU = 0.1


@dataclass(frozen=True)
class FalsePositive:
    """A detection that is no object's.

    Attributes:
        record: of its image.
        result: in COCO's result format.
        reason: ``background``, ``poor box``, ``duplicate``, ``in truth: CLASS`` or ``near: CLASS``.
        iou: with the object that the reason speaks of.
    """

    record: Mapping[str, Any]
    result: Mapping[str, Any]
    reason: str
    iou: float


@dataclass(frozen=True)
class Miss:
    """An object without a detection.

    Attributes:
        record: of its image.
        annotation: of the object.
        reason: what is there instead.
    """

    record: Mapping[str, Any]
    annotation: Mapping[str, Any]
    reason: str


@dataclass
class Findings:
    """What matching gave.

    Attributes:
        threshold: the lowest score that counts.
        objects, found, wrong: by class index: objects, objects found, false positives.
        false_positives: by falling score.
        misses: by falling area.
    """

    threshold: float
    objects: Counter[int] = field(default_factory=Counter)
    found: Counter[int] = field(default_factory=Counter)
    wrong: Counter[int] = field(default_factory=Counter)
    false_positives: list[FalsePositive] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)


def find_errors(
    records: Sequence[Mapping[str, Any]],
    by_image: Mapping[int, Sequence[Mapping[str, Any]]],
    metadata: DatasetMetadata,
    threshold: float = 0.5,
) -> Findings:
    """Match each image's detections, best scores first, with objects of their class, as COCO does at IoU 0.5.

    What lies in a crowd region of its class is neither right nor wrong.

    Args:
        records: dataset records; ``category_id`` indexes the classes.
        by_image: detections by image id, with the file's own category ids.
        metadata: of the set.
        threshold: detections below this score don't count.
    """
    findings = Findings(threshold)
    for record in records:
        detections = [r for r in by_image.get(record["image_id"], ()) if r["score"] >= threshold]
        detections.sort(key=lambda r: -r["score"])
        _match(record, detections, metadata, findings)
    findings.false_positives.sort(key=lambda fp: -fp.result["score"])
    findings.misses.sort(key=lambda miss: -_area(miss.annotation))
    return findings


def _area(annotation: Mapping[str, Any]) -> float:
    return float(annotation["bbox"][2] * annotation["bbox"][3])


def _match(
    record: Mapping[str, Any],
    detections: Sequence[Mapping[str, Any]],
    metadata: DatasetMetadata,
    findings: Findings,
) -> None:
    objects = list(record["annotations"])
    crowd = np.array([bool(o.get("iscrowd")) for o in objects], dtype=bool)
    classes = np.array([o["category_id"] for o in objects], dtype=np.int64)
    labels = [metadata.thing_dataset_id_to_contiguous_id[d["category_id"]] for d in detections]
    overlaps = np.zeros((len(detections), len(objects)))
    if detections and objects:
        boxes = np.array([d["bbox"] for d in detections], dtype=np.float64)
        overlaps = np.asarray(
            coco_mask.iou(boxes, np.array([o["bbox"] for o in objects], dtype=np.float64), crowd.tolist())
        )
    taken = np.zeros(len(objects), dtype=bool)
    for n, (detection, label) in enumerate(zip(detections, labels)):
        same = (classes == label) & ~crowd
        free = np.where(same & ~taken, overlaps[n], 0.0)
        if len(objects) and free.max() >= MATCH_IOU:
            taken[int(free.argmax())] = True
            continue
        if len(objects) and np.where((classes == label) & crowd, overlaps[n], 0.0).max() >= MATCH_IOU:
            continue
        findings.wrong[label] += 1
        reason, iou = _why_wrong(overlaps[n], classes, same, crowd, metadata)
        findings.false_positives.append(FalsePositive(record, detection, reason, iou))
    for n, annotation in enumerate(objects):
        if crowd[n]:
            continue
        label = int(classes[n])
        findings.objects[label] += 1
        if taken[n]:
            findings.found[label] += 1
            continue
        findings.misses.append(Miss(record, annotation, _why_missed(overlaps[:, n], labels, label, metadata)))


def _why_wrong(
    overlaps: np.ndarray, classes: np.ndarray, same: np.ndarray, crowd: np.ndarray, metadata: DatasetMetadata
) -> tuple[str, float]:
    if not len(overlaps):
        return "background", 0.0
    own = np.where(same, overlaps, 0.0)
    if own.max() >= MATCH_IOU:
        return "duplicate", float(own.max())
    other = np.where(~same & ~crowd, overlaps, 0.0)
    if other.max() >= MATCH_IOU:
        index = int(other.argmax())
        return f"in truth: {metadata.thing_classes[classes[index]]}", float(other[index])
    if own.max() >= NEAR_IOU:
        return "poor box", float(own.max())
    if other.max() >= NEAR_IOU:
        index = int(other.argmax())
        return f"near: {metadata.thing_classes[classes[index]]}", float(other[index])
    return "background", float(max(own.max(), other.max()))


def _why_missed(overlaps: np.ndarray, labels: Sequence[int], label: int, metadata: DatasetMetadata) -> str:
    if len(overlaps):
        others = [n for n in range(len(labels)) if labels[n] != label and overlaps[n] >= MATCH_IOU]
        if others:
            return f"taken for {metadata.thing_classes[labels[others[0]]]}"
        own = [float(overlaps[n]) for n in range(len(labels)) if labels[n] == label]
        if own and max(own) >= MATCH_IOU:
            return "its detection went to a neighbour"
        if own and max(own) >= NEAR_IOU:
            return f"only a poor box (IoU {max(own):.2f})"
    return "no detection there"
