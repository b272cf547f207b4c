"""YOLO datasets: a ``data.yaml`` (or a list of class names) and a text file of normalised numbers per image.

Of a line's numbers the first is the class; then come centre and size of a box (detection), the points of an
outline (segmentation, oriented boxes), or centre, size and keypoints (pose, where ``kpt_shape`` says so), all
as parts of the image's width and height. The format is described in Ultralytics' documentation ("Datasets").
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from zenith_det.data.converting.found import (
    IMAGE_SUFFIXES,
    LOOKED_AT,
    WHOLE,
    FoundDataset,
    FoundImage,
    FoundObject,
    Skeleton,
    bounding_box,
    files_below,
    read_text,
    split_of,
)
from zenith_det.data.metadata import COCO_KEYPOINT_NAMES
from zenith_det.data.problems import DatasetReport, Fault
from zenith_det.errors import DatasetError, one_line, quote

_YAML = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
_NAME_LISTS = (
    "classes.txt",
    "obj.names",
    "labels/classes.txt",
    "names.txt",
    "data/obj.names",
    "_darknet.labels",
)
_SPLIT_KEYS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
#: What a mirror swaps in COCO's 17 keypoints, as ``flip_idx``.
_COCO_FLIP = (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15)
#: Parts of an image beyond which a number is no part of it, but a pixel.
_FAR_OUT = 2.0


@dataclass(frozen=True)
class Description:
    """What ``data.yaml``, or a list of names, says.

    Attributes:
        classes: names by number.
        file: where they are from.
        folders: split -> image folders or lists of images; empty: to be found.
        keypoints: how many there are, and numbers per keypoint (2 or 3); (0, 0) without keypoints.
        skeletons: class -> keypoints.
    """

    classes: list[str]
    file: Path
    folders: dict[str, list[Path]]
    keypoints: tuple[int, int] = (0, 0)
    skeletons: dict[str, Skeleton] | None = None


def find_description(root: Path) -> Path | None:
    """The ``data.yaml`` of a YOLO dataset, or its list of class names."""
    candidates = [root / name for name in _YAML]
    for path in candidates:
        if path.is_file() and "names" in (_mapping(path) or {}):
            return path
    for path in sorted(root.glob("*.y*ml")):
        with contextlib.suppress(DatasetError):  # a file of something else
            if "names" in (_mapping(path) or {}):
                return path
    return next((root / name for name in _NAME_LISTS if (root / name).is_file()), None)


def is_yolo(root: Path) -> bool:
    """Whether a folder is a YOLO dataset: it is described as one, or its label files look like it."""
    description = find_description(root)
    if description is not None and description.suffix in (".yaml", ".yml"):
        return True
    texts = map(read_text, _label_files(root)[:LOOKED_AT])
    lines = (line.split() for text in texts for line in text.splitlines())
    return any(len(words) >= 5 and all(map(_is_number, words)) for words in lines)


def read_yolo(root: Path, names: list[str] | None = None) -> FoundDataset:
    """Read a YOLO dataset.

    Args:
        root: the folder that holds ``data.yaml`` or, without one, images and labels.
        names: classes by number, in place of those that the dataset names.

    Raises:
        DatasetError: no class names, a description that can't be used, no images, or a class number that has
            no name.
    """
    description = _description(root, names)
    found = FoundDataset(classes=description.classes, skeletons=description.skeletons or {})
    labels_of_images: set[Path] = set()
    for split, image in _images(root, description):
        label = _label_file(image)
        taken = found.add(split, image, str(image.relative_to(root) if image.is_relative_to(root) else image))
        if label is None:
            found.report(split).add(
                "no label file", "kept", "an image without objects", image=_shown(image, root)
            )
            continue
        labels_of_images.add(label)
        if taken is not None:
            taken.objects = list(_objects(label, root, taken, description, found.report(split)))
    if not any(found.splits.values()):
        raise DatasetError(f"{root}: no images were found for this YOLO dataset ({description.file})")
    for label in _label_files(root):
        if label not in labels_of_images and read_text(label).strip():
            split = split_of(label.relative_to(root).parts[:-1])
            split = split if split in found.splits else next(iter(found.splits))
            found.report(split).add(
                "label without an image", "dropped", "no image of this name", image=_shown(label, root)
            )
    return found


# ---- the description


def _mapping(path: Path) -> dict[str, Any] | None:
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise DatasetError(f"{path}: not valid YAML{line}") from None
    return content if isinstance(content, dict) else None


def _description(root: Path, names: list[str] | None) -> Description:
    path = find_description(root)
    if path is None or path.suffix not in (".yaml", ".yml"):
        classes = names
        if classes is None and path is not None:
            classes = [line.strip() for line in read_text(path).splitlines() if line.strip()]
        if not classes:
            raise DatasetError(
                f"{root}: this looks like YOLO, but nothing names its classes: add a classes.txt with a name a "
                "line, or give --classes FILE"
            )
        return Description(classes, path or root, {})
    content = _mapping(path) or {}
    classes = names or _class_names(content["names"], path)
    shape = content.get("kpt_shape") or (0, 0)
    if not (
        isinstance(shape, list | tuple)
        and len(shape) == 2
        and all(isinstance(n, int) for n in shape)
        and (tuple(shape) == (0, 0) or (shape[0] > 0 and shape[1] in (2, 3)))
    ):
        raise DatasetError(f"{path}: kpt_shape is {quote(shape)}: [keypoints, 2 or 3] is needed")
    keypoints = (int(shape[0]), int(shape[1]))
    skeletons = {}
    if keypoints[0]:
        skeletons = {
            name: _skeleton(content, name, number, keypoints[0], path) for number, name in enumerate(classes)
        }
    return Description(classes, path, _folders(content, root, path), keypoints, skeletons)


def _class_names(value: Any, path: Path) -> list[str]:
    if isinstance(value, dict):
        try:
            numbered = {int(number): str(name) for number, name in value.items()}
        except (TypeError, ValueError):
            raise DatasetError(f"{path}: names must map numbers to names, and has {quote(value)}") from None
        if sorted(numbered) != list(range(len(numbered))):
            raise DatasetError(f"{path}: names has the numbers {sorted(numbered)}: 0, 1, 2, … are needed")
        return [numbered[number] for number in range(len(numbered))]
    if isinstance(value, list) and value:
        return [str(name) for name in value]
    raise DatasetError(f"{path}: names is {quote(value)}: a list of class names is needed")


def _skeleton(content: dict[str, Any], name: str, number: int, count: int, path: Path) -> Skeleton:
    given = content.get("kpt_names") or content.get("keypoint_names")
    if isinstance(given, dict):
        given = given.get(number, given.get(name))
    flip = content.get("flip_idx")
    if flip is not None and not (
        isinstance(flip, list) and sorted(map(str, flip)) == sorted(map(str, range(count)))
    ):
        raise DatasetError(f"{path}: flip_idx is {quote(flip)}: each of 0 to {count - 1} once is needed")
    if isinstance(given, list) and len(given) == count:
        names = tuple(str(one) for one in given)
    elif count == len(COCO_KEYPOINT_NAMES) and flip is not None and tuple(flip) == _COCO_FLIP:
        names = COCO_KEYPOINT_NAMES
    else:
        names = tuple(f"keypoint {n}" for n in range(1, count + 1))
    pairs = None
    if flip is not None:
        pairs = [(names[a], names[b]) for a, b in enumerate(flip) if a < b]
    return Skeleton(names, pairs)


def _folders(content: dict[str, Any], root: Path, path: Path) -> dict[str, list[Path]]:
    base = path.parent
    if content.get("path"):
        given = Path(os.path.abspath(str(content["path"])))
        # Exports keep the path of the machine that wrote them: theirs where it exists, else the file's folder.
        base = next((p for p in (path.parent / str(content["path"]), given) if p.is_dir()), path.parent)
    folders: dict[str, list[Path]] = {}
    for key, split in _SPLIT_KEYS.items():
        value = content.get(key)
        for entry in value if isinstance(value, list) else [value] if value else []:
            text = str(entry).replace("\\", "/")
            # Roboflow writes ../train/images for a folder beside data.yaml.
            tries = [base / text, path.parent / text]
            tries += [path.parent / text.removeprefix("../")] if text.startswith("../") else []
            place = next((p for p in tries if p.exists()), None)
            if place is None and split != "test":
                raise DatasetError(
                    f"{path}: {key} is {quote(entry)}, and there is no {tries[0]}: correct the path in that file"
                )
            if place is not None:
                folders.setdefault(split, []).append(place)
    return folders


# ---- images and their labels


def _images(root: Path, description: Description) -> Iterator[tuple[str, Path]]:
    if not description.folders:
        for image in files_below(root, IMAGE_SUFFIXES):
            yield split_of(image.relative_to(root).parts[:-1]), image
        return
    seen: set[Path] = set()
    splits = description.folders
    for split, places in splits.items():
        name = WHOLE if set(splits) == {"train"} and split == "train" else split
        for place in places:
            for image in _listed(place) if place.is_file() else files_below(place, IMAGE_SUFFIXES):
                image = Path(os.path.normpath(image))
                if image not in seen:
                    seen.add(image)
                    yield name, image


def _listed(path: Path) -> list[Path]:
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    images = []
    for line in lines:
        # Darknet's lists are relative to where its command ran, Ultralytics' to the list.
        tries = [path.parent / line, path.parent / line.removeprefix("./"), path.parent / Path(line).name]
        tries += [path.parent / Path(*Path(line).parts[1:])] if len(Path(line).parts) > 1 else []
        images.append(next((p for p in tries if p.is_file()), tries[0]))
    return images


def _label_file(image: Path) -> Path | None:
    """Where an image's labels are: ``labels`` in place of the last ``images`` of its path, beside it, or near."""
    parts = list(image.parts)
    tries = []
    if "images" in parts[:-1]:
        at = len(parts) - 2 - parts[-2::-1].index("images")
        tries.append(Path(*parts[:at], "labels", *parts[at + 1 :]))
    tries += [image, image.parent / "labels" / image.name, image.parent.parent / "labels" / image.name]
    return next((t.with_suffix(".txt") for t in tries if t.with_suffix(".txt").is_file()), None)


def _label_files(root: Path) -> list[Path]:
    other = {"classes", "readme", "notes", "train", "val", "test", "license", "requirements"}
    return [
        path
        for path in files_below(root, frozenset((".txt",)))
        if path.stem.lower() not in other and not path.stem.lower().startswith("readme")
    ]


def _shown(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _is_number(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


def _objects(
    label: Path, root: Path, image: FoundImage, description: Description, report: DatasetReport
) -> Iterator[FoundObject]:
    seen: set[str] = set()
    for number, line in enumerate(read_text(label).splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        where = f"{_shown(label, root)}, line {number}"
        if line in seen:
            report.add("repeated line", "dropped", "the same object again", image=where)
            continue
        seen.add(line)
        try:
            yield _object(words, where, image, description)
        except Fault as fault:
            report.add(fault.kind, "dropped", fault.reason, image=where)


def _object(words: list[str], where: str, image: FoundImage, description: Description) -> FoundObject:
    if not all(map(_is_number, words)):
        raise Fault("not a label", f"{quote(one_line(' '.join(words)))} is not a line of numbers")
    values = [float(word) for word in words]
    category, values = values[0], values[1:]
    if category != int(category) or not 0 <= category < len(description.classes):
        # Dropping it would train the rest under wrong names.
        raise DatasetError(
            f"{where}: class {words[0]}, but {description.file} names {len(description.classes)} classes "
            f"(0 to {len(description.classes) - 1}): add the missing names there, or give --classes FILE"
        )
    if max(map(abs, values), default=0) > _FAR_OUT:
        raise Fault(
            "not normalised", "numbers beyond the image: parts of its width and height (0 to 1) are needed"
        )
    name = description.classes[int(category)]
    count, each = description.keypoints
    scaled = [value * (image.width, image.height)[i % 2] for i, value in enumerate(values)]
    if count:
        if len(values) != 4 + count * each:
            raise Fault(
                "wrong count", f"{len(values)} numbers after the class: 4 and {count} x {each} are needed"
            )
        return FoundObject(name, _box(scaled), keypoints=_keypoints(values[4:], each, image))
    if len(values) == 4:
        return FoundObject(name, _box(scaled))
    if len(values) < 6 or len(values) % 2:
        what = (
            "a prediction's score at the end?"
            if len(values) == 5
            else "a box has 4, an outline 6 or more in pairs"
        )
        raise Fault("wrong count", f"{len(values)} numbers after the class: {what}")
    return FoundObject(name, bounding_box([scaled]), polygons=[scaled])


def _box(scaled: list[float]) -> tuple[float, float, float, float]:
    x, y, width, height = scaled[:4]
    if width <= 0 or height <= 0:
        raise Fault("box without area", f"a box of width {width:g} and height {height:g} pixels")
    return x - width / 2, y - height / 2, width, height


def _keypoints(values: list[float], each: int, image: FoundImage) -> list[float]:
    points: list[float] = []
    for at in range(0, len(values), each):
        x, y = values[at] * image.width, values[at + 1] * image.height
        # Without a visibility, (0, 0) and negative numbers are what exporters write for "not there".
        visible = values[at + 2] if each == 3 else 2 * (x >= 0 and y >= 0 and (x, y) != (0, 0))
        points += [x, y, round(visible)] if visible > 0 else [0, 0, 0]
    return points
