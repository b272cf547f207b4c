"""An annotation file's ``annotations``: read, checked, and put into the records of their images."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as mask_utils

from zenith_det.data.annotation_file import json_type
from zenith_det.data.metadata import DatasetMetadata
from zenith_det.data.problems import SUSPICIOUS, Action, DatasetReport, Fault
from zenith_det.data.segmentations import check_polygons, check_rle, mask_rle
from zenith_det.data.values import as_id, check_box
from zenith_det.errors import quote

#: Detectron2's ``BoxMode.XYWH_ABS``: absolute x, y, width, height.
XYWH_ABS = 1


class AnnotationReader:
    """Turns the entries of ``annotations`` into objects of records."""

    def __init__(
        self,
        records: dict[int, dict[str, Any]],
        left_out: set[int],
        metadata: DatasetMetadata,
        report: DatasetReport,
    ) -> None:
        self.records, self.left_out, self.metadata, self.report = records, left_out, metadata, report
        self.seen: dict[int, tuple[int, Any, Any]] = {}  # annotation id -> image id, category, box
        self.unnumbered: list[dict[str, Any]] = []
        self.with_keypoints: list[tuple[dict[str, Any], Any, str]] = []
        self.reaching_out: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.boxes = 0
        self.largest_side = 0.0

    def read(self, entries: list[Any]) -> None:
        for entry in entries:
            try:
                self._read_one(entry)
            except Fault as fault:
                self._tell(fault, entry)
        self._read_keypoints()
        self._number()
        self._tell_about_boxes()

    def _tell(self, fault: Fault, entry: Any) -> None:
        # A category that isn't declared is a real object: without it, it would be taught as background.
        action: Action = "stops" if fault.kind == "unknown category id" else "dropped"
        entry = entry if isinstance(entry, dict) else {}
        image_id = as_id(entry.get("image_id"))
        self.report.add(
            fault.kind,
            action,
            fault.reason,
            image=self._image_name(image_id),
            image_id=image_id,
            annotation_id=as_id(entry.get("id")),
        )

    def _image_name(self, image_id: int | None) -> str | None:
        record = self.records.get(image_id) if image_id is not None else None
        return None if record is None else os.path.relpath(record["file_name"], self.metadata.image_root)

    def _read_one(self, entry: Any) -> None:
        if not isinstance(entry, dict):
            raise Fault("broken annotation", f"an entry of annotations is {quote(entry)}")
        image_id = as_id(entry.get("image_id"))
        record = self.records.get(image_id) if image_id is not None else None
        if record is None:
            if image_id in self.left_out:
                raise Fault("annotation of an image left out", "its image can't be used")
            raise Fault("unknown image id", f"image_id {quote(entry.get('image_id'))} is not in images")
        category_id = as_id(entry.get("category_id"))
        category = self.metadata.thing_dataset_id_to_contiguous_id.get(category_id)  # type: ignore[arg-type]
        if category is None:
            raise Fault(
                "unknown category id",
                f"category_id {quote(entry.get('category_id'))} is not in categories",
            )
        crowd = entry.get("iscrowd", 0)
        if crowd is None or crowd not in (0, 1):
            raise Fault("broken iscrowd", f"iscrowd is {quote(crowd)}, not 0 or 1")
        if entry.get("ignore"):
            raise Fault(
                "ignore flag", 'has "ignore", which COCO\'s format does not know ("iscrowd" does that)'
            )
        height, width = record["height"], record["width"]
        segmentation = self._segmentation(entry, height, width)
        box = entry.get("bbox")
        box_missing = box is None or box == []
        if box_missing:
            if segmentation is None:
                raise Fault("no box", "has neither bbox nor segmentation")
            box = mask_utils.toBbox(mask_rle(segmentation, height, width)).tolist()
        box, outside = check_box(box, height, width)

        number = entry.get("id")
        annotation_id = as_id(number)
        if number is not None and annotation_id is None:
            raise Fault("bad annotation id", f"id {quote(number)} is not a whole number of 64 bits")
        item: dict[str, Any] = {
            "id": annotation_id,
            "bbox": box,
            "bbox_mode": XYWH_ABS,
            "category_id": category,
            "iscrowd": int(crowd),
        }
        if annotation_id is None:
            self.unnumbered.append(item)
            self._fill("no annotation id", "numbered", entry)
        elif annotation_id in self.seen:
            if self.seen[annotation_id] == (image_id, category, box):
                raise Fault("duplicate annotation", "the same object again, with the same id")
            self.unnumbered.append(item)
            self._fill("duplicate annotation id", "another object has this id: given a new one", entry)
        else:
            self.seen[annotation_id] = (image_id, category, box)  # type: ignore[assignment]
        if box_missing:
            self._fill("no box", "worked out from the segmentation", entry)
        if "iscrowd" not in entry:
            self._fill("no iscrowd", "taken as 0", entry)
        item["area"] = self._area(entry, box, segmentation, height, width)
        if segmentation is not None:
            item["segmentation"] = segmentation
        if self.metadata.num_keypoints:
            self.with_keypoints.append((item, entry.get("keypoints"), os.fspath(record["file_name"])))
        self.boxes += 1
        self.largest_side = max(self.largest_side, box[2], box[3])
        if outside:
            self.reaching_out.append((item, record))
        record["annotations"].append(item)

    def _fill(self, kind: str, reason: str, entry: dict[str, Any]) -> None:
        image_id = as_id(entry.get("image_id"))
        self.report.add(
            kind,
            "filled",
            reason,
            image=self._image_name(image_id),
            image_id=image_id,
            annotation_id=as_id(entry.get("id")),
        )

    def _segmentation(
        self, entry: dict[str, Any], height: int, width: int
    ) -> list[list[float]] | dict[str, Any] | None:
        segmentation = entry.get("segmentation")
        if not segmentation:
            return None
        if isinstance(segmentation, dict):
            return check_rle(segmentation, height, width)
        if not isinstance(segmentation, list):
            raise Fault("broken polygon", f"segmentation is a {json_type(segmentation)}, not polygons or RLE")
        if type(segmentation[0]) in (int, float):
            segmentation = [segmentation]
            self._fill("flat polygon", "read as a list of one polygon", entry)
        usable, faults = check_polygons(segmentation, height, width)
        if not usable:
            raise Fault("broken polygon", f"{faults[0]}; none is left")
        if faults:
            self._tell(Fault("broken polygon", f"{faults[0]}; the others are kept"), entry)
        return usable

    def _area(
        self, entry: dict[str, Any], box: list[float], segmentation: Any, height: int, width: int
    ) -> float:
        area = entry.get("area")
        if isinstance(area, (int, float)) and type(area) is not bool and 0 <= area <= 1e15:
            return float(area)
        if segmentation is None:
            self._fill("no area", "that of the box", entry)
            return box[2] * box[3]
        self._fill("no area", "that of the mask", entry)
        return float(mask_utils.area(mask_rle(segmentation, height, width)))

    def _read_keypoints(self) -> None:
        """All keypoints in one array: checking each number in Python would take longer than reading."""
        count = self.metadata.num_keypoints
        rows: list[Any] = []
        given: list[tuple[dict[str, Any], str]] = []
        # One list for all that have none: the file's size does not bound keypoints times objects.
        unlabelled = [0.5, 0.5, 0.0] * count
        for item, keypoints, path in self.with_keypoints:
            item["keypoints"] = unlabelled
            if not keypoints:
                continue
            if not isinstance(keypoints, list) or len(keypoints) != 3 * count:
                length = len(keypoints) if isinstance(keypoints, list) else quote(keypoints)
                self._drop_keypoints(
                    item, path, f"has {length} keypoint numbers, {count} keypoints need {3 * count}"
                )
            elif not set(map(type, keypoints)) <= {int, float}:
                self._drop_keypoints(item, path, "has something else than numbers among its keypoints")
            else:
                rows.append(keypoints)
                given.append((item, path))
        if not rows:
            return
        try:
            values = np.array(rows, dtype=np.float64)
        except OverflowError:  # a whole number of hundreds of digits
            values = np.zeros((len(rows), 3 * count))
            for number, row in enumerate(rows):
                try:
                    values[number] = np.array(row, dtype=np.float64)
                except OverflowError:
                    values[number] = np.nan
        values = values.reshape(len(rows), count, 3)
        finite: npt.NDArray[np.bool_] = np.all(np.abs(values) < 1e6, axis=(1, 2))  # False for NaN, too
        labels: npt.NDArray[np.bool_] = np.all(np.isin(values[:, :, 2], (0, 1, 2)), axis=1)
        for number in np.flatnonzero(~(finite & labels)).tolist():
            what = "a visibility that is not 0, 1 or 2" if finite[number] else "a number that is not finite"
            item, path = given[number]
            self._drop_keypoints(item, path, f"has {what} among its keypoints")
            values[number] = 0
        # A file's keypoints are indices of pixels; Detectron2 works with the middle of a pixel.
        values[:, :, :2] += 0.5
        for (item, _), numbers in zip(given, values.reshape(len(rows), -1).tolist(), strict=True):
            item["keypoints"] = numbers

    def _drop_keypoints(self, item: dict[str, Any], path: str, reason: str) -> None:
        self.report.add(
            "broken keypoints",
            "dropped",
            f"{reason}; the object stays, none of its keypoints count as labelled",
            image=os.path.relpath(path, self.metadata.image_root),
            annotation_id=item["id"],
        )

    def _number(self) -> None:
        number = max(self.seen, default=0)
        if number + len(self.unnumbered) >= 2**62:  # no room above: find free ids from 1 on
            number = 0
        for item in self.unnumbered:
            number += 1
            while number in self.seen:
                number += 1
            item["id"] = number

    def _tell_about_boxes(self) -> None:
        for item, record in self.reaching_out:
            self.report.add(
                "box reaches out of the image",
                "kept",
                f"bbox {item['bbox']} in an image of {record['width']}x{record['height']}; training clips it",
                image=os.path.relpath(record["file_name"], self.metadata.image_root),
                image_id=record["image_id"],
                annotation_id=item["id"],
            )
        if self.boxes >= 10 and len(self.reaching_out) > 0.3 * self.boxes:
            self.report.add(
                SUSPICIOUS,
                "kept",
                f"{len(self.reaching_out)} of {self.boxes} boxes reach out of their images: are they "
                "(x1, y1, x2, y2)? COCO's are (x, y, width, height)",
            )
        elif self.boxes >= 10 and self.largest_side <= 1:
            self.report.add(
                SUSPICIOUS,
                "kept",
                "no box is larger than a pixel: are they relative to the image's size? COCO's are in pixels",
            )
