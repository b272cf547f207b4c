"""Pascal VOC datasets: an XML file per image, as VOC's devkit, labelImg, CVAT and Roboflow write them.

A box is the first and the last pixel in it, counted from 1, as VOC's development kit says; Detectron2's reader
takes them so. Sets whose numbers begin at 0, as some tools write them, are recognised by that.
"""

from __future__ import annotations

import contextlib
import os
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils

from zenith_det.data.converting.found import (
    IMAGE_SUFFIXES,
    LOOKED_AT,
    FoundDataset,
    FoundImage,
    FoundObject,
    bounding_box,
    files_below,
    read_text,
    split_of,
)
from zenith_det.data.problems import DatasetReport, Fault
from zenith_det.errors import DatasetError, one_line, quote

#: Where an image lies, as seen from the folder of its XML file.
_IMAGE_FOLDERS = (".", "../JPEGImages", "../images", "../Images", "../imgs", "images")


@dataclass
class _Annotation:
    """An XML file as read: the image's name, and objects with boxes as they stand there."""

    path: Path
    file_name: str
    objects: list[_Object] = field(default_factory=list)


@dataclass
class _Object:
    name: str
    corners: tuple[float, float, float, float]
    polygons: list[list[float]]


def is_pascal_voc(root: Path) -> bool:
    """Whether a folder holds XML files of VOC's form."""
    for path in files_below(root, frozenset((".xml",)))[:LOOKED_AT]:
        with contextlib.suppress(ElementTree.ParseError, OSError):
            if ElementTree.parse(path).getroot().tag == "annotation":
                return True
    return False


def read_pascal_voc(root: Path, names: list[str] | None = None) -> FoundDataset:
    """Read a Pascal VOC dataset.

    Args:
        root: the folder with the XML files in it or below; of a devkit the one that holds ``Annotations``.
        names: the classes and their order; default: all that occur, sorted.

    Raises:
        DatasetError: an object of a class that ``names`` lacks; no images.
    """
    found = FoundDataset()
    splits = _image_sets(root)
    read: list[tuple[str, _Annotation]] = []
    for path in files_below(root, frozenset((".xml",))):
        parts = path.relative_to(root).parts
        split = splits.get(path.stem) if splits else split_of(parts[:-1])
        if split is None:
            continue  # in none of the lists, as VOC's 2007 test images
        annotation = _read(path, root, found.report(split))
        if annotation is not None:
            read.append((split, annotation))
    first = min((min(o.corners[:2]) for _, a in read for o in a.objects), default=1.0)
    shift = 0.0 if first < 1 else 1.0
    if not shift:
        found.notes.append(
            "boxes begin at 0: taken as corners in pixels, not as VOC's first and last pixel from 1"
        )
    found.classes = names or sorted({o.name for _, a in read for o in a.objects})
    for split, annotation in read:
        _take(found, split, annotation, root, shift)
    if not any(found.splits.values()):
        raise DatasetError(f"{root}: no images were found for its XML files")
    return found


def _image_sets(root: Path) -> dict[str, str]:
    """Of a devkit's ``ImageSets/Main``: image name -> split; empty without those lists."""
    splits: dict[str, str] = {}
    for kind in ("Segmentation", "Main"):  # an image of both is in Main's
        for name in ("train", "val", "test"):
            # VOCdevkit holds a folder for each year.
            for path in (
                p for depth in range(3) for p in root.glob(f"{'*/' * depth}ImageSets/{kind}/{name}.txt")
            ):
                splits |= {line.split()[0]: name for line in read_text(path).splitlines() if line.strip()}
    return splits


def _read(path: Path, root: Path, report: DatasetReport) -> _Annotation | None:
    label = str(path.relative_to(root))
    try:
        tree = ElementTree.fromstring(path.read_bytes())
    except (ElementTree.ParseError, ValueError) as error:
        report.add("broken XML", "dropped", one_line(str(error)), image=label)
        return None
    except OSError as error:
        raise DatasetError(f"{path}: can't be read: {one_line(str(error))}") from None
    if tree.tag != "annotation":
        return None
    annotation = _Annotation(path, (tree.findtext("filename") or "").strip())
    for number, entry in enumerate(tree.iter("object"), start=1):
        try:
            annotation.objects.append(_object(entry))
        except Fault as fault:
            report.add(fault.kind, "dropped", fault.reason, image=f"{label}, object {number}")
    return annotation


def _object(entry: ElementTree.Element) -> _Object:
    name = (entry.findtext("name") or "").strip()
    if not name:
        raise Fault("no class", "an object without a name")
    polygons = [_polygon(polygon) for polygon in entry.findall("polygon")]
    polygons = [polygon for polygon in polygons if len(polygon) >= 6]
    box = entry.find("bndbox")
    if box is None:
        if not polygons:
            raise Fault("no box", f"{quote(name)} has no bndbox")
        x, y, width, height = bounding_box(polygons)
        return _Object(name, (x, y, x + width, y + height), polygons)
    try:
        left, top, right, bottom = (
            float(box.findtext(side) or "") for side in ("xmin", "ymin", "xmax", "ymax")
        )
    except ValueError:
        raise Fault("broken box", f"the bndbox of {quote(name)} is not four numbers") from None
    return _Object(name, (left, top, right, bottom), polygons)


def _polygon(entry: ElementTree.Element) -> list[float]:
    """Points as x1, y1, x2, y2, … (Roboflow, CVAT) or as ``<pt>`` or ``<point>`` with x and y (LabelMe's XML)."""
    points: list[float] = []
    try:
        nested = [*entry.findall("pt"), *entry.findall("point")]
        if nested:
            for point in nested:
                points += [float(point.findtext("x") or ""), float(point.findtext("y") or "")]
            return points
        number = 1
        while (x := entry.findtext(f"x{number}")) is not None:
            points += [float(x), float(entry.findtext(f"y{number}") or "")]
            number += 1
    except ValueError:
        raise Fault("broken polygon", "a point of polygon is not two numbers") from None
    return points


def _take(found: FoundDataset, split: str, annotation: _Annotation, root: Path, shift: float) -> None:
    label = str(annotation.path.relative_to(root))
    report = found.report(split)
    place = _find_image(annotation)
    if place is None:
        report.add("missing file", "dropped", f"no image {quote(annotation.file_name)} near it", image=label)
        return
    image = found.add(split, place, label)
    if image is None:
        return
    masks = _object_masks(annotation, image)
    for number, entry in enumerate(annotation.objects, start=1):
        if entry.name not in found.classes:
            raise DatasetError(
                f"{label}: class {quote(entry.name)}, which --classes lacks: add it there, or leave --classes out"
            )
        left, top, right, bottom = entry.corners
        left, top = left - shift, top - shift
        if right <= left or bottom <= top:
            report.add(
                "box without area", "dropped", f"bndbox {entry.corners}", image=f"{label}, object {number}"
            )
            continue
        box = (left, top, right - left, bottom - top)
        image.objects.append(FoundObject(entry.name, box, entry.polygons, masks.get(number)))


def _find_image(annotation: _Annotation) -> Path | None:
    folder = annotation.path.parent
    # The name in the file may be another machine's path, or what the image was called before.
    names = [annotation.path.stem + suffix for suffix in sorted(IMAGE_SUFFIXES)]
    names += [annotation.path.stem + suffix.upper() for suffix in sorted(IMAGE_SUFFIXES)]
    if annotation.file_name:
        names.insert(0, annotation.file_name.replace("\\", "/").rsplit("/", 1)[-1])
    # VOC splits by folder on either side: Annotations/train/x.xml with JPEGImages/train/x.jpg.
    places = [folder / place for place in _IMAGE_FOLDERS]
    places += [folder.parent.parent / place / folder.name for place in ("JPEGImages", "images", "Images")]
    for name in names:
        for place in places:
            if (place / name).is_file():
                return Path(os.path.normpath(place / name))
    return None


def _object_masks(annotation: _Annotation, image: FoundImage) -> dict[int, dict[str, object]]:
    """A devkit's ``SegmentationObject``: number of the object from 1 -> its mask as COCO's RLE."""
    path = annotation.path.parent.parent / "SegmentationObject" / f"{annotation.path.stem}.png"
    if not path.is_file():
        return {}
    with Image.open(path) as picture:
        pixels = np.asarray(picture)
    if pixels.shape != (image.height, image.width):
        return {}
    masks = {}
    for number in range(1, len(annotation.objects) + 1):
        mask = np.asfortranarray(pixels == number, dtype=np.uint8)
        if mask.any():
            rle = mask_utils.encode(mask)
            masks[number] = {"size": rle["size"], "counts": rle["counts"].decode()}
    return masks
