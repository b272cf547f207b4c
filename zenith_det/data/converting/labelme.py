"""labelme datasets: a JSON file per image, with shapes that have a label and points in pixels.

The format is described in labelme's repository (``labelme/label_file.py``). Shapes of one label and one
``group_id`` are parts of one object; points of the group of an outline or a box are its keypoints.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from PIL import Image
from pycocotools import mask as mask_utils

from zenith_det.data.converting.found import (
    IMAGE_SUFFIXES,
    LOOKED_AT,
    FoundDataset,
    FoundImage,
    FoundObject,
    Skeleton,
    bounding_box,
    files_below,
    split_of,
)
from zenith_det.data.problems import Fault
from zenith_det.errors import DatasetError, one_line, quote

_CIRCLE_POINTS = 64
#: Shapes that enclose nothing.
_LINES = ("line", "linestrip")


def is_labelme(root: Path) -> bool:
    """Whether a folder holds labelme's JSON files."""
    files = files_below(root, frozenset((".json",)))[:LOOKED_AT]
    return any(path.stat().st_size < 2**26 and _content(path) is not None for path in files)


def read_labelme(root: Path, names: list[str] | None = None) -> FoundDataset:
    """Read a folder of labelme files.

    Args:
        root: the folder with the JSON files in it or below.
        names: the classes and their order; default: all that occur, sorted.

    Raises:
        DatasetError: an object of a class that ``names`` lacks; no images.
    """
    found = FoundDataset()
    read: list[tuple[FoundImage, str, str, list[dict[str, Any]]]] = []
    for path in files_below(root, frozenset((".json",))):
        content = _content(path)
        if content is None:
            continue
        label = str(path.relative_to(root))
        split = split_of(path.relative_to(root).parts[:-1])
        place = _find_image(path, content)
        if place is None:
            inside = (
                " (it is inside the JSON: labelme_export_json writes it out)"
                if content.get("imageData")
                else ""
            )
            found.report(split).add(
                "missing file", "dropped", f"no image {quote(content.get('imagePath'))}{inside}", image=label
            )
            continue
        image = found.add(split, place, label)
        if image is not None:
            read.append((image, split, label, content["shapes"]))
    if not any(found.splits.values()):
        raise DatasetError(f"{root}: no images were found for its labelme files")
    groups = [(image, split, label, list(_groups(shapes))) for image, split, label, shapes in read]
    _find_skeletons(found, [group for *_, all_groups in groups for group in all_groups])
    used: set[str] = set()
    for image, split, label, all_groups in groups:
        for group in all_groups:
            try:
                taken = _object(group, image, found)
            except Fault as fault:
                found.report(split).add(
                    fault.kind, "dropped", fault.reason, image=f"{label}, {quote(group[0].get('label'))}"
                )
                continue
            if names is not None and taken.category not in names:
                raise DatasetError(
                    f"{label}: class {quote(taken.category)}, which --classes lacks: add it there, or leave "
                    "--classes out"
                )
            image.objects.append(taken)
            used.add(taken.category)
    found.classes = names or sorted(used)
    return found


def _content(path: Path) -> dict[str, Any] | None:
    """A labelme file; None for any other JSON."""
    try:
        content = orjson.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    if isinstance(content, dict) and isinstance(content.get("shapes"), list):
        return content if "imagePath" in content or "imageHeight" in content else None
    return None


def _find_image(path: Path, content: dict[str, Any]) -> Path | None:
    name = str(content.get("imagePath") or "").replace("\\", "/")
    tries = [path.parent / name] if name else []
    base = name.rsplit("/", 1)[-1]
    folders = (path.parent, path.parent / "images", path.parent.parent / "images", path.parent.parent)
    tries += [folder / base for folder in folders if base]
    tries += [
        f / (path.stem + s)
        for f in folders
        for suffix in sorted(IMAGE_SUFFIXES)
        for s in (suffix, suffix.upper())
    ]
    return next((t for t in tries if t.is_file()), None)


# ---- from shapes to objects


def _groups(shapes: list[Any]) -> Iterator[list[dict[str, Any]]]:
    """Shapes that make one object: each alone, or those of a group_id (points with whatever they lie on)."""
    grouped: dict[Any, list[dict[str, Any]]] = {}
    for shape in shapes:
        if not isinstance(shape, dict):
            continue
        group = shape.get("group_id")
        if group is None:
            yield [shape]
        else:
            grouped.setdefault(str(group), []).append(shape)
    for group in grouped.values():
        outlines = [shape for shape in group if shape.get("shape_type") != "point"]
        points = [shape for shape in group if shape.get("shape_type") == "point"]
        labels = list(dict.fromkeys(str(shape.get("label")) for shape in outlines))
        if len(labels) <= 1:
            yield [*outlines, *points]
            continue
        for label in labels:  # one number used for objects of several classes
            yield [shape for shape in outlines if str(shape.get("label")) == label]
        for point in points:
            yield [point]


def _find_skeletons(found: FoundDataset, groups: list[list[dict[str, Any]]]) -> None:
    names: dict[str, dict[str, None]] = {}
    for group in groups:
        if group and group[0].get("shape_type") != "point":
            points = [str(s.get("label")) for s in group if s.get("shape_type") == "point"]
            names.setdefault(str(group[0].get("label")), {}).update(dict.fromkeys(points))
    found.skeletons = {label: Skeleton(tuple(points)) for label, points in names.items() if points}


def _object(group: list[dict[str, Any]], image: FoundImage, found: FoundDataset) -> FoundObject:
    label = str(group[0].get("label") or "").strip()
    if not label:
        raise Fault("no class", "a shape without a label")
    polygons: list[list[float]] = []
    masks: list[dict[str, Any]] = []
    boxes: list[list[float]] = []
    for shape in group:
        kind = shape.get("shape_type") or "polygon"
        points = _points(shape)
        if kind == "point":
            continue
        if kind == "mask":
            masks.append(_mask(shape, points, image))
        elif kind in ("rectangle", "oriented_rectangle") and len(points) == 2:
            (x0, y0), (x1, y1) = points
            boxes.append([min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)])
        elif kind == "circle" and len(points) == 2:
            polygons.append(_circle(points))
        elif kind in _LINES:
            raise Fault(f"a {kind}", "encloses nothing")
        elif len(points) >= 3:
            polygons.append([value for point in points for value in point])
        else:
            raise Fault("broken shape", f"a {kind} of {len(points)} points")
    if not (polygons or masks or boxes):
        raise Fault("a point of no object", "give it the group_id of the box or outline that it belongs to")
    rle = None
    if masks:
        drawn = [mask_utils.frPyObjects(p, image.height, image.width) for p in [polygons] if p]
        merged = mask_utils.merge([*masks, *(one for several in drawn for one in several)])
        x, y, width, height = mask_utils.toBbox(merged).tolist()
        rle = {"size": list(merged["size"]), "counts": merged["counts"].decode()}
        boxes.append([x, y, x + width, y + height])
        polygons = []
    if polygons:
        x, y, width, height = bounding_box(polygons)
        boxes.append([x, y, x + width, y + height])
    left, top = min(b[0] for b in boxes), min(b[1] for b in boxes)
    right, bottom = max(b[2] for b in boxes), max(b[3] for b in boxes)
    if right <= left or bottom <= top:
        raise Fault("box without area", f"a shape of {right - left:g} x {bottom - top:g} pixels")
    skeleton = found.skeletons.get(label)
    keypoints = _keypoints(group, skeleton.names) if skeleton else []
    return FoundObject(label, (left, top, right - left, bottom - top), polygons, rle, keypoints)


def _points(shape: dict[str, Any]) -> list[tuple[float, float]]:
    try:
        points = [(float(x), float(y)) for x, y in shape.get("points") or ()]
    except (TypeError, ValueError):
        raise Fault("broken shape", f"its points are {quote(shape.get('points'))}") from None
    if not all(math.isfinite(value) for point in points for value in point):
        raise Fault("broken shape", "its points are not finite")
    return points


def _circle(points: list[tuple[float, float]]) -> list[float]:
    """A polygon in place of a circle, which labelme gives by its centre and a point on it."""
    (x, y), (edge_x, edge_y) = points
    radius = math.hypot(edge_x - x, edge_y - y)
    angles = [2 * math.pi * n / _CIRCLE_POINTS for n in range(_CIRCLE_POINTS)]
    return [value for a in angles for value in (x + radius * math.cos(a), y + radius * math.sin(a))]


def _mask(shape: dict[str, Any], points: list[tuple[float, float]], image: FoundImage) -> dict[str, Any]:
    """The whole image's RLE of a mask that labelme keeps as a PNG of its box."""
    try:
        with Image.open(
            io.BytesIO(base64.b64decode(shape.get("mask") or "", validate=True)), formats=("PNG",)
        ) as png:
            part = np.asarray(png) > 0
        left, top = (round(value) for value in points[0])
    except (binascii.Error, TypeError, OSError, IndexError, ValueError) as error:
        raise Fault("broken mask", f"its mask can't be read: {one_line(str(error))}") from None
    whole = np.zeros((image.height, image.width), dtype=np.uint8, order="F")
    inside = whole[max(top, 0) : top + part.shape[0], max(left, 0) : left + part.shape[1]]
    inside[:] = part[max(-top, 0) :, max(-left, 0) :][: inside.shape[0], : inside.shape[1]]
    if part.ndim != 2 or not whole.any():
        raise Fault("broken mask", "its mask holds nothing")
    rle: dict[str, Any] = mask_utils.encode(whole)
    return rle


def _keypoints(group: list[dict[str, Any]], names: tuple[str, ...]) -> list[float]:
    at = {str(s.get("label")): _points(s)[0] for s in group if s.get("shape_type") == "point" and _points(s)}
    return [value for name in names for value in ((*at[name], 2) if name in at else (0, 0, 0))]
