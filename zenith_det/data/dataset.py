"""A dataset as read, and as COCO's evaluation wants it back."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from zenith_det.data.metadata import DatasetMetadata
from zenith_det.data.problems import DatasetReport


@dataclass(frozen=True)
class CocoDataset:
    """A dataset as read.

    Attributes:
        metadata: names and ids.
        records: Detectron2's standard dataset dicts, sorted by image id. Besides Detectron2's keys each
            annotation has ``id`` and ``area``. Keypoints have Detectron2's +0.5 added to x and y.
        report: what was wrong, and what became of it.
    """

    metadata: DatasetMetadata
    records: list[dict[str, Any]]
    report: DatasetReport


def coco_ground_truth(dataset: CocoDataset) -> dict[str, Any]:
    """The checked dataset as the content of a COCO annotation file, for ``COCOeval``.

    Ids of images and categories are the file's own; ``info``, ``licenses``, ``area``, ``iscrowd`` and
    ``num_keypoints`` are always there, whatever the file lacked. Annotation ids are the file's own unless one
    is below 1: pycocotools takes id 0 for "not matched", so all are then numbered from 1. An annotation
    without a mask has no ``segmentation``. The lists of boxes and polygons are shared with the records, and that of
    no keypoints among all annotations without labelled ones.
    """
    metadata = dataset.metadata
    original = metadata.contiguous_id_to_thing_dataset_id
    unlabelled = [0.0, 0.0, 0.0] * metadata.num_keypoints
    renumber = any(a["id"] < 1 for record in dataset.records for a in record["annotations"])
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for record in dataset.records:
        images.append(
            {
                "id": record["image_id"],
                "file_name": os.path.relpath(record["file_name"], metadata.image_root),
                "height": record["height"],
                "width": record["width"],
            }
        )
        for item in record["annotations"]:
            annotation = {
                "id": len(annotations) + 1 if renumber else item["id"],
                "image_id": record["image_id"],
                "category_id": original[item["category_id"]],
                "bbox": item["bbox"],
                "area": item["area"],
                "iscrowd": item["iscrowd"],
            }
            segmentation = item.get("segmentation")
            if isinstance(segmentation, dict) and isinstance(segmentation["counts"], bytes):
                segmentation = {**segmentation, "counts": segmentation["counts"].decode("ascii")}
            if segmentation is not None:
                annotation["segmentation"] = segmentation
            if "keypoints" in item:
                keypoints = unlabelled  # shared, as in the records
                if any(item["keypoints"][2::3]):
                    keypoints = [v if i % 3 == 2 else v - 0.5 for i, v in enumerate(item["keypoints"])]
                annotation["keypoints"] = keypoints
                annotation["num_keypoints"] = sum(v > 0 for v in keypoints[2::3])
            annotations.append(annotation)
    categories: list[dict[str, Any]] = []
    for category_id, index in sorted(metadata.thing_dataset_id_to_contiguous_id.items()):
        category: dict[str, Any] = {"id": category_id, "name": metadata.thing_classes[index]}
        if metadata.num_keypoints:
            category["keypoints"] = list(metadata.keypoint_names)
            category["skeleton"] = [[a + 1, b + 1] for a, b in metadata.keypoint_connections]
        categories.append(category)
    return {
        "info": {"description": metadata.name},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
