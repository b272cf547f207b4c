"""What the readers of all formats hand on: images with their objects, and what could not be taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zenith_det.data.images import ImageError, read_header
from zenith_det.data.problems import DatasetReport
from zenith_det.errors import DatasetError, one_line

IMAGE_SUFFIXES = frozenset(
    f".{kind}"
    for kind in (
        "jpg", "jpeg", "jpe", "jfif", "png", "bmp", "tif", "tiff", "webp", "gif", "ppm", "pgm", "pnm", "jp2", "tga",
        "avif",
    )
)  # fmt: skip
#: How people name the folders of the three parts of a dataset.
SPLITS = {
    **dict.fromkeys(("train", "training", "train2017", "train2014"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "val2017", "val2014", "eval", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "test2017"), "test"),
}
#: The name of a dataset's only part, where its folders name none.
WHOLE = "all"
#: Files that are read to learn what kind of dataset a folder is.
LOOKED_AT = 21


@dataclass
class FoundObject:
    """One object of an image.

    Attributes:
        category: the class's name.
        box: x, y, width, height in pixels.
        polygons: each x0, y0, x1, y1, … in pixels; empty where the object has no outline.
        rle: a mask in COCO's compressed form, in place of polygons.
        keypoints: x, y, visibility (0, 1, 2) per keypoint; empty where the object has none.
    """

    category: str
    box: tuple[float, float, float, float]
    polygons: list[list[float]] = field(default_factory=list)
    rle: dict[str, Any] | None = None
    keypoints: list[float] = field(default_factory=list)


@dataclass
class FoundImage:
    """An image file, its size as displayed, and what is on it."""

    path: Path
    width: int
    height: int
    objects: list[FoundObject] = field(default_factory=list)


@dataclass
class Skeleton:
    """The keypoints of a class: names, and the pairs of names that a mirror swaps (None: by their names)."""

    names: tuple[str, ...]
    flip_pairs: list[tuple[str, str]] | None = None


@dataclass
class FoundDataset:
    """A dataset as a reader found it.

    Attributes:
        classes: names in the order of their ids.
        splits: "train", "val", "test" (or :data:`WHOLE`) -> images.
        reports: by the same names; what was left out or is worth knowing. Where a problem is, is the label file.
        skeletons: class -> keypoints.
        notes: lines for the user, about the dataset as a whole.
    """

    classes: list[str] = field(default_factory=list)
    splits: dict[str, list[FoundImage]] = field(default_factory=dict)
    reports: dict[str, DatasetReport] = field(default_factory=dict)
    skeletons: dict[str, Skeleton] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def report(self, split: str) -> DatasetReport:
        self.splits.setdefault(split, [])
        return self.reports.setdefault(split, DatasetReport(split))

    def add(self, split: str, path: Path, label: str, *, image_id: int | None = None) -> FoundImage | None:
        """Take in an image; None, and a problem in the report, where it can't be read."""
        report = self.report(split)
        try:
            header = read_header(str(path))
        except ImageError as error:
            report.add(error.kind, "dropped", error.reason, image=label)
            return None
        image = FoundImage(path, header.width, header.height)
        self.splits[split].append(image)
        return image


def split_of(parts: Sequence[str]) -> str:
    """The part of a dataset that a path below its root belongs to, by the names of its folders."""
    return next((SPLITS[part.lower()] for part in parts if part.lower() in SPLITS), WHOLE)


def files_below(root: Path, suffixes: frozenset[str]) -> list[Path]:
    """Files below ``root`` with one of these suffixes (lower case), hidden ones left out, sorted.

    Raises:
        DatasetError: the folder can't be listed.
    """
    try:
        return sorted(
            path
            for path in root.rglob("*")
            if path.suffix.lower() in suffixes
            and not any(part.startswith((".", "__MACOSX")) for part in path.relative_to(root).parts)
            and path.is_file()
        )
    except OSError as error:
        raise DatasetError(f"{root}: can't be listed: {one_line(str(error))}") from None


def read_text(path: Path) -> str:
    """A small text file.

    Raises:
        DatasetError: it can't be read, or is no text.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: not a text file (byte {error.start} is not UTF-8)") from None
    except OSError as error:
        raise DatasetError(f"{path}: can't be read: {one_line(str(error))}") from None


def bounding_box(polygons: Sequence[Sequence[float]]) -> tuple[float, float, float, float]:
    """x, y, width, height of the box around polygons."""
    xs = [x for polygon in polygons for x in polygon[0::2]]
    ys = [y for polygon in polygons for y in polygon[1::2]]
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
