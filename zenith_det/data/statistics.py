"""What a set holds, counted: images, objects, their sizes as the network sees them, masks, keypoints."""

from __future__ import annotations

import json
import logging
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zenith_det.data.catalog import was_found
from zenith_det.data.metadata import DatasetMetadata
from zenith_det.errors import DatasetError

#: Where a run keeps the statistics of its sets, below OUTPUT_DIR.
STATISTICS_FILE = "datasets.json"
#: Sides of objects at the network's input, pixels: the bins of their histogram are between these.
SIZE_BINS = (0, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class InputSize:
    """How images are brought to the size in which the network takes them.

    Attributes:
        short: of the shorter side, pixels; 0: images keep their size.
        longest: the longer side's limit.
        crop: ``(INPUT.CROP.TYPE, height, width)`` where training crops before it resizes.
        drawn: the sizes that ``short`` is the middle of, in words; "" where there is one.
    """

    short: float
    longest: float
    crop: tuple[str, float, float] | None = None
    drawn: str = ""

    @classmethod
    def of(cls, cfg: Any, *, training: bool) -> InputSize:
        """That of a configuration; where training draws among several sizes, the middle one."""
        given = cfg.INPUT
        if not training:
            return cls(float(given.MIN_SIZE_TEST), float(given.MAX_SIZE_TEST))
        sizes = (
            given.MIN_SIZE_TRAIN if isinstance(given.MIN_SIZE_TRAIN, list | tuple) else [given.MIN_SIZE_TRAIN]
        )
        crop = given.CROP
        size = (str(crop.TYPE), float(crop.SIZE[0]), float(crop.SIZE[1])) if crop.ENABLED else None
        middle = float(np.median(sizes))
        drawn = f" (the middle of {min(sizes)} to {max(sizes)})" if len(set(sizes)) > 1 else ""
        return cls(middle, float(given.MAX_SIZE_TRAIN), size, drawn)

    def scales(self, heights: Floats, widths: Floats) -> Floats:
        """What images of these sizes are enlarged by, as Detectron2's ``ResizeShortestEdge`` does it."""
        if self.crop is not None:
            heights, widths = self._cropped(heights, widths)
        if self.short <= 0:
            return np.ones(len(heights))
        enlarged = self.short / np.minimum(heights, widths)
        limit = self.longest / np.maximum(heights, widths) if self.longest > 0 else np.inf
        return np.minimum(enlarged, limit)

    def _cropped(self, heights: Floats, widths: Floats) -> tuple[Floats, Floats]:
        """The size of Detectron2's ``RandomCrop``, the mean where it is drawn."""
        assert self.crop is not None
        kind, *size = self.crop
        sides = []
        for side, asked in zip((heights, widths), size, strict=True):
            if kind == "relative":
                sides.append(side * asked)
            elif kind == "relative_range":  # drawn between the share asked for and the whole
                sides.append(side * (asked + 1) / 2)
            else:
                sides.append(np.minimum(side, asked))
        return np.maximum(sides[0], 1), np.maximum(sides[1], 1)

    def __str__(self) -> str:
        if self.short <= 0:
            text = "images as they are"
        else:
            text = f"shorter side {self.short:g}{self.drawn}, longer {self.longest:g} at most"
        return f"{text}, after a crop" if self.crop else text


@dataclass(frozen=True)
class ClassStatistics:
    """Of one class, or of all together.

    Attributes:
        name: of the class; "" for all.
        images: with an object of it.
        objects: crowd regions left out.
        crowds: crowd regions.
        masks: objects with a mask.
        keypoints: objects with a labelled keypoint.
        median_side: of the objects, pixels at the network's input; the root of the box's area. 0 without objects.
        under_4, under_8: objects whose side is below.
    """

    name: str
    images: int = 0
    objects: int = 0
    crowds: int = 0
    masks: int = 0
    keypoints: int = 0
    median_side: float = 0.0
    under_4: int = 0
    under_8: int = 0


@dataclass(frozen=True)
class SetStatistics:
    """Of one set.

    Attributes:
        role: "training" or "validation"; "" where it has none.
        name: of the set.
        json_file, image_root: its files, absolute.
        input_size: how images are resized, in words.
        images: of the set, as checked.
        without_objects: of these, without an object.
        total: of all classes.
        classes: in the set's order.
        side_counts: objects by side at the network's input, see :data:`SIZE_BINS`.
        found: what reading the set found, and what training leaves out of it, in lines.
        problems: the table of its problems; "" without any.
    """

    role: str
    name: str
    json_file: str
    image_root: str
    input_size: str
    images: int
    without_objects: int
    total: ClassStatistics
    classes: list[ClassStatistics] = field(default_factory=list)
    side_counts: list[int] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    problems: str = ""

    @property
    def title(self) -> str:
        """``"training: shapes_train"``."""
        return f"{self.role}: {self.name}" if self.role else self.name

    def of_class(self, name: str) -> ClassStatistics:
        """Of a class by its name; zeros where the set doesn't have it."""
        return next((one for one in self.classes if one.name == name), ClassStatistics(name))


def count_set(
    metadata: DatasetMetadata,
    records: Iterable[Mapping[str, Any]],
    input_size: InputSize,
    *,
    role: str = "",
    found: Sequence[str] = (),
    problems: str = "",
) -> SetStatistics:
    """Count what a checked set holds, in one pass over its records.

    Args:
        metadata: of the set.
        records: Detectron2's standard dataset dicts.
        input_size: of the images that the network gets.
        role: see :class:`SetStatistics`, as for the others.
    """
    sizes: list[tuple[int, int]] = []
    # Five numbers an object: of its image and class, its box's area; whether it has a mask, a labelled keypoint.
    rows = array("d")
    crowds = np.zeros(metadata.num_classes, dtype=np.int64)
    for number, record in enumerate(records):
        sizes.append((record["height"], record["width"]))
        for item in record["annotations"]:
            if item.get("iscrowd"):
                crowds[item["category_id"]] += 1
                continue
            box = item["bbox"]
            keypoints = item.get("keypoints")
            rows.extend(
                (
                    number,
                    item["category_id"],
                    box[2] * box[3],
                    bool(item.get("segmentation")),
                    keypoints is not None and any(keypoints[2::3]),
                )
            )
    heights, widths = np.array(sizes, dtype=np.float64).reshape(-1, 2).T
    table = np.frombuffer(rows).reshape(-1, 5) if rows else np.zeros((0, 5))
    image, label = table[:, 0].astype(np.int64), table[:, 1].astype(np.int64)
    sides = np.sqrt(table[:, 2]) * input_size.scales(heights, widths)[image]
    order = np.argsort(label, kind="stable")
    ends = np.searchsorted(label[order], np.arange(metadata.num_classes + 1))

    def of(name: str, rows: npt.NDArray[np.int64], crowds: int) -> ClassStatistics:
        own = sides[rows]
        return ClassStatistics(
            name=name,
            images=len(np.unique(image[rows])),
            objects=len(rows),
            crowds=crowds,
            masks=int(table[rows, 3].sum()),
            keypoints=int(table[rows, 4].sum()),
            median_side=float(np.median(own)) if len(rows) else 0.0,
            under_4=int((own < 4).sum()),
            under_8=int((own < 8).sum()),
        )

    total = of("", order, int(crowds.sum()))
    return SetStatistics(
        role=role,
        name=metadata.name,
        json_file=metadata.json_file,
        image_root=metadata.image_root,
        input_size=str(input_size),
        images=len(sizes),
        without_objects=len(sizes) - total.images,
        total=total,
        classes=[
            of(name, order[ends[n] : ends[n + 1]], int(crowds[n]))
            for n, name in enumerate(metadata.thing_classes)
        ],
        side_counts=np.histogram(sides, [*SIZE_BINS, np.inf])[0].tolist(),
        found=list(found),
        problems=problems,
    )


def to_json(sets: Sequence[SetStatistics], notes: Sequence[str]) -> str:
    """The content of :data:`STATISTICS_FILE`."""
    return json.dumps({"sets": [asdict(one) for one in sets], "notes": list(notes)}, indent=1)


def read_statistics(folder: Path) -> tuple[list[SetStatistics], list[str]]:
    """The statistics and notes in a run's :data:`STATISTICS_FILE`.

    Raises:
        DatasetError: it isn't there, or something else is in it.
    """
    path = folder / STATISTICS_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        sets = [
            SetStatistics(
                **one
                | {
                    "total": ClassStatistics(**one["total"]),
                    "classes": [ClassStatistics(**each) for each in one["classes"]],
                    "found": list(map(str, one["found"])),
                }
            )
            for one in content["sets"]
        ]
        return sets, [str(note) for note in content["notes"]]
    except OSError as error:
        raise DatasetError(f"{path}: can't be read: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        raise DatasetError(f"{path}: not the statistics of a run's sets; is it cut off?") from None


def find_sets_again(output_dir: Path) -> None:
    """Have the sets of a run that began in this folder found from any other, where DETECTRON2_DATASETS is relative."""
    if not (output_dir / STATISTICS_FILE).exists():
        return
    try:
        sets, _ = read_statistics(output_dir)
    except DatasetError as error:
        logger.warning("%s", error)
        return
    for one in sets:
        was_found(one.name, one.json_file, one.image_root)
