"""Detections drawn on images, and ground truth beside predictions.

Images are BGR, uint8, (H, W, 3), as OpenCV reads them. Small images are drawn enlarged, so that
lines and labels are legible whatever the size of the image.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pycocotools.mask as coco_mask
from PIL import Image, ImageDraw

from zenith_det import opencv as cv2
from zenith_det.errors import UserError
from zenith_det.evaluation.recommended import DEFAULT_SCORE
from zenith_det.files import write_whole
from zenith_det.report.fonts import Lettering, drawable, tell_undrawable

if TYPE_CHECKING:
    from zenith_det.data.metadata import DatasetMetadata

ByteImage = npt.NDArray[np.uint8]
Color = tuple[int, int, int]  # RGB
Rectangle = tuple[float, float, float, float]  # x0 y0 x1 y1

#: Okabe and Ito's colours without black and yellow: told apart with any colour vision.
_PALETTE: tuple[Color, ...] = (
    (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0),
)  # fmt: skip
_LEFT, _RIGHT, _MIDDLE = (230, 159, 0), (86, 180, 233), (240, 240, 240)
_CROWD: Color = (150, 150, 150)
_BACKGROUND, _INK, _FAINT = (255, 255, 255), (34, 34, 34), (120, 120, 120)

#: A label of which more than this share would lie on others is left out.
_MOST_COVERED = 0.1

#: Predicted keypoints below this score aren't drawn.
KEYPOINT_THRESHOLD = 0.05
#: The width of an image on a sheet, in pixels; tall images get less, so that none is taller than 0.8 of this.
SHEET_WIDTH = 640
#: The longer side that :func:`draw_instances` enlarges smaller images to, in pixels.
MIN_LONG_SIDE = 640


@dataclass(frozen=True)
class Instances:
    """What to draw on one image.

    Attributes:
        boxes: (N, 4) x0 y0 x1 y1 in pixels of the image.
        classes: (N,) contiguous class indices.
        scores: (N,) in 0..1, or None for ground truth.
        masks: (N, H, W) bool, or None.
        keypoints: (N, K, 3) x y v, or None. ``v`` is the visibility (0 none, 1 hidden, 2 visible) for ground
            truth, and a score otherwise.
        crowd: (N,) bool: regions with many objects, drawn grey.
    """

    boxes: npt.NDArray[Any]
    classes: npt.NDArray[Any]
    scores: npt.NDArray[Any] | None = None
    masks: npt.NDArray[Any] | None = None
    keypoints: npt.NDArray[Any] | None = None
    crowd: npt.NDArray[Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "boxes", np.asarray(self.boxes, dtype=np.float64).reshape(-1, 4))
        for name in ("classes", "scores", "masks", "keypoints", "crowd"):
            value = getattr(self, name)
            if value is None:
                continue
            array = np.asarray(value)
            object.__setattr__(self, name, array)
            if len(array) != len(self.boxes):
                raise ValueError(f"{len(self.boxes)} boxes but {len(array)} {name}")

    def __len__(self) -> int:
        return len(self.boxes)

    def pick(self, index: npt.NDArray[Any]) -> Instances:
        """The instances of a boolean or integer index, in its order."""
        fields = ("boxes", "classes", "scores", "masks", "keypoints", "crowd")
        picked: dict[str, Any] = {}
        for name in fields:
            value = getattr(self, name)
            picked[name] = None if value is None else value[index]
        return replace(self, **picked)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Instances:
        """The ground truth of a dataset record (boxes x y w h; polygons or RLE)."""
        annotations = record.get("annotations", [])
        size = (int(record["height"]), int(record["width"]))
        boxes = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = None
        if any(a.get("segmentation") for a in annotations):
            masks = _stacked(
                (_segmentation_to_mask(a.get("segmentation"), size) for a in annotations), len(annotations)
            )
        keypoints = None
        count = max((len(a.get("keypoints") or ()) for a in annotations), default=0)
        if count:
            flat = [a.get("keypoints") or [0.0] * count for a in annotations]
            keypoints = np.array(flat, dtype=np.float64).reshape(len(flat), -1, 3)
        return cls(
            boxes=boxes,
            classes=np.array([a["category_id"] for a in annotations], dtype=np.int64),
            masks=masks,
            keypoints=keypoints,
            crowd=np.array([bool(a.get("iscrowd")) for a in annotations], dtype=bool),
        )

    @classmethod
    def from_results(cls, results: Sequence[Mapping[str, Any]], metadata: DatasetMetadata) -> Instances:
        """One image's detections in COCO's result format (original category ids, RLE)."""
        boxes = np.array([r["bbox"] for r in results], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        index_of = metadata.thing_dataset_id_to_contiguous_id
        masks = keypoints = None
        if results and all(r.get("segmentation") for r in results):
            masks = _stacked((coco_mask.decode(dict(r["segmentation"])) for r in results), len(results))
        if results and all(r.get("keypoints") for r in results):
            keypoints = np.array([r["keypoints"] for r in results], dtype=np.float64).reshape(
                len(results), -1, 3
            )
            keypoints[..., :2] += 0.5  # back to the middle of the pixel, as in records
        return cls(
            boxes=boxes,
            classes=np.array([index_of[r["category_id"]] for r in results], dtype=np.int64),
            scores=np.array([r["score"] for r in results], dtype=np.float64),
            masks=masks,
            keypoints=keypoints,
        )


def _stacked(masks: Iterable[npt.NDArray[Any]], count: int) -> npt.NDArray[np.bool_] | None:
    """``count`` masks of an image, at least one, in one array, of which there is no second one at any time."""
    stacked: npt.NDArray[np.bool_] | None = None
    for number, mask in enumerate(masks):
        if stacked is None:
            stacked = np.empty((count, *mask.shape), dtype=bool)
        stacked[number] = mask
    return stacked


@dataclass(frozen=True)
class SheetRow:
    """One image of a :func:`prediction_sheet`, with its name."""

    image: ByteImage
    ground_truth: Instances
    predictions: Instances
    name: str = ""


def _segmentation_to_mask(segmentation: Any, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    if not segmentation:
        return np.zeros(size, dtype=bool)
    if isinstance(segmentation, list):
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
    elif isinstance(segmentation["counts"], list):
        rle = coco_mask.frPyObjects(dict(segmentation), *size)
    else:
        rle = dict(segmentation)
    return np.asarray(coco_mask.decode(rle), dtype=bool)


def draw_instances(
    image: ByteImage,
    boxes: npt.ArrayLike,
    classes: npt.ArrayLike,
    scores: npt.ArrayLike | None = None,
    masks: npt.ArrayLike | None = None,
    keypoints: npt.ArrayLike | None = None,
    metadata: DatasetMetadata | None = None,
    *,
    crowd: npt.ArrayLike | None = None,
    scale: float | None = None,
) -> ByteImage:
    """Draw boxes, masks, keypoints and labels on a copy of an image.

    Args:
        image: BGR uint8 (H, W, 3).
        boxes: (N, 4) x0 y0 x1 y1 in pixels.
        classes: (N,) contiguous class indices.
        scores: (N,) 0..1, shown in percent; None for ground truth.
        masks: (N, H, W) bool.
        keypoints: (N, K, 3): x, y, and visibility where ``scores`` is None (1, hidden, is drawn hollow),
            otherwise a score, drawn above :data:`KEYPOINT_THRESHOLD`.
        metadata: gives class names, keypoint names (left and right get their own colours) and the skeleton.
        crowd: (N,) bool, drawn grey.
        scale: size of the result, as a factor; default: 1, or what brings the longer side to 640.

    Returns:
        BGR uint8 (round(H * scale), round(W * scale), 3).

    Raises:
        ValueError: arrays whose lengths differ, masks of another size than the image, an image without three
            channels.
    """
    instances = Instances(
        np.asarray(boxes, dtype=np.float64),
        np.asarray(classes),
        None if scores is None else np.asarray(scores),
        None if masks is None else np.asarray(masks),
        None if keypoints is None else np.asarray(keypoints),
        None if crowd is None else np.asarray(crowd),
    )
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"the image must be (H, W, 3), got {image.shape}")
    height, width = image.shape[:2]
    if instances.masks is not None and len(instances) and instances.masks.shape[1:] != (height, width):
        raise ValueError(f"masks have size {instances.masks.shape[1:]}, but the image {(height, width)}")
    if scale is None:
        scale = max(1.0, MIN_LONG_SIDE / max(height, width))
    canvas = _resize(image, scale)
    unit = max(1.0, max(canvas.shape[:2]) / 640)  # line widths and letters grow with the picture

    # Large things first, so that small ones stay visible on top.
    areas = np.prod(np.maximum(instances.boxes[:, 2:] - instances.boxes[:, :2], 0), axis=1)
    order = np.argsort(-areas, kind="stable")
    unsorted_masks = instances.masks  # not to have them twice
    instances = replace(instances, masks=None).pick(order)
    colors = [_color(instances, n, metadata) for n in range(len(instances))]

    if unsorted_masks is not None:
        for number, color in zip(order, colors, strict=True):
            _draw_mask(canvas, unsorted_masks[number], color, unit)
    for box, color in zip(instances.boxes, colors, strict=True):
        _draw_box(canvas, box * scale, color, unit, thin=unsorted_masks is not None)
    if instances.keypoints is not None:
        for n, points in enumerate(instances.keypoints):
            if instances.crowd is None or not instances.crowd[n]:
                visible = points[:, 2] > (0 if instances.scores is None else KEYPOINT_THRESHOLD)
                hidden = points[:, 2] == 1 if instances.scores is None else np.zeros(len(points), bool)
                _draw_keypoints(canvas, points[:, :2] * scale, visible, hidden, colors[n], metadata, unit)
    return _draw_labels(canvas, instances, colors, metadata, scale, unit)


def prediction_sheet(
    rows: Iterable[SheetRow],
    metadata: DatasetMetadata | None,
    path: str | os.PathLike[str],
    score: float = DEFAULT_SCORE,
) -> Path:
    """Write a picture with an image per row: ground truth to the left, predictions to the right.

    Its title names the score from which predictions are drawn; where none is left, the picture says so, with the
    highest score.

    Args:
        rows: images (BGR) with their ground truth and predictions; taken one by one, so that the masks of one image
            at a time are in memory where they are made as they are asked for.
        metadata: as in :func:`draw_instances`.
        path: the picture, usually ``OUTPUT_DIR/predictions.png``.
        score: predictions below it are not drawn; 0..1.

    Returns:
        the picture's path.

    Raises:
        UserError: no image to draw, or the picture cannot be written.
    """
    gap, head, caption = 16, 56, 24
    cells = []
    for row in rows:
        height, width = row.image.shape[:2]
        scale = min(SHEET_WIDTH / width, 0.8 * SHEET_WIDTH / height)
        kept = row.predictions
        if kept.scores is not None:
            kept = kept.pick(kept.scores >= score)
        pictures = [
            draw_instances(
                row.image, i.boxes, i.classes, i.scores, i.masks, i.keypoints, metadata,
                crowd=i.crowd, scale=scale,
            )
            for i in (row.ground_truth, kept)
        ]  # fmt: skip
        cells.append((row.name, pictures, _nothing_left(row.predictions, kept, score)))
        del row, kept
    if not cells:
        raise UserError(f"{path}: no image to draw predictions on")

    row_heights = [pictures[0].shape[0] + gap + (caption if name else 0) for name, pictures, _ in cells]
    column = max(picture.shape[1] for _, pictures, _ in cells for picture in pictures)
    sheet = Image.new("RGB", (2 * column + 3 * gap, head + sum(row_heights)), _BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    for n, title in enumerate(("ground truth", f"predictions of {score:.0%} or more")):
        letters, text = Lettering(26, bold=True), titled(title, metadata)
        letters.draw(pen, (gap + n * (column + gap), (head - letters.height(text)) / 2), text, _INK)
    top, names = head, Lettering(16)
    for (name, pictures, note), row_height in zip(cells, row_heights, strict=True):
        for n, picture in enumerate(pictures):
            left = gap + n * (column + gap) + (column - picture.shape[1]) // 2
            sheet.paste(Image.fromarray(picture[:, :, ::-1]), (left, top))
            if n == 1 and note:
                _chip(pen, (left + 8, top + 8), note, Lettering(18), (60, 60, 60))
        left = gap + (column - pictures[0].shape[1]) // 2
        names.draw(pen, (left, top + pictures[0].shape[0] + 4), names.shortened(name, 2 * column), _FAINT)
        top += row_height

    return _save(sheet, Path(path))


def titled(title: str, metadata: DatasetMetadata | None) -> str:
    """A sheet's title, with the only class's name where there is one class: labels leave that out."""
    names = metadata.thing_classes if metadata is not None else ()
    return f"{title}: {names[0]}" if len(names) == 1 else title


def labelled_sheet(cells: Sequence[tuple[ByteImage, str]], title: str, path: str | os.PathLike[str]) -> Path:
    """Write a picture of several pictures in rows, each with its name below.

    Args:
        cells: pictures (BGR) and their names.
        title: of the whole.
        path: the file.

    Returns:
        the picture's path.

    Raises:
        UserError: no picture, or the file cannot be written.
    """
    if not cells:
        raise UserError(f"{path}: no image to draw labels on")
    gap, head, caption = 16, 56, 30
    columns = min(3, len(cells))
    rows = [cells[n : n + columns] for n in range(0, len(cells), columns)]
    heights = [max(picture.shape[0] for picture, _ in row) + caption + gap for row in rows]
    column = max(picture.shape[1] for picture, _ in cells)
    letters, names = Lettering(26, bold=True), Lettering(16)
    width = max(columns * (column + gap), letters.width(title) + gap) + gap
    sheet = Image.new("RGB", (width, head + sum(heights)), _BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    letters.draw(pen, (gap, (head - letters.height(title)) / 2), title, _INK)
    top = head
    for row, height in zip(rows, heights, strict=True):
        for n, (picture, name) in enumerate(row):
            left = gap + n * (column + gap)
            sheet.paste(Image.fromarray(picture[:, :, ::-1]), (left, top))
            names.draw(pen, (left, top + picture.shape[0] + 5), names.shortened(name, column), _FAINT)
        top += height
    return _save(sheet, Path(path))


def _save(sheet: Image.Image, target: Path) -> Path:
    kind = Image.registered_extensions().get(target.suffix.lower() or ".png")
    if kind is None:
        raise UserError(f"{target}: pictures are not written as {target.suffix}; give .png or .jpg")
    return write_whole(target, lambda file: sheet.save(file, kind))


def _nothing_left(found: Instances, kept: Instances, score: float) -> str:
    if len(kept):
        return ""
    if not len(found) or found.scores is None:
        return "no detection"
    return f"no detection of {score:.0%} or more (highest {float(found.scores.max()):.1%})"


def _resize(image: ByteImage, scale: float) -> ByteImage:
    height, width = image.shape[:2]
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    if size == (width, height):
        return np.ascontiguousarray(image).copy()
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, size, interpolation=way), dtype=np.uint8)


def _color(instances: Instances, n: int, metadata: DatasetMetadata | None) -> Color:
    """A colour per class; with a single class, per instance."""
    if instances.crowd is not None and instances.crowd[n]:
        return _CROWD
    single = metadata is not None and len(metadata.thing_classes) == 1
    return _nth_color(n if single else int(instances.classes[n]))


@cache
def _nth_color(n: int) -> Color:
    if n < len(_PALETTE):
        return _PALETTE[n]
    # Golden-angle steps around the hues, at three lightnesses: neighbours in number are far apart in colour.
    hue = (n * 0.618033988749895) % 1.0
    value = (0.95, 0.75, 0.85)[n % 3]
    hsv = np.array([[[hue * 179, 190, value * 255]]], dtype=np.uint8)
    red, green, blue = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0].tolist()
    return (red, green, blue)


def _bgr(color: Color) -> Color:
    return (color[2], color[1], color[0])


def _draw_mask(canvas: ByteImage, mask: npt.NDArray[Any], color: Color, unit: float) -> None:
    """A translucent fill and its outline, in place."""
    height, width = canvas.shape[:2]
    # Interpolated and cut at one half: outlines of enlarged masks are smooth, not stairs.
    enlarged = cv2.resize(mask.astype(np.uint8) * 255, (width, height), interpolation=cv2.INTER_LINEAR)
    inside = enlarged > 127
    if not inside.any():
        return
    ink = np.array(_bgr(color), dtype=np.float32)
    canvas[inside] = (canvas[inside] * 0.6 + ink * 0.4).round().astype(np.uint8)
    outlines, _ = cv2.findContours(inside.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(canvas, outlines, -1, _bgr(color), max(1, round(1.5 * unit)), cv2.LINE_AA)


def _draw_box(canvas: ByteImage, box: npt.NDArray[Any], color: Color, unit: float, *, thin: bool) -> None:
    (x0, y0), (x1, y1) = _pixels(box.reshape(2, 2))
    thickness = max(1, round((1.2 if thin else 2.2) * unit))
    cv2.rectangle(canvas, (x0, y0), (x1 - 1, y1 - 1), _bgr(color), thickness, cv2.LINE_AA)


def _draw_keypoints(
    canvas: ByteImage,
    points: npt.NDArray[Any],
    visible: npt.NDArray[np.bool_],
    hidden: npt.NDArray[np.bool_],
    color: Color,
    metadata: DatasetMetadata | None,
    unit: float,
) -> None:
    names = metadata.keypoint_names if metadata is not None else ()
    sides = [_side_color(names[k]) if k < len(names) else color for k in range(len(points))]
    spots = _pixels(points)
    # Limbs of a distant figure must not fill it: as thick as a fiftieth of what is seen of it.
    seen = points[visible]
    extent = float(np.ptp(seen, axis=0).max()) if len(seen) > 1 else 40.0
    limb = max(1, round(min(3.0 * unit, max(1.4, extent / 45))))
    for first, second in metadata.keypoint_connections if metadata is not None else ():
        if max(first, second) < len(points) and visible[first] and visible[second]:
            tint = sides[first] if sides[first] == sides[second] else _MIDDLE
            cv2.line(canvas, spots[first], spots[second], (30, 30, 30), limb + 2, cv2.LINE_AA)
            cv2.line(canvas, spots[first], spots[second], _bgr(tint), limb, cv2.LINE_AA)
    for k, spot in enumerate(spots):
        if not visible[k]:
            continue
        radius = limb + 1
        cv2.circle(canvas, spot, radius + 1, (30, 30, 30), -1, cv2.LINE_AA)
        cv2.circle(canvas, spot, radius, _bgr(sides[k]), -1, cv2.LINE_AA)
        if hidden[k]:
            cv2.circle(canvas, spot, max(1, radius - 1), (30, 30, 30), -1, cv2.LINE_AA)


def _pixels(points: npt.NDArray[Any]) -> list[tuple[int, int]]:
    """Whole pixels. A model that diverged may say anything: far outside is as good as at infinity."""
    bounded = np.clip(np.nan_to_num(points), -10_000, 10_000)
    return [(round(float(x)), round(float(y))) for x, y in bounded]


def _side_color(name: str) -> Color:
    lowered = name.lower()
    return _LEFT if lowered.startswith("left") else _RIGHT if lowered.startswith("right") else _MIDDLE


def _draw_labels(
    canvas: ByteImage,
    instances: Instances,
    colors: Sequence[Color],
    metadata: DatasetMetadata | None,
    scale: float,
    unit: float,
) -> ByteImage:
    """Class and score beside each box, inside the picture and clear of one another; where there is no room, none."""
    picture = Image.fromarray(np.ascontiguousarray(canvas[:, :, ::-1]))
    pen = ImageDraw.Draw(picture, "RGBA")
    large, small = Lettering(max(12, round(14 * unit))), Lettering(max(10, round(10.5 * unit)))
    if metadata is not None:
        tell_undrawable(metadata.thing_classes, "the numbers of these classes, from 0")
    boxes = instances.boxes * scale
    taken: list[Rectangle] = []
    tiny: list[Rectangle] = []
    labels = []
    for n, box in enumerate(boxes):
        text = _label(instances, n, metadata)
        width, height = _chip_size(text, large)
        # A label must not hide the object that it names, nor its small neighbours.
        is_tiny = (box[2] - box[0]) * (box[3] - box[1]) < 2 * width * height
        labels.append((text, small if is_tiny else large))
        if is_tiny:
            tiny.append(_rectangle(box))
    # Small objects, drawn last, choose their place first.
    for n in reversed(range(len(instances))):
        text, font = labels[n]
        if not text:
            continue
        width, height = _chip_size(text, font)
        left, top = _place(boxes[n], width, height, picture.size, taken, tiny)
        chip = (left, top, left + width, top + height)
        if sum(_common_area(chip, other) for other in taken) > _MOST_COVERED * width * height:
            continue  # in a crowd: two labels over one another are worth less than one
        taken.append(chip)
        _chip(pen, (left, top), text, font, colors[n])
    return np.ascontiguousarray(np.asarray(picture)[:, :, ::-1])


def _label(instances: Instances, n: int, metadata: DatasetMetadata | None) -> str:
    index = int(instances.classes[n])
    names = metadata.thing_classes if metadata is not None else ()
    known = 0 <= index < len(names) and drawable(names[index])
    parts = []
    if len(names) != 1:  # the name of the only class says nothing
        parts.append(names[index] if known else f"class {index}")
    if instances.crowd is not None and instances.crowd[n]:
        parts.append("(crowd)")
    if instances.scores is not None:
        parts.append(f"{float(instances.scores[n]):.0%}")
    return " ".join(parts)


def _chip_size(text: str, font: Lettering) -> tuple[int, int]:
    return font.width(text) + 8, font.height(text) + 2


def _chip(
    pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, font: Lettering, color: Color
) -> None:
    width, height = _chip_size(text, font)
    pen.rounded_rectangle((at[0], at[1], at[0] + width - 1, at[1] + height - 1), 3, (*color, 225))
    luminance = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    font.draw(pen, (at[0] + 4, at[1] + 1), text, (20, 20, 20) if luminance > 140 else (255, 255, 255))


def _rectangle(box: npt.NDArray[Any]) -> Rectangle:
    (x0, y0), (x1, y1) = _pixels(box.reshape(2, 2))
    return (x0, y0, x1, y1)


def _common_area(first: Rectangle, second: Rectangle) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(0.0, width) * max(0.0, height)


def _place(
    box: npt.NDArray[Any],
    width: int,
    height: int,
    size: tuple[int, int],
    labels: Sequence[Rectangle],
    objects: Sequence[Rectangle],
) -> tuple[int, int]:
    """Above the box, in its top, below or beside it: where least of labels and small objects is covered."""
    x0, y0, x1, y1 = _rectangle(np.clip(np.nan_to_num(box), 0, [*size, *size]))
    wanted = [(x0, y0 - height), (x0, y0), (x1 - width, y0 - height), (x0, y1), (x1 - width, y1), (x1, y0)]
    wanted += [(x0 - width, y0), (x1 - width, y1 - height), (x0, y0 - 2 * height), (x0, y1 + height)]
    best, least = (0, 0), math.inf
    for order, (x, y) in enumerate(wanted):
        left = round(min(max(x, 0), max(size[0] - width, 0)))
        top = round(min(max(y, 0), max(size[1] - height, 0)))
        chip = (float(left), float(top), float(left + width), float(top + height))
        covered = sum(_common_area(chip, label) for label in labels)
        # An object hidden whole weighs as much as a label hidden whole.
        covered += (
            width * height * sum(_common_area(chip, one) / max(_common_area(one, one), 1) for one in objects)
        )
        # A little preference for the usual place decides between free ones.
        cost = 4 * covered + 0.03 * order * width * height
        if cost < least:
            best, least = (left, top), cost
    return best
