"""From a folder in another format to COCO-format annotation files."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from pycocotools import mask as mask_utils

from zenith_det.data.converting.found import FoundDataset, FoundImage
from zenith_det.data.converting.labelme import is_labelme, read_labelme
from zenith_det.data.converting.pascal_voc import is_pascal_voc, read_pascal_voc
from zenith_det.data.converting.yolo import is_yolo, read_yolo
from zenith_det.data.problems import DatasetReport
from zenith_det.data.segmentations import check_polygons, mask_rle
from zenith_det.errors import DatasetError, one_line
from zenith_det.files import write_whole


@dataclass(frozen=True)
class Format:
    """How a format is recognised and read."""

    title: str
    recognise: Callable[[Path], bool]
    read: Callable[[Path, list[str] | None], FoundDataset]


#: Name on the command line -> format.
FORMATS = {
    "yolo": Format("YOLO", is_yolo, read_yolo),
    "voc": Format("Pascal VOC", is_pascal_voc, read_pascal_voc),
    "labelme": Format("labelme", is_labelme, read_labelme),
}


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote.

    Attributes:
        format: a key of :data:`FORMATS`.
        images: the folder that the file names are relative to: the dataset's own, nothing is copied.
        files: "train", "val", "test" or "all" -> annotation file.
        reports: by the same names: counts, and what was left out.
        notes: lines about the dataset as a whole.
    """

    format: str
    images: Path
    files: dict[str, Path]
    reports: dict[str, DatasetReport]
    notes: list[str]


def find_format(folder: Path) -> str | None:
    """The key of :data:`FORMATS` that a folder's files are in; None for no known one."""
    return next((name for name, form in FORMATS.items() if form.recognise(folder)), None)


def convert_folder(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    form: str | None = None,
    classes: Sequence[str] | None = None,
    *,
    strict: bool = False,
) -> Conversion:
    """Write a COCO-format annotation file for each part (training, validation, test) of a dataset.

    The images stay where they are. Boxes, outlines and keypoints keep their numbers: nothing is drawn into
    masks on the way. The same folder gives the same files, byte for byte.

    Args:
        folder: the dataset.
        output: folder for ``train.json``, ``val.json``, ``test.json``, or ``all.json`` where the dataset has
            no parts; made where it is missing.
        form: a key of :data:`FORMATS`; default: found by the files.
        classes: names in the order of their numbers, in place of the dataset's own.
        strict: write nothing where something would be left out; the reports say what.

    Raises:
        DatasetError: the folder or its format can't be used, no image is left, or ``output`` can't be written.
    """
    root = Path(os.path.abspath(folder))
    if not root.is_dir():
        what = "is a file: give the folder that holds the dataset" if root.exists() else "does not exist"
        raise DatasetError(f"{folder} {what}")
    form = form or find_format(root)
    if form is None:
        titles = ", ".join(f.title for f in FORMATS.values())
        raise DatasetError(f"{folder}: not recognised as a dataset in one of the formats {titles}")
    found = FORMATS[form].read(root, list(classes) if classes is not None else None)
    if not found.classes:
        raise DatasetError(
            f"{folder}: no object in it could be used, see --format and the format's own checks"
        )
    doubled = sorted({name for name in found.classes if found.classes.count(name) > 1})
    if doubled:
        raise DatasetError(f"{folder}: two classes are called {one_line(', '.join(doubled))}")
    images = _common_folder(root, [image.path for split in found.splits.values() for image in split])
    target = Path(output)
    files = {}
    for split, listed in found.splits.items():
        report = found.reports[split]
        report.num_images, report.num_classes = len(listed), len(found.classes)
        report.num_annotations = sum(len(image.objects) for image in listed)
        report.num_without_objects = sum(not image.objects for image in listed)
    if not (strict and any(report.count("dropped") for report in found.reports.values())):
        for split, listed in found.splits.items():
            if listed:
                files[split] = write_whole(
                    target / f"{split}.json", orjson.dumps(_coco(found, listed, images))
                )
    return Conversion(form, images, files, found.reports, found.notes)


def _common_folder(root: Path, paths: Sequence[Path]) -> Path:
    """``root``, or the folder above it that holds all images, where a description points outside."""
    return Path(os.path.commonpath([root, *(path.parent for path in paths)]))


def _coco(found: FoundDataset, images: Sequence[FoundImage], root: Path) -> dict[str, Any]:
    numbers = {name: number for number, name in enumerate(found.classes, start=1)}
    categories = []
    for name, number in numbers.items():
        category: dict[str, Any] = {"id": number, "name": name}
        if skeleton := found.skeletons.get(name):
            category |= {"keypoints": list(skeleton.names), "skeleton": []}
            if skeleton.flip_pairs is not None:
                category["flip_pairs"] = [list(pair) for pair in skeleton.flip_pairs]
        categories.append(category)
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, image in enumerate(images, start=1):
        file_name = image.path.relative_to(root).as_posix()
        entries.append({"id": image_id, "file_name": file_name, "width": image.width, "height": image.height})
        for thing in image.objects:
            annotation: dict[str, Any] = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": numbers[thing.category],
                "bbox": list(thing.box),
                "area": thing.box[2] * thing.box[3],
                "iscrowd": 0,
            }
            if thing.rle or thing.polygons:
                annotation["segmentation"] = thing.rle or thing.polygons
                # What can't be drawn stays in the file, and is told and left out when that is read.
                drawn = thing.rle or check_polygons(thing.polygons, image.height, image.width)[0]
                if drawn:
                    annotation["area"] = float(mask_utils.area(mask_rle(drawn, image.height, image.width)))
            if thing.keypoints:
                annotation["keypoints"] = thing.keypoints
                annotation["num_keypoints"] = sum(v > 0 for v in thing.keypoints[2::3])
            annotations.append(annotation)
    return {"images": entries, "annotations": annotations, "categories": categories}
