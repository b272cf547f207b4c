"""A checked dataset to and from :mod:`zenith_det.data.annotation_cache`."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import zenith_det.data.annotation_cache as annotation_cache
from zenith_det.data.categories import OtherClasses, metadata_from
from zenith_det.data.dataset import CocoDataset
from zenith_det.data.depth import depth_of
from zenith_det.data.garbage_collection import garbage_collection_off
from zenith_det.data.image_entries import ReadImages
from zenith_det.data.image_files import ImageCheck, ImageFile, check_image_files
from zenith_det.data.images import ValueRange
from zenith_det.data.metadata import DatasetMetadata
from zenith_det.data.problems import DatasetReport, Problem

logger = logging.getLogger(__name__)


def remember(
    entry: annotation_cache.Entry,
    dataset: CocoDataset,
    categories: Sequence[dict[str, Any]],
    images: ReadImages,
) -> None:
    """Keep the outcome of reading and checking; all images were found, and of the size that is declared."""
    report, records = dataset.report, dataset.records
    if dataset.metadata.num_keypoints:
        # All objects without labelled keypoints share one list; a file would hold it as often as there are any.
        unlabelled = [0.5, 0.5, 0.0] * dataset.metadata.num_keypoints
        records = [
            {
                **record,
                "annotations": [
                    {**item, "keypoints": None} if item["keypoints"] == unlabelled else item
                    for item in record["annotations"]
                ],
            }
            for record in records
        ]
    entry.write(
        {
            "categories": categories,
            "keypoint_fault": dataset.metadata.keypoint_fault,
            "classes": dataset.metadata.thing_classes,
            "records": records,
            "undeclared": [n for n, r in enumerate(records) if r["image_id"] in images.undeclared],
            "renamed": list(images.renamed.values()),
            "problems": [
                [p.kind, p.action, p.image, p.image_id, p.annotation_id, p.reason] for p in report.problems
            ],
            "counts": [[kind, action, count] for (kind, action), count in report.counts.items()],
            "numbers": [report.num_images, report.num_annotations, report.num_without_objects],
        }
    )


def remembered(
    entry: annotation_cache.Entry,
    name: str,
    json_file: str,
    image_root: str,
    classes: Sequence[str] | None,
    other_classes: OtherClasses,
    check_images: ImageCheck,
    value_range: ValueRange | None,
) -> CocoDataset | None:
    """What :func:`remember` kept; ``None`` if there is nothing, or an image has changed since.

    Raises:
        DatasetError: its categories are not ``classes``.
    """
    with garbage_collection_off():
        kept = entry.read()
        if kept is None:
            return None
        try:
            records = kept["records"]
            metadata = metadata_from(
                kept["categories"], name, json_file, image_root, classes, other_classes,
                lambda: Counter(kept["classes"][a["category_id"]] for r in records for a in r["annotations"]),
            )  # fmt: skip
            metadata = replace(metadata, keypoint_fault=kept["keypoint_fault"])
            if any(map(os.path.lexists, filter(None, kept["renamed"]))):
                return None  # an image now lies where the annotation file says
            undeclared = set(kept["undeclared"])
            files = [
                ImageFile(r["file_name"], *((None, None) if n in undeclared else (r["height"], r["width"])))
                for n, r in enumerate(records)
            ]
            found = check_image_files(files, check_images)
            if any(size != (r["height"], r["width"]) for size, r in zip(found, records, strict=True)):
                return (
                    None  # a Fault, or another size: the whole file is read again, which tells what is wrong
                )
            range_now = depth_of([record["file_name"] for record in records], value_range).value_range
            range_then = records[0].get("value_range") if records else None
            if range_now != (None if range_then is None else tuple(range_then)):
                return None  # the same images by name and size, saved with other values
            _restore(records, metadata, kept["classes"])
            report = DatasetReport(name, num_classes=metadata.num_classes)
            report.num_images, report.num_annotations, report.num_without_objects = kept["numbers"]
            report.listed_images = len(records)  # all of the file's, or nothing had been kept
            report.problems = [Problem(*fields) for fields in kept["problems"]]
            report.counts = {(kind, action): count for kind, action, count in kept["counts"]}
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            entry.distrust()
            return None
    logger.info("%s: checked before, annotations taken from %s", name, entry.path)
    return CocoDataset(metadata, records, report)


def _restore(records: list[dict[str, Any]], metadata: DatasetMetadata, classes: list[str]) -> None:
    """What the cache's form can't hold, and the indices of classes in another order."""
    index = {category: number for number, category in enumerate(metadata.thing_classes)}
    order = [index.get(category, -1) for category in classes]  # -1: a class without objects
    moved = order != list(range(len(order)))
    unlabelled = [0.5, 0.5, 0.0] * metadata.num_keypoints
    for record in records:
        for item in record["annotations"]:
            if moved:
                item["category_id"] = order[item["category_id"]]
            segmentation = item.get("segmentation")
            if isinstance(segmentation, dict):
                segmentation["counts"] = annotation_cache.restored_bytes(segmentation["counts"])
            if metadata.num_keypoints and item["keypoints"] is None:
                item["keypoints"] = unlabelled
