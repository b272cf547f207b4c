"""An annotation file's ``images``: read, and looked up on disk."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from zenith_det.data.declared_sizes import fit_the_pictures, reaches_out
from zenith_det.data.depth import depth_of, tell_of_depth
from zenith_det.data.image_files import (
    MISSING,
    OUTSIDE,
    ImageCheck,
    ImageFile,
    OtherSize,
    check_file_name,
    check_image_files,
)
from zenith_det.data.images import ValueRange, max_pixels
from zenith_det.data.metadata import DatasetMetadata
from zenith_det.data.missing_images import files_below, find_images, where_missing_images_are
from zenith_det.data.problems import EXAMPLES_KEPT, WRONG_SIZE, Action, DatasetReport, Fault
from zenith_det.data.values import MAX_ID, as_id, check_side, number_in
from zenith_det.errors import DatasetError, one_line, quote


@dataclass
class ReadImages:
    """What became of ``images``.

    Attributes:
        records: without objects, by image id, sorted.
        left_out: ids of images that can't be used.
        numbered: ids that are no numbers -> the number that was given.
        undeclared: ids of images whose size was read from the file.
        renamed: image id -> the path that the annotation file names, of images found elsewhere.
    """

    records: dict[int, dict[str, Any]] = field(default_factory=dict)
    left_out: set[int] = field(default_factory=set)
    numbered: dict[str, int] = field(default_factory=dict)
    undeclared: set[int] = field(default_factory=set)
    renamed: dict[int, str] = field(default_factory=dict)


@dataclass
class _Listed:
    name: str
    path: str  # "" where the name leads out of the image folder
    height: int | None
    width: int | None


def _declared_size(entry: dict[str, Any]) -> tuple[int | None, int | None]:
    """(height, width); none where either is missing, null or 0, which is what some tools write for unknown."""
    given = entry.get("height"), entry.get("width")
    if any(side is None or number_in(side) == 0 for side in given):
        return None, None
    height, width = map(check_side, given)
    if height is None or width is None:
        raise Fault(WRONG_SIZE, f"height {quote(given[0])}, width {quote(given[1])} are no image size")
    if height * width > max_pixels():
        raise Fault("image too large", f"declared as {width}x{height}: more than {max_pixels()} pixels")
    return height, width


class _LeftOut:
    """Images that can't be used: no more of them is kept than the report keeps, as a file may list millions."""

    def __init__(self) -> None:
        self.faults: list[tuple[str | None, int | None, str, str]] = []
        self.counts: Counter[str] = Counter()
        self.ids: set[int] = set()

    def add(self, name: str | None, image_id: int | None, fault: Fault) -> None:
        self.counts[fault.kind] += 1
        if self.counts[fault.kind] <= EXAMPLES_KEPT:
            self.faults.append((name, image_id, fault.kind, fault.reason))
        if image_id is not None:
            self.ids.add(image_id)

    def tell(self, report: DatasetReport, max_bad_images: int) -> None:
        report.bad_images = self.counts.total()
        action: Action = "dropped" if report.bad_images <= max_bad_images else "stops"
        for name, image_id, kind, reason in self.faults:
            report.add(kind, action, reason, image=name, image_id=image_id)
        for kind, count in self.counts.items():
            report.counts[kind, action] += max(0, count - EXAMPLES_KEPT)


def read_images(
    entries: list[Any],
    annotations: list[Any],
    metadata: DatasetMetadata,
    report: DatasetReport,
    check: ImageCheck,
    max_bad_images: int,
    value_range: ValueRange | None = None,
) -> ReadImages:
    """Records (without objects) of the images that can be used.

    Args:
        entries: of ``images``.
        annotations: of the same file, which tell whether a wrong size matters.
        metadata: of the set.
        report: takes what is found.
        check: how far to look at the files.
        max_bad_images: so many may be unusable.
        value_range: what is black and white in images of more than 8 bits; None: as their values suggest.

    Raises:
        DatasetError: two images have one id.
    """
    out = ReadImages()
    left_out = _LeftOut()
    listed = _listed(entries, metadata, report, out, left_out)
    ids = sorted(listed)
    if check == "none" and reaches_out(annotations, out.numbered, _declared(listed, ids)):
        check = "header"  # the sizes may be wrong, and every process has to find the same
    results: dict[int, tuple[int, int] | Fault] = dict(zip(ids, _look(listed, ids, check)))
    moved = _find_moved(listed, results, metadata, report, check, out, len(entries))
    results |= zip(moved, _look(listed, moved, check))
    _take_sizes_of_pictures(listed, results, annotations, out.numbered, report)
    for image_id, result in results.items():
        image = listed[image_id]
        if isinstance(result, Fault):
            left_out.add(image.name, image_id, result)
            continue
        if image.height is None:
            report.add("no image size", "filled", "read from the image", image=image.name, image_id=image_id)
            out.undeclared.add(image_id)
        height, width = result
        out.records[image_id] = {
            "file_name": image.path,
            "height": height,
            "width": width,
            "image_id": image_id,
            "annotations": [],
        }
    depth = depth_of([record["file_name"] for record in out.records.values()], value_range)
    tell_of_depth(depth, report)
    if depth.value_range is not None:
        for record in out.records.values():
            record["value_range"] = list(depth.value_range)
    report.listed_images = len(entries)
    left_out.tell(report, max_bad_images)
    out.left_out = left_out.ids - out.records.keys()
    return out


def _declared(listed: Mapping[int, _Listed], ids: Iterable[int]) -> dict[int, tuple[int, int]]:
    """The sizes of images that the annotation file gives, (height, width)."""
    images = ((number, listed[number].height, listed[number].width) for number in ids)
    return {number: (h, w) for number, h, w in images if h is not None and w is not None}


def _take_sizes_of_pictures(
    listed: Mapping[int, _Listed],
    results: dict[int, tuple[int, int] | Fault],
    annotations: list[Any],
    numbered: Mapping[str, int],
    report: DatasetReport,
) -> None:
    """Where images are of other sizes than declared, and the objects fit the pictures, go by the pictures."""
    wrong = {number: fault for number, fault in results.items() if isinstance(fault, OtherSize)}
    found = {number: fault.size for number, fault in wrong.items()}
    if not wrong or not fit_the_pictures(annotations, numbered, _declared(listed, wrong), found):
        return
    for number, fault in wrong.items():
        results[number] = fault.size
        report.add(
            WRONG_SIZE,
            "filled",
            f"{fault.reason}: the objects fit the pictures, whose sizes are taken",
            image=listed[number].name,
            image_id=number,
        )


def _look(
    listed: Mapping[int, _Listed], ids: Iterable[int], check: ImageCheck
) -> Iterator[tuple[int, int] | Fault]:
    images = map(listed.__getitem__, ids)
    return check_image_files([ImageFile(i.path, i.height, i.width) for i in images], check)


def _listed(
    entries: list[Any],
    metadata: DatasetMetadata,
    report: DatasetReport,
    out: ReadImages,
    left_out: _LeftOut,
) -> dict[int, _Listed]:
    """The images by id, as the file lists them."""
    listed: dict[int, _Listed] = {}
    known = [as_id(entry.get("id")) for entry in entries if isinstance(entry, dict)]
    unused = itertools.count(1 + max((number for number in known if number is not None), default=0))
    for entry in entries:
        name, image_id = None, None
        try:
            if not isinstance(entry, dict):
                raise Fault("broken image entry", f"an entry of images is {quote(entry)}")
            name = entry.get("file_name")
            image_id = _image_id(entry.get("id"), out.numbered, unused, report, name)
            path = ""
            try:
                path = check_file_name(name, metadata.image_root)
            except Fault as fault:
                if fault.kind != OUTSIDE:
                    raise
            if image_id in listed:
                if listed[image_id].name != name:
                    raise DatasetError(
                        f"{metadata.json_file}: two images have the id {image_id}: "
                        f"{one_line(listed[image_id].name)} and {one_line(name)}; which one its annotations "
                        "belong to can't be known"
                    )
                report.add("duplicate image", "dropped", "listed twice", image=name, image_id=image_id)
                continue
            height, width = _declared_size(entry)
            if height is not None and isinstance(entry["height"], str):
                report.add("number as text", "filled", "height, width: read as numbers", image=name)
            listed[image_id] = _Listed(str(name), path, height, width)
        except Fault as fault:
            left_out.add(name if isinstance(name, str) else None, image_id, fault)
    return listed


def _image_id(
    value: Any, numbered: dict[str, int], unused: Iterator[int], report: DatasetReport, name: Any
) -> int:
    number = as_id(value)
    if number is not None:
        if isinstance(value, str):
            report.add("number as text", "filled", "id: read as a number", image=_text(name))
        return number
    key = value.strip() if isinstance(value, str) else ""
    if not key:
        raise Fault("bad image id", f"id {quote(value)} is not a whole number of 64 bits")
    if key not in numbered:
        number = next(unused)
        if number > MAX_ID:
            raise Fault("bad image id", f"id {quote(value)} is no number, and there is none left to give")
        numbered[key] = number
        report.add(
            "image id that is no number", "filled", f"{quote(value)} is now {number}", image=_text(name)
        )
    return numbered[key]


def _text(name: Any) -> str | None:
    return name if isinstance(name, str) else None


def _find_moved(
    listed: dict[int, _Listed],
    results: Mapping[int, tuple[int, int] | Fault],
    metadata: DatasetMetadata,
    report: DatasetReport,
    check: ImageCheck,
    out: ReadImages,
    count: int,
) -> list[int]:
    """Give images that lie elsewhere below the image folder the paths that they have; their ids."""
    root = metadata.image_root
    files: list[str] | None = None
    there: set[str] = set()
    if check == "none":  # nobody looked whether they are there; a listing costs less than a look at each
        files = files_below(root)
        there = {os.path.join(root, path) for path in files}
    missing: dict[str, list[int]] = {}
    used = set()
    for image_id, result in results.items():
        image = listed[image_id]
        if isinstance(result, Fault):
            is_there = result.kind not in (MISSING, OUTSIDE)
        else:
            is_there = check != "none" or image.path in there or os.path.lexists(image.path)
        if is_there:
            used.add(os.path.relpath(image.path, root))
        else:
            missing.setdefault(image.name, []).append(image_id)
    if not missing:
        return []
    found = find_images(missing, used, count, root, files_below(root) if files is None else files)
    moved = []
    for name, path in found.paths.items():
        for image_id in missing.pop(name):
            image = listed[image_id]
            out.renamed[image_id] = image.path
            image.path = os.path.join(root, path)
            moved.append(image_id)
            report.add(
                "image found by another name",
                "filled",
                f"is there as {quote(path)}",
                image=name,
                image_id=image_id,
            )
    report.hint = where_missing_images_are(list(missing), found.doubtful, count, root)
    return moved
