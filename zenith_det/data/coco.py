"""COCO-format annotation files: read, checked, and handed on as Detectron2's standard records.

One pass reads and checks. What can be left out without harm (a box without area, a mask whose runs don't add
up) is dropped and counted; what is merely missing ("info", "area", "iscrowd") is filled in; what would train
or evaluate something else than the user meant (an image that isn't there, a category that isn't declared)
stops. The rule for what is dropped is the same whoever asks, so that all engines see the same objects.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from pycocotools import mask as mask_utils

from zenith_det import cli
from zenith_det.data import annotation_cache
from zenith_det.data.catalog import ROOT_VARIABLE, dataset_source, datasets_root, is_builtin
from zenith_det.data.checking import (
    EXAMPLES_KEPT,
    SUSPICIOUS,
    Action,
    DatasetReport,
    Fault,
    ImageCheck,
    ImageFile,
    Problem,
    as_id,
    check_box,
    check_file_name,
    check_image_files,
    check_polygons,
    check_rle,
    check_side,
    mask_rle,
    where_missing_images_are,
)
from zenith_det.data.garbage_collection import garbage_collection_off
from zenith_det.data.images import max_pixels
from zenith_det.data.metadata import COCO_KEYPOINT_NAMES, COCO_OKS_SIGMAS, DatasetMetadata
from zenith_det.errors import DatasetError, MissingDatasetError, is_printable, one_line, quote

logger = logging.getLogger(__name__)

#: Detectron2's ``BoxMode.XYWH_ABS``: absolute x, y, width, height.
XYWH_ABS = 1
#: The longest name of a category or a keypoint, in characters.
MAX_NAME = 500
#: Keypoints of one object; sets of faces have 478.
MAX_KEYPOINTS = 1000
_LEFT_AND_RIGHT = (("left", "right"), ("Left", "Right"), ("LEFT", "RIGHT"))
# How a keypoint's name tells its side: by the word anywhere; by the letter where it stands alone (l_hip, "hip L"),
# or is a word of its own in camel case (LHip, hipL).
_SIDE = re.compile(
    r"left|right|Left|Right|LEFT|RIGHT|(?<![^\W_])[lrLR](?=[\W_]|\Z|[A-Z][a-z])|(?<=[a-z])[LR](?=[\W_]|\Z)"
)
_OTHER_SIDE = {a: b for pair in (*_LEFT_AND_RIGHT, ("l", "r"), ("L", "R")) for a, b in (pair, pair[::-1])}
Source = str | tuple[str | os.PathLike[str], str | os.PathLike[str]]


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


# ---------------------------------------------------------------------------------------------- the file


def read_annotation_file(json_file: str) -> dict[str, Any]:
    """Read a COCO annotation file: a JSON object with lists ``images`` and ``categories``.

    Raises:
        DatasetError: missing, unreadable, not JSON (with the position), not of this form, or too large for the
            machine's memory.
    """
    return _parse(_read_bytes(json_file), json_file)


def _read_bytes(json_file: str) -> bytes:
    try:
        return Path(json_file).read_bytes()
    except FileNotFoundError:
        raise DatasetError(f"annotation file {json_file} does not exist") from None
    except (OSError, ValueError) as error:
        raise DatasetError(f"annotation file {json_file} can't be read: {one_line(str(error))}") from None
    except MemoryError:
        raise DatasetError(f"{json_file}: does not fit into memory") from None


def _parse(data: bytes, json_file: str) -> dict[str, Any]:
    try:
        with garbage_collection_off():
            content = _from_json(data, json_file)
    except MemoryError:
        raise DatasetError(f"{json_file}: does not fit into memory") from None
    if not isinstance(content, dict):
        raise DatasetError(
            f"{json_file}: not a COCO annotation file: a JSON object with images, annotations and categories "
            f"is needed, this is a {_json_type(content)}"
        )
    for key in ("images", "categories", "annotations"):
        # Test sets (image_info_test2017.json) have no annotations.
        if not isinstance(content.get(key, [] if key == "annotations" else None), list):
            found = f"a {_json_type(content[key])}" if key in content else "missing"
            raise DatasetError(
                f'{json_file}: not a COCO annotation file: "{key}" must be a list and is {found}'
            )
    return content


def _from_json(data: bytes, json_file: str) -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        pass  # Python's own takes three times as long. It also reads NaN, and knows the line of a mistake.
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{json_file}: not a JSON text file (byte {error.start} is not UTF-8)") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        end = " (where the file ends: is it cut off?)" if error.pos >= len(text.rstrip()) - 1 else ""
        raise DatasetError(
            f"{json_file}: not valid JSON at line {error.lineno}, column {error.colno}, "
            f"character {error.pos} of {len(text)}{end}: {error.msg}"
        ) from None
    except RecursionError:
        raise DatasetError(f"{json_file}: not an annotation file: its JSON is nested too deep") from None
    except ValueError as error:  # a whole number of thousands of digits
        raise DatasetError(f"{json_file}: not an annotation file: {one_line(str(error))}") from None


def _json_type(value: object) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "number")


# ---------------------------------------------------------------------------------------------- metadata


def _is_name(value: object) -> bool:
    """Whether it is a text that tables and log files can hold: JSON may hold halves of characters, too."""
    return (
        isinstance(value, str) and 0 < len(value) <= MAX_NAME and is_printable(value) and bool(value.strip())
    )


def _flip_map(names: Sequence[str], category: dict[str, Any], where: str) -> tuple[tuple[str, str], ...]:
    """Pairs that a mirror swaps: from ``flip_pairs`` if there, else names that differ in their sides."""
    given = category.get("flip_pairs")
    if given is not None:
        pairs, known = [], set(names)
        for pair in given if isinstance(given, list) else [given]:
            if not (
                isinstance(pair, list)
                and len(pair) == 2
                and all(isinstance(name, str) and name in known for name in pair)
            ):
                raise DatasetError(
                    f"{where}: flip_pairs must be a list of pairs of keypoint names, and has {quote(pair)}"
                )
            pairs.append((pair[0], pair[1]))
        flat = [name for pair in pairs for name in pair]
        if len(set(flat)) != len(flat):
            raise DatasetError(f"{where}: flip_pairs names a keypoint twice")
        return tuple(pairs)
    found: list[tuple[str, str]] = []
    unpaired = set(names)
    for attempt in zip(*map(_names_in_a_mirror, names)):
        for name, mirrored in zip(names, attempt):
            if name != mirrored and {name, mirrored} <= unpaired:
                found.append((name, mirrored))
                unpaired -= {name, mirrored}
    return tuple(found)


def _names_in_a_mirror(name: str) -> list[str]:
    """What a keypoint may become in a mirror, the surest first."""
    # All sides at once (left_eye_r is right_eye_l), then one word alone: left_upright is right_upright.
    swapped = _SIDE.sub(lambda side: _OTHER_SIDE[side[0]], name)
    return [swapped, *(name.replace(left, right) for left, right in _LEFT_AND_RIGHT)]


def _keypoints(
    categories: list[dict[str, Any]], json_file: str
) -> tuple[
    tuple[str, ...], tuple[tuple[str, str], ...], tuple[tuple[int, int], ...], tuple[float, ...], bool
]:
    """Of the categories that declare keypoints: names, flip pairs, bones (0-based), sigmas; are the pairs given?"""
    declaring = [c for c in categories if c.get("keypoints")]
    if not declaring:
        return (), (), (), (), False
    category = declaring[0]
    where = f"{json_file}: category {quote(category['name'])}"
    names = category["keypoints"]
    if not isinstance(names, list) or not all(map(_is_name, names)):
        raise DatasetError(f"{where}: keypoints must be a list of names")
    if len(names) > MAX_KEYPOINTS:
        raise DatasetError(f"{where}: {len(names)} keypoints: {MAX_KEYPOINTS} at most")
    if len(set(names)) != len(names):
        raise DatasetError(f"{where}: two keypoints have the same name")
    for other in declaring[1:]:
        if other["keypoints"] != names:
            raise DatasetError(
                f"{where} and category {quote(other['name'])} have different keypoints: "
                "one model has one list of keypoints"
            )
    bones = []
    skeleton = category.get("skeleton") or []
    for bone in skeleton if isinstance(skeleton, list) else [skeleton]:
        ends = [as_id(end) for end in bone] if isinstance(bone, list) else []
        if len(ends) != 2 or not all(end is not None and 1 <= end <= len(names) for end in ends):
            raise DatasetError(
                f"{where}: skeleton has {quote(bone)}, not a pair of keypoint numbers, 1 to {len(names)}"
            )
        bones.append((int(ends[0] or 0) - 1, int(ends[1] or 0) - 1))
    sigmas: tuple[float, ...] = ()
    if category.get("sigmas"):
        try:
            sigmas = tuple(float(sigma) for sigma in category["sigmas"])
        except (TypeError, ValueError, OverflowError):
            sigmas = ()
        if len(sigmas) != len(names) or not all(0 < sigma < 10 for sigma in sigmas):
            raise DatasetError(f"{where}: sigmas must be {len(names)} positive numbers, one per keypoint")
    elif tuple(names) == COCO_KEYPOINT_NAMES:
        sigmas = COCO_OKS_SIGMAS
    given = category.get("flip_pairs") is not None
    return tuple(names), _flip_map(names, category, where), tuple(bones), sigmas, given


def _metadata(
    content: dict[str, Any], name: str, json_file: str, image_root: str, classes: Sequence[str] | None
) -> DatasetMetadata:
    categories: list[dict[str, Any]] = []
    for entry in content["categories"]:
        if (
            not isinstance(entry, dict)
            or as_id(entry.get("id")) is None
            or not isinstance(entry.get("name"), str)
        ):
            raise DatasetError(
                f"{json_file}: a category needs a whole number as id (of 64 bits at most) and a name, "
                f"this has not: {quote(entry)}"
            )
        if not _is_name(entry["name"]):
            raise DatasetError(
                f"{json_file}: category {entry['id']} has the name {quote(entry['name'])}: one line of "
                f"printable characters is needed, {MAX_NAME} at most"
            )
        categories.append({**entry, "id": as_id(entry["id"])})
    if not categories:
        raise DatasetError(f'{json_file}: "categories" is empty: no class to find')
    categories.sort(key=lambda category: category["id"])
    for key in ("id", "name"):
        seen: set[Any] = set()
        for category in categories:
            if category[key] in seen:
                raise DatasetError(f"{json_file}: two categories have the {key} {quote(category[key])}")
            seen.add(category[key])
    names = tuple(category["name"] for category in categories)
    order = tuple(classes) if classes is not None else names
    if set(order) != set(names):
        missing, extra = sorted(set(order) - set(names)), sorted(set(names) - set(order))
        told = [f"lacks {one_line(', '.join(missing))}"] * bool(missing)
        told += [f"has besides {one_line(', '.join(extra))}"] * bool(extra)
        raise DatasetError(
            f"{json_file}: its categories are not those of the training set: it {' and '.join(told)} "
            "(they are matched by name, ids may differ)"
        )
    index = {category: number for number, category in enumerate(order)}
    keypoint_names, flip_map, bones, sigmas, given = _keypoints(categories, json_file)
    return DatasetMetadata(
        name=name,
        json_file=json_file,
        image_root=image_root,
        thing_classes=order,
        thing_dataset_id_to_contiguous_id={c["id"]: index[c["name"]] for c in categories},
        keypoint_names=keypoint_names,
        keypoint_flip_map=flip_map,
        keypoint_connections=bones,
        keypoint_oks_sigmas=sigmas,
        flip_pairs_given=given,
    )


# ---------------------------------------------------------------------------------------------- images


def _declared_size(entry: dict[str, Any]) -> tuple[int | None, int | None]:
    if entry.get("height") is None and entry.get("width") is None:
        return None, None
    height, width = check_side(entry.get("height")), check_side(entry.get("width"))
    if height is None or width is None:
        raise Fault(
            "wrong image size",
            f"height {quote(entry.get('height'))}, width {quote(entry.get('width'))} are no image size",
        )
    if height * width > max_pixels():
        raise Fault("image too large", f"declared as {width}x{height}: more than {max_pixels()} pixels")
    return height, width


def _read_images(
    entries: list[Any],
    metadata: DatasetMetadata,
    report: DatasetReport,
    check: ImageCheck,
    max_bad_images: int,
) -> tuple[dict[int, dict[str, Any]], set[int]]:
    """Records (without objects) by image id, sorted, and the ids of the images that were left out."""
    # Of bad images no more is kept than the report keeps: a file may list millions.
    faults: list[tuple[str | None, int | None, str, str]] = []
    counts: dict[str, int] = {}
    left_out: set[int] = set()

    def leave_out(name: str | None, image_id: int | None, fault: Fault) -> None:
        counts[fault.kind] = counts.get(fault.kind, 0) + 1
        if counts[fault.kind] <= EXAMPLES_KEPT:
            faults.append((name, image_id, fault.kind, fault.reason))
        if image_id is not None:
            left_out.add(image_id)

    listed: dict[int, tuple[str, ImageFile]] = {}
    for entry in entries:
        name, image_id = None, None
        try:
            if not isinstance(entry, dict):
                raise Fault("broken image entry", f"an entry of images is {quote(entry)}")
            name = entry.get("file_name")
            image_id = as_id(entry.get("id"))
            if image_id is None:
                raise Fault("bad image id", f"id {quote(entry.get('id'))} is not a whole number of 64 bits")
            path = check_file_name(name, metadata.image_root)
            if image_id in listed:
                if listed[image_id][0] != name:
                    raise DatasetError(
                        f"{metadata.json_file}: two images have the id {image_id}: "
                        f"{one_line(listed[image_id][0])} and {one_line(name)}; which one its annotations "
                        "belong to can't be known"
                    )
                report.add("duplicate image", "dropped", "listed twice", image=name, image_id=image_id)
                continue
            listed[image_id] = (str(name), ImageFile(path, *_declared_size(entry)))
        except Fault as fault:
            leave_out(name if isinstance(name, str) else None, image_id, fault)

    records: dict[int, dict[str, Any]] = {}
    ids = sorted(listed)
    found = check_image_files([listed[image_id][1] for image_id in ids], check)
    for image_id, result in zip(ids, found, strict=True):
        name, file = listed[image_id]
        if isinstance(result, Fault):
            leave_out(name, image_id, result)
            continue
        if file.height is None:
            report.add("no image size", "filled", "read from the image", image=name, image_id=image_id)
        height, width = result
        records[image_id] = {
            "file_name": file.path,
            "height": height,
            "width": width,
            "image_id": image_id,
            "annotations": [],
        }
    action: Action = "dropped" if sum(counts.values()) <= max_bad_images else "stops"
    for name, image_id, kind, reason in faults:
        report.add(kind, action, reason, image=name, image_id=image_id)
    for kind, count in counts.items():
        report.counts[kind, action] += max(0, count - EXAMPLES_KEPT)
    missing = [name for name, _, kind, _ in faults if kind == "missing file" and name]
    if counts.get("missing file", 0) > 0.9 * len(entries):
        report.hint = where_missing_images_are(missing, metadata.image_root)
    return records, left_out - records.keys()


# ---------------------------------------------------------------------------------------------- annotations


class _AnnotationReader:
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
            raise Fault(
                "broken polygon", f"segmentation is a {_json_type(segmentation)}, not polygons or RLE"
            )
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


# ---------------------------------------------------------------------------------------------- the dataset


def _resolve(source: Source, name: str | None) -> tuple[str, str, str]:
    """(name, annotation file, image folder), the paths absolute."""
    if isinstance(source, str):
        json_file, image_root = dataset_source(source)
        name = name or source
    else:
        json_file, image_root = (os.fspath(part) for part in source)
        name = name or Path(json_file).stem
    json_file, image_root = (os.path.abspath(os.path.expanduser(part)) for part in (json_file, image_root))
    hint = ""
    if isinstance(source, str) and is_builtin(source):
        hint = f" ({ROOT_VARIABLE} is {datasets_root()!r}; datasets/README.md shows the layout)"
    if not os.path.isfile(json_file):
        raise MissingDatasetError(f"dataset {name}: annotation file {json_file} does not exist{hint}")
    if not os.path.isdir(image_root):
        raise MissingDatasetError(f"dataset {name}: image folder {image_root} does not exist{hint}")
    return name, json_file, image_root


def examine_coco_dataset(
    source: Source,
    *,
    name: str | None = None,
    check_images: ImageCheck = "header",
    classes: Sequence[str] | None = None,
    max_bad_images: int = 0,
) -> CocoDataset:
    """As :func:`load_coco_dataset`, but return a dataset that can't be used as well, its report saying why.

    Raises:
        DatasetError: the annotation file can't be made sense of at all.
    """
    return _examine(source, name, check_images, classes, max_bad_images, cache=False)


def _examine(
    source: Source,
    name: str | None,
    check_images: ImageCheck,
    classes: Sequence[str] | None,
    max_bad_images: int,
    *,
    cache: bool,
) -> CocoDataset:
    name, json_file, image_root = _resolve(source, name)
    circumstances = (image_root, max_pixels())
    if cache:
        digest = annotation_cache.digest_of_file(json_file)
        if digest is not None:
            entry = annotation_cache.Entry(digest, *circumstances)
            dataset = _remembered(entry, name, json_file, image_root, classes, check_images)
            if dataset is not None:
                return dataset
    data = _read_bytes(json_file)
    cache = cache and len(data) >= annotation_cache.SMALLEST
    # Of the very bytes that are parsed: the file may have changed just now.
    digest = annotation_cache.digest_of(data) if cache else b""
    content = _parse(data, json_file)
    del data
    metadata = _metadata(content, name, json_file, image_root, classes)
    report = DatasetReport(name, num_classes=metadata.num_classes)
    with garbage_collection_off():
        records, left_out = _read_images(content["images"], metadata, report, check_images, max_bad_images)
        _AnnotationReader(records, left_out, metadata, report).read(content.get("annotations", []))
    for key in ("info", "licenses"):
        if key not in content:
            report.add(f"no {key}", "filled", f'the file has no "{key}"; evaluation gets an empty one')
    report.num_images = len(records)
    report.num_annotations = sum(len(record["annotations"]) for record in records.values())
    without = [r for r in records.values() if all(a["iscrowd"] for a in r["annotations"])]
    report.num_without_objects = len(without)
    if not records and not report.count("stops"):
        report.add(
            "no images", "stops", "no image is listed" if not content["images"] else "no image is left"
        )
    dataset = CocoDataset(metadata, list(records.values()), report)
    # With an image left out, its annotations are, too: the outcome is not the annotation file's alone.
    if cache and len(records) == len(content["images"]) and not report.count("stops"):
        _remember(annotation_cache.Entry(digest, *circumstances), dataset, content)
    return dataset


def _remember(entry: annotation_cache.Entry, dataset: CocoDataset, content: dict[str, Any]) -> None:
    """Keep the outcome of :func:`_examine`; all images were found, and of the size that is declared."""
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
    undeclared = {e["id"] for e in content["images"] if e.get("height") is None and e.get("width") is None}
    entry.write(
        {
            "categories": content["categories"],
            "classes": dataset.metadata.thing_classes,
            "records": records,
            "undeclared": [n for n, record in enumerate(records) if record["image_id"] in undeclared],
            "problems": [
                [p.kind, p.action, p.image, p.image_id, p.annotation_id, p.reason] for p in report.problems
            ],
            "counts": [[kind, action, count] for (kind, action), count in report.counts.items()],
            "numbers": [report.num_images, report.num_annotations, report.num_without_objects],
        }
    )


def _remembered(
    entry: annotation_cache.Entry,
    name: str,
    json_file: str,
    image_root: str,
    classes: Sequence[str] | None,
    check_images: ImageCheck,
) -> CocoDataset | None:
    """What :func:`_remember` kept; ``None`` if there is nothing, or an image has changed since.

    Raises:
        DatasetError: its categories are not ``classes``.
    """
    with garbage_collection_off():
        kept = entry.read()
        if kept is None:
            return None
        try:
            metadata = _metadata(kept, name, json_file, image_root, classes)
            records = kept["records"]
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
            _restore(records, metadata, kept["classes"])
            report = DatasetReport(name, num_classes=metadata.num_classes)
            report.num_images, report.num_annotations, report.num_without_objects = kept["numbers"]
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
    order = [index[category] for category in classes]
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


def load_coco_dataset(
    source: Source,
    *,
    strict: bool = False,
    check_images: ImageCheck = "header",
    classes: Sequence[str] | None = None,
    max_bad_images: int = 0,
    name: str | None = None,
    cache: bool = False,
) -> CocoDataset:
    """Read and check a COCO-format dataset.

    Args:
        source: a dataset's name (see :mod:`zenith_det.data.catalog`) or (annotation file, image folder).
        strict: refuse the dataset when anything had to be dropped, or its boxes are suspicious as a whole.
        check_images: ``header`` opens each image and compares its size; ``full`` decodes it as well;
            ``none`` opens only those whose size isn't declared.
        classes: class names of the training set, for any other set: categories are then matched by name and
            ``category_id`` indexes ``classes``.
        max_bad_images: up to this many missing or unusable images are dropped; one more stops.
        name: for the metadata and messages; default: the source's name or the file's stem.
        cache: take the annotations from the last time that a file of the same content was read, and keep them
            for the next; see :mod:`zenith_det.data.annotation_cache`. Images are checked each time.

    Raises:
        DatasetError: the set can't be used, or is refused as ``strict`` says.
    """
    dataset = _examine(source, name, check_images, classes, max_bad_images, cache=cache)
    report = dataset.report
    refused: tuple[Action, ...] = ("stops", "dropped") if strict else ("stops",)
    for action in refused:
        first = report.first(action)
        if first is not None:
            reason = "can't be used" if action == "stops" else "is refused by the strict check"
            hint = f"; {report.hint}" if report.hint else ""
            raise DatasetError(
                f"{dataset.metadata.json_file} {reason}: {report.kinds(action)}; the first: {first}{hint} "
                f"({cli.command('check-dataset')} lists them all)"
            )
    suspicions = report.suspicions()
    if strict and suspicions:
        raise DatasetError(f"{dataset.metadata.json_file} is refused by the strict check: {suspicions[0]}")
    logger.info(report.summary())
    for suspicion in suspicions:
        logger.warning("%s: %s", report.name, suspicion)
    if report.count("dropped"):
        logger.warning("Dropped from %s:\n%s", report.name, report.table())
    return dataset


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
