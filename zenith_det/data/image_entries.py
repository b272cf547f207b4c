"""An annotation file's ``images``: read, and looked up on disk."""

from __future__ import annotations

from typing import Any

from zenith_det.data.image_files import ImageCheck, ImageFile, check_file_name, check_image_files
from zenith_det.data.images import max_pixels
from zenith_det.data.metadata import DatasetMetadata
from zenith_det.data.missing_images import where_missing_images_are
from zenith_det.data.problems import EXAMPLES_KEPT, Action, DatasetReport, Fault
from zenith_det.data.values import as_id, check_side
from zenith_det.errors import DatasetError, one_line, quote


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


def read_images(
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
    report.listed_images, report.bad_images = len(entries), sum(counts.values())
    action: Action = "dropped" if report.bad_images <= max_bad_images else "stops"
    for name, image_id, kind, reason in faults:
        report.add(kind, action, reason, image=name, image_id=image_id)
    for kind, count in counts.items():
        report.counts[kind, action] += max(0, count - EXAMPLES_KEPT)
    missing = [name for name, _, kind, _ in faults if kind == "missing file" and name]
    if counts.get("missing file", 0) > 0.9 * len(entries):
        report.hint = where_missing_images_are(missing, metadata.image_root)
    return records, left_out - records.keys()
