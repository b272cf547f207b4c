"""What can be wrong with an annotation or an image, found in the pass that reads them.

Each check returns the usable value, or raises :class:`Fault` with the reason. What becomes of the fault
(drop the annotation, fill in the value, stop the run) is decided in :mod:`zenith_det.data.coco` and told
in a :class:`DatasetReport`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pycocotools import mask as mask_utils

from zenith_det.data.images import ImageError, ImageHeader, read_header, read_image
from zenith_det.errors import is_printable, one_line, quote

#: What was done about a problem.
#:   stops: nothing sensible can be done, the dataset is refused;
#:   dropped: left out (an image, an annotation, or the part that the reason names);
#:   filled: the missing value was worked out; nothing is lost;
#:   kept: used as it is; worth knowing.
Action = Literal["stops", "dropped", "filled", "kept"]
_ACTION_ORDER: tuple[Action, ...] = ("stops", "dropped", "filled", "kept")
ImageCheck = Literal["none", "header", "full"]

#: The kind of what concerns a set's boxes as a whole, and is said before training.
SUSPICIOUS = "suspicious boxes"
#: Per kind of problem, how many are kept with their file and id; all are counted.
EXAMPLES_KEPT = 10_000
#: Ids must fit what COCO's evaluation and torch keep them in.
MAX_ID = 2**63 - 1
#: Polygons of one object: pycocotools merges them in quadratic time.
MAX_POLYGONS = 10_000
#: What the outline of an object's polygons may measure, in (height + width) of its image: pycocotools takes
#: about 60 bytes for each pixel of it.
MAX_OUTLINE = 100
_FAR = 1e9  # pixels; a box at 1e200 would be infinite in single precision, and so would its area
_TRIED = 5  # missing images that are looked for elsewhere
_FOLDERS_TRIED = 1000
_RUNS_AT_ONCE = 2**16  # of a compressed mask: each takes 70 bytes on the way


class Fault(Exception):
    """One thing wrong with one value: its kind (for counting) and its reason (for the reader)."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem: what, what was done about it, where, and why."""

    kind: str
    action: Action
    image: str | None  # file name as in the annotation file
    image_id: int | None
    annotation_id: int | None
    reason: str

    def where(self) -> str:
        parts = []
        if self.image is not None:
            parts.append(self.image)
        elif self.image_id is not None:
            parts.append(f"image id {self.image_id}")
        if self.annotation_id is not None:
            parts.append(f"annotation {self.annotation_id}")
        return ", ".join(parts)

    def __str__(self) -> str:
        where = self.where()
        return f"{where}: {self.reason}" if where else self.reason


@dataclass
class DatasetReport:
    """What was found in a dataset, and what became of it.

    Attributes:
        name: the dataset's name or annotation file.
        num_images, num_annotations: what is left after dropping.
        num_without_objects: images among them that have no annotation, or only crowd regions.
        problems: the first :data:`EXAMPLES_KEPT` of each kind.
        counts: (kind, action) -> how many.
        hint: where all images are missing, what finds them; "" where nothing does.
    """

    name: str
    num_images: int = 0
    num_annotations: int = 0
    num_classes: int = 0
    num_without_objects: int = 0
    problems: list[Problem] = field(default_factory=list)
    counts: dict[tuple[str, Action], int] = field(default_factory=dict)
    hint: str = ""

    def add(
        self,
        kind: str,
        action: Action,
        reason: str,
        *,
        image: str | None = None,
        image_id: int | None = None,
        annotation_id: int | None = None,
    ) -> None:
        count = self.counts.get((kind, action), 0)
        self.counts[kind, action] = count + 1
        if count < EXAMPLES_KEPT:
            shown = None if image is None else one_line(image)
            self.problems.append(Problem(kind, action, shown, image_id, annotation_id, one_line(reason)))

    def count(self, *actions: Action) -> int:
        """How many problems were met with one of these actions (all, when none is named)."""
        return sum(n for (_, action), n in self.counts.items() if not actions or action in actions)

    def first(self, action: Action) -> Problem | None:
        return next((problem for problem in self.problems if problem.action == action), None)

    def suspicions(self) -> list[str]:
        """What the boxes as a whole look like, if not like COCO's: each a line."""
        return [problem.reason for problem in self.problems if problem.kind == SUSPICIOUS]

    def kinds(self, action: Action) -> str:
        """The kinds met with this action and their counts: ``missing file 2, box without area 1``."""
        found = [(n, kind) for (kind, act), n in self.counts.items() if act == action]
        return ", ".join(f"{kind} {n}" for n, kind in sorted(found, key=lambda item: (-item[0], item[1])))

    def summary(self) -> str:
        """One line: what the dataset holds and what was done to it."""
        text = (
            f"{self.name}: {_plural(self.num_images, 'image')} ({self.num_without_objects} without objects), "
            f"{_plural(self.num_annotations, 'annotation')}, {_plural(self.num_classes, 'class', 'classes')}"
        )
        for action in ("stops", "dropped", "filled"):
            if self.count(action):
                text += f"; {'can not be used' if action == 'stops' else action}: {self.kinds(action)}"
        if self.suspicions():
            text += f"; {SUSPICIOUS}"
        elif not self.count("stops", "dropped", "filled"):
            text += "; no problems"
        return text

    def table(self, examples: int = 3) -> str:
        """Counts per problem, the worst first, with the first examples: file, annotation id, reason."""
        if not self.counts:
            return "no problems found"
        by_key: dict[tuple[str, Action], list[Problem]] = {}
        for problem in self.problems:
            shown = by_key.setdefault((problem.kind, problem.action), [])
            if len(shown) < examples:
                shown.append(problem)
        keys = sorted(self.counts, key=lambda key: (_ACTION_ORDER.index(key[1]), -self.counts[key], key[0]))
        wide = max(len("problem"), *(len(kind) for kind, _ in keys))
        lines = [f"{'problem':<{wide}}  {'action':<7}  {'count':>7}  first examples"]
        lines.append("-" * len(lines[0]))
        for kind, action in keys:
            start = f"{kind:<{wide}}  {action:<7}  {self.counts[kind, action]:>7}  "
            for problem in by_key[kind, action]:
                lines.append(start + str(problem))
                start = " " * len(start)
        return "\n".join(lines)


def _plural(count: int, word: str, plural: str | None = None) -> str:
    return f"{count} {word if count == 1 else plural or word + 's'}"


# ---------------------------------------------------------------------------------------------- values


def as_id(value: object) -> int | None:
    """A whole number that fits 64 bits, from an int or a float such as ``7.0``; None for anything else."""
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and -MAX_ID <= value <= MAX_ID else None


def check_side(value: object) -> int | None:
    """An image's height or width: a positive whole number; None for anything else."""
    side = as_id(value)
    return side if side is not None and side > 0 else None


def check_file_name(name: object, image_root: str) -> str:
    """The path of an image below ``image_root``.

    Raises:
        Fault: no name, or one that leads out of ``image_root``.
    """
    if not isinstance(name, str) or not name or not is_printable(name):
        raise Fault("no file name", f"file_name is {quote(name)}")
    path = os.path.join(image_root, name)
    # Windows: "C:x" and "\\x" are not absolute, and lead out nevertheless.
    if ".." in name or os.path.isabs(name) or os.path.splitdrive(name)[0] or name[0] in "/\\":
        # What is checked is what is opened: the system would follow a link before it goes up by "..".
        path = os.path.normpath(path)
        if not path.startswith(image_root.rstrip(os.sep) + os.sep):
            raise Fault("path outside the image folder", f"file_name leads out of {image_root}")
    return path


def check_box(box: object, height: int, width: int) -> tuple[list[float], bool]:
    """An (x, y, width, height) box as floats, and whether it reaches more than a pixel out of the image.

    Raises:
        Fault: not four numbers, NaN or infinite, without area, or wholly outside the image.
    """
    try:
        if not isinstance(box, list):
            raise TypeError
        # The sum refuses text, which float() alone would read as a number.
        values = [float(value) for value in box if value + 0 is not None]
        x, y, w, h = values
    except (TypeError, ValueError, OverflowError):
        raise Fault("broken box", f"bbox is not four numbers: {quote(box)}") from None
    right, bottom = x + w, y + h
    if (
        w > 0
        and h > 0
        and right > 0
        and bottom > 0
        and x < width
        and y < height
        and x > -_FAR
        and y > -_FAR
        and right < _FAR
        and bottom < _FAR
    ):
        return values, x < -1 or y < -1 or right > width + 1 or bottom > height + 1
    if not all(map(math.isfinite, (x, y, right, bottom))):
        raise Fault("broken box", f"bbox {values} is not finite")
    if max(map(abs, (x, y, right, bottom))) >= _FAR:
        raise Fault("broken box", f"bbox {values} has numbers far outside any image")
    if w <= 0 or h <= 0:
        kind = "inverted box" if w < 0 or h < 0 else "box without area"
        raise Fault(kind, f"bbox {values} has width {w:g} and height {h:g}")
    raise Fault("box outside the image", f"bbox {values} lies outside the image of {width}x{height}")


def check_polygons(polygons: list[Any], height: int, width: int) -> tuple[list[list[float]], list[str]]:
    """The usable polygons and, for each other one, what is wrong with it.

    Usable: at least three points, an even count of finite numbers, none absurdly far from the image, and not
    so long an outline that no object has it (drawing a polygon takes time and memory in proportion to its
    length in pixels).

    Raises:
        Fault: more than :data:`MAX_POLYGONS`.
    """
    if len(polygons) > MAX_POLYGONS:
        raise Fault("broken polygon", f"{len(polygons)} polygons: {MAX_POLYGONS} at most")
    limit = 4 * (height + width) + 1000
    outline_left = MAX_OUTLINE * (height + width) + 1000.0
    usable, faults = [], []
    for number, polygon in enumerate(polygons):
        try:
            length = len(polygon)
            if length >= 6 and length % 2 == 0:
                # sum() is NaN when any number is; min() and max() alone would miss one.
                if (
                    type(polygon) is list
                    and math.isfinite(sum(polygon))
                    and -limit <= (low := min(polygon)) <= (high := max(polygon)) <= limit
                ):
                    # Nearly every polygon is far below, whatever the way it takes between these two.
                    outline = length // 2 * float(high - low)
                    if outline > outline_left / 8:
                        points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
                        outline = float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum())
                    outline_left -= outline
                    if outline_left >= 0:
                        usable.append(polygon)
                        continue
                    reason = f"is longer than {MAX_OUTLINE} times the image's height and width"
                else:
                    reason = "has numbers that are not finite or far outside the image"
            else:
                reason = f"has {length} numbers: at least 6 are needed, in pairs"
        except (TypeError, OverflowError):
            reason = "is not a list of numbers"
        faults.append(f"polygon {number + 1} of {len(polygons)} {reason}")
    return usable, faults


def _compressed_counts(text: bytes) -> npt.NDArray[np.int64]:
    """Run lengths of COCO's compressed RLE (``rleFrString`` in pycocotools' maskApi.c).

    Each number is written in characters of 5 bits from ``0`` up, the lowest first; bit 6 says that more
    follow, and the top bit of the last is the sign. From the fourth on, each is a difference to the last but
    one.
    """
    codes = np.frombuffer(text, dtype=np.uint8)
    if codes.size == 0 or codes.min() < 48 or codes.max() > 111 or (codes[-1] - 48) & 32:
        raise ValueError("characters that no RLE has")
    ends = np.flatnonzero(((codes - 48) & 32) == 0)
    numbers = np.empty(ends.size, dtype=np.int64)
    start = 0
    for block in range(0, ends.size, _RUNS_AT_ONCE):
        here = ends[block : block + _RUNS_AT_ONCE]
        numbers[block : block + _RUNS_AT_ONCE] = _numbers(codes[start : here[-1] + 1], here - start)
        start = int(here[-1]) + 1
    # Undo the differences: counts[i] += counts[i - 2] for i > 2, that is two running sums.
    np.cumsum(numbers[1::2], out=numbers[1::2])
    if numbers.size > 2:
        np.cumsum(numbers[2::2], out=numbers[2::2])
    return numbers


def _numbers(characters: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The signed numbers whose last characters are at ``ends``."""
    codes = characters.astype(np.int64) - 48
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:
        raise ValueError("a run longer than any image")
    place = np.arange(codes.size) - np.repeat(starts, lengths)
    numbers: npt.NDArray[np.int64] = np.add.reduceat((codes & 31) << (5 * place), starts)
    return numbers - np.where(codes[ends] & 16, np.int64(1) << (5 * lengths), 0)


def check_rle(rle: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """A run-length mask in compressed form: ``{"size": [h, w], "counts": bytes or str}``.

    Raises:
        Fault: of another size than the image, or its runs don't add up to the image's pixels.
    """
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, (list, tuple)) or list(size) != [height, width]:
        raise Fault(
            "broken RLE", f"RLE size is {quote(size)}, the image's (height, width) is [{height}, {width}]"
        )
    try:
        if isinstance(counts, list):
            # Among texts, numpy would make each number as wide as the widest of them.
            if not set(map(type, counts)) <= {int}:
                raise ValueError("counts that are not whole numbers")
            runs = np.array(counts, dtype=None if counts else np.int64)
            if runs.dtype.kind not in "iu":
                raise ValueError("counts that are not whole numbers")
        elif isinstance(counts, (str, bytes)):
            runs = _compressed_counts(counts.encode("ascii") if isinstance(counts, str) else counts)
        else:
            raise ValueError(f"counts of type {type(counts).__name__}")
        if runs.size and (runs.min() < 0 or runs.max() > height * width):
            raise ValueError("a run below 0 or longer than the image")
        if int(runs.sum()) != height * width:
            raise ValueError(f"runs that add up to {int(runs.sum())} pixels, the image has {height * width}")
    except (ValueError, TypeError, OverflowError) as error:
        raise Fault("broken RLE", f"RLE has {one_line(str(error))}") from None
    if isinstance(counts, list):
        return dict(mask_utils.frPyObjects({"size": [height, width], "counts": counts}, height, width))
    return {"size": [height, width], "counts": counts}


def mask_rle(segmentation: list[list[float]] | dict[str, Any], height: int, width: int) -> Any:
    """A checked segmentation as one compressed RLE."""
    if isinstance(segmentation, list):
        return mask_utils.merge(mask_utils.frPyObjects(segmentation, height, width))
    return segmentation


# ---------------------------------------------------------------------------------------------- images


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image to look at: its path and the size that the annotation file gives, None where it gives none."""

    path: str
    height: int | None
    width: int | None


def check_image_file(file: ImageFile, full: bool) -> tuple[int, int]:
    """(height, width) of an image file.

    Args:
        file: the image.
        full: decode it wholly; otherwise its header and end are read.

    Raises:
        Fault: missing, unreadable, too large, or of another size than declared.
    """
    try:
        header = read_header(file.path)
        if full:
            height, width = read_image(file.path).shape[:2]
            header = ImageHeader(width, height, header.rotated)
    except ImageError as error:
        where = f" ({error.path})" if error.kind == "missing file" else ""
        raise Fault(error.kind, error.reason + where) from None
    found = (header.height, header.width)
    if (file.height, file.width) == (None, None) or found == (file.height, file.width):
        return found
    reason = f"is {header.width}x{header.height}, the annotation file says {file.width}x{file.height}"
    if found == (file.width, file.height):
        reason += (
            " (its size before the EXIF rotation, which is applied on reading)"
            if header.rotated
            else " (width and height swapped)"
        )
    raise Fault("wrong image size", reason)


def check_image_files(
    files: Sequence[ImageFile], check: ImageCheck, workers: int | None = None
) -> Iterator[tuple[int, int] | Fault]:
    """For each image in order, its (height, width) or what is wrong with it; in threads.

    With ``check="none"`` only images whose size isn't declared are opened.
    """

    def look(file: ImageFile) -> tuple[int, int] | Fault:
        if check == "none" and file.height is not None and file.width is not None:
            return file.height, file.width
        try:
            return check_image_file(file, check == "full")
        except Fault as fault:
            return Fault(fault.kind, fault.reason)  # without the frames that it was raised through

    if len(files) < 64 or check == "none":
        yield from map(look, files)
        return
    # Threads: most of the time goes into waiting for the disk and into Pillow's C code.
    with ThreadPoolExecutor(workers or min(16, 2 * (os.cpu_count() or 1))) as pool:
        # In parts: the pool takes up two kilobytes for each that waits.
        for start in range(0, len(files), 4096):
            yield from pool.map(look, files[start : start + 4096])


def where_missing_images_are(names: Sequence[str], image_root: str) -> str:
    """Why images that are there are not found, where one of the usual mistakes explains it.

    Args:
        names: ``file_name`` of images that don't exist; a few of them are looked for.
        image_root: their folder, absolute.

    Returns:
        What was found and what to change, a line; "" where no mistake explains all that were tried.
    """
    tried = names[:: max(1, len(names) // _TRIED)][:_TRIED]
    if not tried:
        return ""
    first = tried[0]

    def are_there(changed: Iterable[str], folder: str = image_root) -> bool:
        return all(_is_below(name, folder) for name in changed)

    def told(found: str, advice: str) -> str:
        return f"{quote(first)} is there as {quote(found)}: {advice}"

    slashes = [name.replace("\\", "/") for name in tried]
    if are_there(slashes):
        return told(slashes[0], "replace backslashes in file_name")
    # file_name repeats the folder's last parts, or the folder lies beside the right one.
    folder = image_root
    for _ in range(3):
        folder = os.path.dirname(folder)
        if are_there(tried, folder):
            return f"{quote(first)} is there below {folder}: give that as the image folder"
    for change in (str.lower, str.upper, str.capitalize):
        # Of ".JPG" Python capitalizes the dot.
        other = [
            stem + extension[:1] + change(extension[1:]) for stem, extension in map(os.path.splitext, tried)
        ]
        if are_there(other):
            return told(other[0], "file_name needs the same capital letters")
    within = _subfolders(image_root)
    for folder in within:
        if are_there(tried, folder):
            return f"{quote(first)} is there below {folder}: give that as the image folder"
    found = [next((folder for folder in within if _is_below(name, folder)), None) for name in tried]
    if None not in found:
        path = os.path.relpath(os.path.join(str(found[0]), first), image_root)
        return told(path, "file_name must name the folder, too")
    bare = [name.rpartition("/")[2] for name in slashes]
    return told(bare[0], "take the folder out of file_name") if are_there(bare) else ""


def _is_below(name: str, folder: str) -> bool:
    try:
        return os.path.isfile(check_file_name(name, folder))
    except Fault:
        return False


def _subfolders(root: str) -> list[str]:
    """Folders below ``root``, of two levels, not too many."""
    found: list[str] = []
    for path, folders, _ in os.walk(root):
        folders.sort()
        found += [os.path.join(path, folder) for folder in folders]
        if path != root:
            folders.clear()
        if len(found) >= _FOLDERS_TRIED:
            break
    return found[:_FOLDERS_TRIED]


def filter_empty(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records with at least one annotation that is no crowd region.

    Detectron2's ``DATALOADER.FILTER_EMPTY_ANNOTATIONS`` (``filter_images_with_only_crowd_annotations``).
    """
    return [r for r in records if any(not a.get("iscrowd", 0) for a in r["annotations"])]


def filter_few_keypoints(records: Iterable[dict[str, Any]], minimum: int) -> list[dict[str, Any]]:
    """The records with at least ``minimum`` labelled keypoints over all their objects.

    Detectron2's ``MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE`` (``filter_images_with_few_keypoints``).
    Crowd regions count no keypoints, as they have none labelled.
    """

    def labelled(record: dict[str, Any]) -> int:
        return sum(v > 0 for a in record["annotations"] for v in a.get("keypoints", ())[2::3])

    return [record for record in records if labelled(record) >= minimum]
