"""An annotation file's ``annotations``: read, checked, and put into the records of their images."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as mask_utils

from zenith_det.data.annotation_file import json_type
from zenith_det.data.crowds import Crowd, Crowds, settle_crowds
from zenith_det.data.metadata import DatasetMetadata
from zenith_det.data.problems import SUSPICIOUS, Action, DatasetReport, Fault
from zenith_det.data.segmentations import (
    MAX_POLYGONS,
    check_polygons,
    check_rle,
    mask_rle,
    polygons_in,
    rle_in,
)
from zenith_det.data.values import MAX_ID, as_flag, as_id, box_in, check_box, number_in
from zenith_det.errors import quote

#: Detectron2's ``BoxMode.XYWH_ABS``: absolute x, y, width, height.
XYWH_ABS = 1
#: From this many boxes on, what they look like as a whole says something.
MANY_BOXES = 10


class AnnotationReader:
    """Turns the entries of ``annotations`` into objects of records.

    Args:
        records: by image id; their ``annotations`` are filled.
        left_out: ids of images that can't be used.
        metadata: of the file's categories.
        report: takes what is found.
        aliases: ids of categories that became part of another -> that one's id.
        numbered: image ids that are no numbers -> the number given.
        crowds: what ``iscrowd`` 1 means.
    """

    def __init__(
        self,
        records: dict[int, dict[str, Any]],
        left_out: set[int],
        metadata: DatasetMetadata,
        report: DatasetReport,
        *,
        aliases: Mapping[int, int],
        numbered: Mapping[str, int],
        crowds: Crowds = "auto",
    ) -> None:
        self.records, self.left_out, self.metadata, self.report = records, left_out, metadata, report
        self.classes = dict(metadata.thing_dataset_id_to_contiguous_id)
        self.classes |= {
            alias: self.classes[meant] for alias, meant in aliases.items() if meant in self.classes
        }
        self.numbered = numbered
        self.texts: list[str] = []  # keys of the entry being read whose numbers are texts
        self.undeclared_keypoints: Counter[int] = Counter()  # length of the list -> objects
        self.seen: dict[int, tuple[int, Any, Any]] = {}  # annotation id -> image id, category, box
        self.unnumbered: list[dict[str, Any]] = []
        self.with_keypoints: list[tuple[dict[str, Any], Any, str]] = []
        self.reaching_out: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.crowds: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.plain: Counter[int] = Counter()  # class -> objects that are no crowds
        self.meaning_of_crowds = crowds
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
        self._settle_crowds()
        self._tell_about_boxes()

    def keypoint_fault(self) -> str:
        """Why keypoints of these annotations can't be trained, where no category names any; "" otherwise."""
        if not self.undeclared_keypoints or self.metadata.keypoint_fault:
            return ""
        length = self.undeclared_keypoints.most_common(1)[0][0]
        return (
            f"{self.undeclared_keypoints.total()} annotations have keypoints ({length} numbers: {length // 3} "
            'keypoints), and no category has "keypoints", the list of their names: add it to the category'
        )

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
        self.texts.clear()
        image_id = entry.get("image_id")
        if type(image_id) is not int:
            image_id = self._image_id(image_id)
        record = self.records.get(image_id) if image_id is not None else None
        if record is None:
            if image_id in self.left_out:
                raise Fault("annotation of an image left out", "its image can't be used")
            raise Fault("unknown image id", f"image_id {quote(entry.get('image_id'))} is not in images")
        category_id = entry.get("category_id")
        category = self.classes.get(category_id) if type(category_id) is int else None
        if category is None:
            category = self._category(category_id, entry)
        crowd = self._crowd(entry)
        height, width = record["height"], record["width"]
        segmentation = self._segmentation(entry, height, width)
        box = entry.get("bbox")
        if segmentation is None and (box is None or box == []):
            raise Fault("no box", "has neither bbox nor a segmentation that can be used")
        try:
            box, outside = check_box(box, height, width)
        except Fault as fault:
            box, outside = self._other_box(fault, entry, segmentation, height, width)

        number = entry.get("id")
        annotation_id = number if type(number) is int else as_id(number)
        if annotation_id is not None:
            if isinstance(number, str):
                self.texts.append("id")
            elif abs(annotation_id) > MAX_ID:
                annotation_id = None
        item: dict[str, Any] = {
            "id": annotation_id,
            "bbox": box,
            "bbox_mode": XYWH_ABS,
            "category_id": category,
            "iscrowd": crowd,
        }
        if annotation_id is None:
            self.unnumbered.append(item)
            reason = "numbered" if number is None else f"id {quote(number)} is no whole number: numbered"
            self._fill("no annotation id", reason, entry)
        elif annotation_id in self.seen:
            if self.seen[annotation_id] == (image_id, category, box):
                raise Fault("duplicate annotation", "the same object again, with the same id")
            self.unnumbered.append(item)
            self._fill("duplicate annotation id", "another object has this id: given a new one", entry)
        else:
            self.seen[annotation_id] = (image_id, category, box)  # type: ignore[assignment]
        if "iscrowd" not in entry:
            self._fill("no iscrowd", "taken as 0", entry)
        item["area"] = self._area(entry, box, segmentation, height, width)
        if self.texts:
            self._fill("number as text", f"{', '.join(self.texts)}: read as numbers", entry)
        if segmentation is not None:
            item["segmentation"] = segmentation
        keypoints = entry.get("keypoints")
        if self.metadata.num_keypoints:
            self.with_keypoints.append((item, keypoints, os.fspath(record["file_name"])))
        elif keypoints:
            self.undeclared_keypoints[len(keypoints) if isinstance(keypoints, list) else 0] += 1
        self.boxes += 1
        self.largest_side = max(self.largest_side, box[2], box[3])
        if outside:
            self.reaching_out.append((item, record))
        if not crowd:
            self.plain[category] += 1
        elif not entry.get("ignore"):
            self.crowds.append((item, record))
        record["annotations"].append(item)

    def _other_box(
        self, fault: Fault, entry: dict[str, Any], segmentation: Any, height: int, width: int
    ) -> tuple[list[float], bool]:
        """The box that is meant where ``bbox`` is none: in another form, or that of the mask."""
        given = entry.get("bbox")
        other = box_in(given)
        if other != given:
            with contextlib.suppress(Fault):
                box, outside = check_box(other, height, width)
                if isinstance(given, list) and len(given) == 4:
                    self.texts.append("bbox")
                else:
                    self._fill("box in another form", f"{quote(given)} read as {box}", entry)
                return box, outside
        if segmentation is None:
            raise fault
        of_mask = mask_utils.toBbox(mask_rle(segmentation, height, width)).tolist()
        box, outside = check_box(of_mask, height, width)
        missing = given is None or given == []
        self._fill(
            "no box" if missing else "no usable box",
            f"{'' if missing else fault.reason + ': '}worked out from the segmentation",
            entry,
        )
        return box, outside

    def _image_id(self, value: Any) -> int | None:
        number = as_id(value)
        if number is None:
            return self.numbered.get(value.strip()) if isinstance(value, str) else None
        if isinstance(value, str):
            self.texts.append("image_id")
        return number

    def _category(self, value: Any, entry: dict[str, Any]) -> int:
        """The class of a ``category_id`` that is not simply one of the file's ids."""
        number = as_id(value)
        if number is not None:
            if number in self.classes:
                if isinstance(value, str):
                    self.texts.append("category_id")
                return self.classes[number]
        elif isinstance(value, str) and value.strip() in self.metadata.thing_classes:
            self._fill("category by its name", "category_id is the category's name", entry)
            return self.metadata.thing_classes.index(value.strip())
        ids = sorted(self.classes)
        raise Fault(
            "unknown category id",
            f"category_id {quote(value)} is not in categories, which have "
            + (f"the ids {ids[0]} to {ids[-1]}" if len(ids) > 1 else f"the id {ids[0]}"),
        )

    def _crowd(self, entry: dict[str, Any]) -> int:
        given = entry.get("iscrowd", 0)
        crowd = given if type(given) is int and given in (0, 1) else as_flag(given)
        if crowd is None:
            raise Fault("broken iscrowd", f"iscrowd is {quote(given)}, not 0 or 1")
        if isinstance(given, str):
            self.texts.append("iscrowd")
        ignore = entry.get("ignore")
        if ignore and not crowd and as_flag(ignore) != 0:
            # pycocotools sets "ignore" to "iscrowd": a region to ignore is one that counts for nothing.
            self.report.add(
                "ignore flag",
                "kept",
                'has "ignore": taken as iscrowd 1, neither trained nor counted in AP',
                image=self._image_name(as_id(entry.get("image_id"))),
                annotation_id=as_id(entry.get("id")),
            )
            crowd = 1
        return crowd

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
        """The usable mask; None where there is none, and the object keeps its box."""
        segmentation = entry.get("segmentation")
        if not segmentation:
            return None
        try:
            if isinstance(segmentation, list):
                if isinstance(segmentation[0], dict) and "counts" in segmentation[0]:
                    return self._several_rles(segmentation, entry, height, width)
                return self._polygons(segmentation, entry, height, width)
            if isinstance(segmentation, dict):
                return self._rle(segmentation, entry, height, width)
            raise Fault("broken polygon", f"segmentation is a {json_type(segmentation)}, not polygons or RLE")
        except Fault as fault:
            if entry.get("bbox"):
                reason = f"{fault.reason}; the object keeps its box, and has no mask"
                self._tell(Fault(fault.kind, reason), entry)
            return None

    def _polygons(
        self, segmentation: list[Any], entry: dict[str, Any], height: int, width: int
    ) -> list[list[float]]:
        if type(segmentation[0]) in (int, float):
            segmentation = [segmentation]
            self._fill("flat polygon", "read as a list of one polygon", entry)
        usable, faults = check_polygons(segmentation, height, width)
        if faults:
            others, other_faults = check_polygons(polygons_in(segmentation), height, width)
            if len(others) > len(usable):
                usable, faults = others, other_faults
                self._fill("polygon in another form", "read as lists of x and y", entry)
        if not usable:
            raise Fault("broken polygon", f"{faults[0]}; none is left")
        if faults:
            self._tell(Fault("broken polygon", f"{faults[0]}; the others are kept"), entry)
        return usable

    def _rle(
        self, segmentation: dict[str, Any], entry: dict[str, Any], height: int, width: int
    ) -> dict[str, Any]:
        try:
            return check_rle(segmentation, height, width)
        except Fault:
            mask = check_rle(rle_in(segmentation, height, width), height, width)
            self._fill("RLE in another form", "read as size and runs in whole numbers", entry)
            return mask

    def _several_rles(
        self, parts: list[Any], entry: dict[str, Any], height: int, width: int
    ) -> dict[str, Any]:
        if len(parts) > MAX_POLYGONS or not all(isinstance(part, dict) for part in parts):
            raise Fault("broken RLE", f"segmentation is a list of {len(parts)}, not of RLEs alone")
        masks = [check_rle(rle_in(part, height, width), height, width) for part in parts]
        self._fill("RLE in another form", f"a list of {len(masks)}: read as their union", entry)
        return masks[0] if len(masks) == 1 else dict(mask_utils.merge(masks))

    def _area(
        self, entry: dict[str, Any], box: list[float], segmentation: Any, height: int, width: int
    ) -> float:
        given = entry.get("area")
        area = given if type(given) in (int, float) else number_in(given)
        of_box = box[2] * box[3]
        # Below a pixel and a hundredth of the box it is no area in pixels: relative to the image's, or unset.
        if area is not None and 0 < area <= 1e15 and (area >= 1 or area >= of_box / 100):
            if isinstance(given, str):
                self.texts.append("area")
            return float(area)
        of_mask = 0.0
        if segmentation is not None:
            of_mask = float(mask_utils.area(mask_rle(segmentation, height, width)))
        which = "that of the mask" if of_mask else "that of the box"
        if given is None:
            self._fill("no area", which, entry)
        else:
            self._fill("no usable area", f"area {quote(given)} is none in pixels: {which}", entry)
        return of_mask or of_box

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
            if not isinstance(keypoints, list) or set(map(type, keypoints)) - {int, float}:
                keypoints = self._keypoints_in(keypoints, item, path)
            if not isinstance(keypoints, list) or len(keypoints) != 3 * count:
                length = len(keypoints) if isinstance(keypoints, list) else quote(keypoints)
                self._drop_keypoints(
                    item, path, f"has {length} keypoint numbers, {count} keypoints need {3 * count}"
                )
            elif set(map(type, keypoints)) - {int, float}:
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
        unseen = (values[:, :, 2] == 0).all(axis=1) & (values[:, :, :2] != 0).any(axis=(1, 2))
        for number in np.flatnonzero(unseen).tolist():
            item, path = given[number]
            self.report.add(
                "keypoints all unlabelled",
                "kept",
                "its keypoints have coordinates, but each has visibility 0, which is COCO's for not labelled",
                image=os.path.relpath(path, self.metadata.image_root),
                annotation_id=item["id"],
            )
        # A file's keypoints are indices of pixels; Detectron2 works with the middle of a pixel.
        values[:, :, :2] += 0.5
        for (item, _), numbers in zip(given, values.reshape(len(rows), -1).tolist(), strict=True):
            item["keypoints"] = numbers

    def _keypoints_in(self, keypoints: Any, item: dict[str, Any], path: str) -> Any:
        """Keypoints written as points or as texts, in COCO's form; any others as they are."""
        parts = keypoints if isinstance(keypoints, list) else [keypoints]
        if all(isinstance(part, list) and len(part) == 3 for part in parts):
            parts = [number for part in parts for number in part]
        numbers = [number_in(part) for part in parts]
        if None in numbers:
            return keypoints
        self.report.add(
            "keypoints in another form",
            "filled",
            "read as a list of x, y and visibility",
            image=os.path.relpath(path, self.metadata.image_root),
            annotation_id=item["id"],
        )
        return numbers

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

    def _settle_crowds(self) -> None:
        root = self.metadata.image_root
        crowds = [
            Crowd(item, os.path.relpath(record["file_name"], root), record["image_id"])
            for item, record in self.crowds
        ]
        settle_crowds(crowds, self.plain, self.metadata, self.report, self.meaning_of_crowds)

    def _tell_about_boxes(self) -> None:
        if self.boxes >= MANY_BOXES and len(self.reaching_out) > 0.3 * self.boxes:
            told = f"{len(self.reaching_out)} of {self.boxes} boxes reach out of their images"
            if self._take_as_corners():
                self.report.add(
                    SUSPICIOUS,
                    "filled",
                    f"{told} as (x, y, width, height), COCO's form, and each fits as (x1, y1, x2, y2): read as that",
                )
                return
            self.report.add(
                SUSPICIOUS,
                "kept",
                f"{told}: are they (x1, y1, x2, y2)? COCO's are (x, y, width, height)",
            )
        elif self.boxes >= MANY_BOXES and self.largest_side <= 1:
            self._tell_of_tiny_boxes()
        for item, record in self.reaching_out:
            self.report.add(
                "box reaches out of the image",
                "kept",
                f"bbox {item['bbox']} in an image of {record['width']}x{record['height']}; training clips it",
                image=os.path.relpath(record["file_name"], self.metadata.image_root),
                image_id=record["image_id"],
                annotation_id=item["id"],
            )

    def _take_as_corners(self) -> bool:
        """Read each box as (x1, y1, x2, y2), where that fits every object, its image and its polygons."""
        changed: list[tuple[dict[str, Any], list[float]]] = []
        for record in self.records.values():
            for item in record["annotations"]:
                left, top, right, bottom = item["bbox"]
                fits = left < right <= record["width"] + 1 and top < bottom <= record["height"] + 1
                if not fits or not _holds(item["bbox"], item.get("segmentation")):
                    return False
                changed.append((item, [left, top, right - left, bottom - top]))
        for item, box in changed:
            if item["area"] == item["bbox"][2] * item["bbox"][3]:  # filled from the box, which was misread
                item["area"] = box[2] * box[3]
            item["bbox"] = box
        return True

    def _tell_of_tiny_boxes(self) -> None:
        within_one = all(
            item["bbox"][0] + item["bbox"][2] <= 1.001 and item["bbox"][1] + item["bbox"][3] <= 1.001
            for record in self.records.values()
            for item in record["annotations"]
        )
        if within_one:
            self.report.add(
                "relative boxes",
                "stops",
                f"all {self.boxes} boxes lie between 0 and 1, as shares of the image's size; COCO's are in "
                "pixels: multiply x and width by the image's width, y and height by its height",
            )
        else:
            self.report.add(
                SUSPICIOUS,
                "kept",
                "no box is larger than a pixel: are they relative to the image's size? COCO's are in pixels",
            )


def _holds(corners: list[float], segmentation: Any) -> bool:
    """Whether polygons, if there are any, end where a box of these corners does."""
    if not isinstance(segmentation, list):
        return True
    xs = [x for polygon in segmentation for x in polygon[0::2]]
    ys = [y for polygon in segmentation for y in polygon[1::2]]
    extent = (min(xs), min(ys), max(xs), max(ys))
    return all(
        abs(a - b) <= 2 + 0.05 * (corners[2] - corners[0]) for a, b in zip(corners, extent, strict=True)
    )
