"""From a dataset record to a network input: read, resize, flip, to tensors, as Detectron2's mapper does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from zenith_det.config import CfgNode
from zenith_det.data import DatasetMetadata, read_image
from zenith_det.engines.augmentation import Augmentations, Labels
from zenith_det.engines.torchvision_engine.masks import (
    Mask,
    as_bitmap,
    bounds,
    clip_polygon,
    decode_rle,
    is_empty,
    polygons_to_bitmap,
)
from zenith_det.engines.torchvision_engine.roi_heads import Targets
from zenith_det.training.course.seeding import seeded

MIN_BOX_SIDE = 1e-5


@dataclass(frozen=True)
class Geometry:
    """Perhaps a crop, a resize to ``height`` × ``width`` pixels, then perhaps a flip.

    Attributes:
        scale_x, scale_y: of the resize.
        height, width: what comes out.
        flip: "horizontal", "vertical" or "none".
        crop: left, top, right and bottom in the original image; ``None``: all of it.
    """

    scale_x: float
    scale_y: float
    height: int
    width: int
    flip: str
    crop: tuple[int, int, int, int] | None = None

    def points(self, xy: np.ndarray) -> np.ndarray:
        """Map continuous points ``(M, 2)`` of the original image."""
        moved = (xy - self.crop[:2] if self.crop else xy) * (self.scale_x, self.scale_y)
        if self.flip == "horizontal":
            moved[:, 0] = self.width - moved[:, 0]
        elif self.flip == "vertical":
            moved[:, 1] = self.height - moved[:, 1]
        return moved

    def image(self, pixels: np.ndarray, resample: Image.Resampling) -> np.ndarray:
        """Map an image ``(H, W)`` or ``(H, W, C)``, contiguous; one of floats as Detectron2 does, without a filter."""
        if self.crop:
            left, top, right, bottom = self.crop
            pixels = np.ascontiguousarray(pixels[top:bottom, left:right])
        if pixels.shape[:2] != (self.height, self.width):
            pixels = _resized(pixels, self.height, self.width, resample)
        if self.flip == "horizontal":
            pixels = pixels[:, ::-1]
        elif self.flip == "vertical":
            pixels = pixels[::-1]
        return np.ascontiguousarray(pixels)


def _resized(pixels: np.ndarray, height: int, width: int, resample: Image.Resampling) -> np.ndarray:
    if pixels.dtype == np.uint8:
        one = pixels.ndim == 3 and pixels.shape[2] == 1
        image = Image.fromarray(pixels[:, :, 0] if one else pixels).resize((width, height), resample)
        return np.array(image)[:, :, None] if one else np.asarray(image)
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return (
        F.interpolate(planes, (height, width), mode="bilinear", align_corners=False)[0]
        .permute(1, 2, 0)
        .numpy()
    )


def image_tensor(pixels: np.ndarray) -> torch.Tensor:
    """``(C, H, W)``, uint8 or float32, of pixels ``(H, W, C)``."""
    tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    return tensor.float() if tensor.is_floating_point() else tensor


def shortest_edge_size(height: int, width: int, short: int, longest: int) -> tuple[int, int]:
    """The (height, width) that brings the short side to ``short`` unless the long one passed ``longest``.

    Detectron2's rounding (``ResizeShortestEdge.get_output_shape``), with sides of a pixel at least; ``short = 0``
    keeps the size.
    """
    if short == 0:
        return height, width
    scale = short / min(height, width)
    new_height, new_width = (short, scale * width) if height < width else (scale * height, short)
    if max(new_height, new_width) > longest:
        shrink = longest / max(new_height, new_width)
        new_height, new_width = new_height * shrink, new_width * shrink
    return max(int(new_height + 0.5), 1), max(int(new_width + 0.5), 1)


def crop_size(
    kind: str, size: Sequence[float], height: int, width: int, rng: np.random.Generator
) -> tuple[int, int]:
    """The (height, width) of a crop under ``INPUT.CROP``, by the rules of Detectron2's ``RandomCrop``.

    Args:
        kind: ``INPUT.CROP.TYPE``.
        size: ``INPUT.CROP.SIZE``.
        height, width: of the image.
    """
    first, second = size
    if kind == "absolute":
        return min(int(first), height), min(int(second), width)
    if kind == "absolute_range":
        low, high = int(first), int(second)
        return (
            int(rng.integers(min(height, low), min(height, high) + 1)),
            int(rng.integers(min(width, low), min(width, high) + 1)),
        )
    if kind == "relative_range":
        first, second = np.asarray(size) + rng.random(2) * (1 - np.asarray(size))
    return max(int(height * first + 0.5), 1), max(int(width * second + 0.5), 1)


class TrainingMapper:
    """A record to a training sample; random choices come from the generator it is given."""

    def __init__(self, cfg: CfgNode, metadata: DatasetMetadata) -> None:
        sizes = cfg.INPUT.MIN_SIZE_TRAIN
        self.short_sides = (sizes,) if isinstance(sizes, int) else tuple(sizes)
        self.sampling = cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
        self.longest = cfg.INPUT.MAX_SIZE_TRAIN
        self.flip = cfg.INPUT.RANDOM_FLIP
        self.image_format = cfg.INPUT.FORMAT
        self.masks = cfg.MODEL.MASK_ON
        self.bitmask = cfg.INPUT.MASK_FORMAT == "bitmask"
        self.keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON else 0
        self.flip_indices = metadata.keypoint_flip_indices
        self.crop = (cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE) if cfg.INPUT.CROP.ENABLED else None
        self.augmentations = (
            Augmentations(cfg.INPUT.AUGMENTATIONS, cfg.INPUT.FORMAT, self.flip_indices)
            if cfg.INPUT.AUGMENTATIONS
            else None
        )

    def __call__(self, record: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """The sample: ``image`` (see :func:`image_tensor`), ``targets``, ``image_id``, ``file_name``."""
        # First, so that the augmentations of either engine draw alike.
        seed = int(rng.integers(2**63)) if self.augmentations else 0
        image = read_image(record["file_name"], self.image_format, record.get("value_range"))
        geometry = self._draw(image.shape[0], image.shape[1], rng)
        pixels = geometry.image(image, Image.Resampling.BILINEAR)
        tensor = image_tensor(pixels)
        targets = self.targets(record, geometry)
        if self.augmentations:
            with seeded(seed):
                size = geometry.height, geometry.width
                tensor, moved = self.augmentations(tensor, lambda: _labels(targets, *size))
            if moved is not None:
                targets = _moved(targets, moved)
        return {
            "image": tensor,
            "targets": targets,
            "image_id": record["image_id"],
            "file_name": record["file_name"],
        }

    def _draw(self, height: int, width: int, rng: np.random.Generator) -> Geometry:
        crop = None
        if self.crop:
            crop_height, crop_width = crop_size(*self.crop, height, width, rng)
            top = int(rng.integers(height - crop_height + 1))
            left = int(rng.integers(width - crop_width + 1))
            crop = (left, top, left + crop_width, top + crop_height)
            height, width = crop_height, crop_width
        if self.sampling == "range":
            short = int(rng.integers(self.short_sides[0], self.short_sides[1] + 1))
        else:
            short = int(rng.choice(self.short_sides))
        flip = self.flip if self.flip != "none" and rng.random() < 0.5 else "none"
        new_height, new_width = shortest_edge_size(height, width, short, self.longest)
        return Geometry(new_width / width, new_height / height, new_height, new_width, flip, crop)

    def targets(self, record: dict[str, Any], geometry: Geometry) -> Targets:
        """Boxes clipped to the image, masks and keypoints under ``geometry``; crowds and empty ones left out."""
        boxes, classes, masks, keypoints = [], [], [], []
        limit = np.array([geometry.width, geometry.height] * 2, dtype=np.float64)
        for annotation in record["annotations"]:
            if annotation.get("iscrowd", 0):
                continue
            x, y, w, h = annotation["bbox"]
            corners = geometry.points(np.array([[x, y], [x + w, y + h]], dtype=np.float64))
            box = np.concatenate((corners.min(axis=0), corners.max(axis=0))).clip(0, limit)
            mask = self._mask(annotation.get("segmentation"), geometry) if self.masks else None
            if geometry.crop and mask is not None and not is_empty(mask):
                box = bounds(mask)
            if (box[2:] - box[:2] <= MIN_BOX_SIDE).any() or is_empty(mask):
                continue
            boxes.append(box)
            classes.append(annotation["category_id"])
            masks.append(mask)
            if self.keypoints:
                keypoints.append(self._keypoints(annotation.get("keypoints"), geometry))
        count = len(boxes)
        return Targets(
            boxes=torch.from_numpy(np.array(boxes, dtype=np.float32).reshape(count, 4)),
            classes=torch.tensor(classes, dtype=torch.int64),
            masks=masks if self.masks else None,
            keypoints=torch.from_numpy(
                np.array(keypoints, dtype=np.float32).reshape(count, self.keypoints, 3)
            )
            if self.keypoints
            else None,
        )

    def _mask(self, segmentation: Any, geometry: Geometry) -> Mask:
        if not segmentation:
            return None
        if isinstance(segmentation, dict):
            bitmap = geometry.image(decode_rle(segmentation), Image.Resampling.NEAREST)
            return torch.from_numpy(bitmap.astype(bool))
        polygons = [
            geometry.points(np.array(p, dtype=np.float64).reshape(-1, 2)).reshape(-1) for p in segmentation
        ]
        if geometry.crop:
            polygons = [
                part
                for polygon in polygons
                for part in clip_polygon(polygon, geometry.height, geometry.width)
            ]
        if self.bitmask:
            return torch.from_numpy(polygons_to_bitmap(polygons, geometry.height, geometry.width))
        return polygons

    def _keypoints(self, flat: Sequence[float] | None, geometry: Geometry) -> np.ndarray:
        if flat is None or len(flat) == 0:
            return np.zeros((self.keypoints, 3))
        points: np.ndarray = np.array(flat, dtype=np.float64).reshape(-1, 3)
        points[:, :2] = geometry.points(points[:, :2])
        inside = ((points[:, :2] >= 0) & (points[:, :2] <= (geometry.width, geometry.height))).all(axis=1)
        points[~inside, 2] = 0
        if geometry.flip == "horizontal":
            points = points[self.flip_indices]
        points[points[:, 2] == 0] = 0
        return points


def _labels(targets: Targets, height: int, width: int) -> Labels:
    """What augmentations move, for an image of this size."""
    masks = known = None
    if targets.masks is not None:
        bitmaps = [as_bitmap(mask, height, width) for mask in targets.masks]
        masks = torch.from_numpy(np.array(bitmaps, dtype=bool).reshape(-1, height, width))
        known = torch.tensor([mask is not None for mask in targets.masks], dtype=torch.bool)
    return Labels(targets.boxes, masks, known, targets.keypoints)


def _moved(targets: Targets, moved: Labels) -> Targets:
    masks: list[Mask] | None = None
    if moved.masks is not None and moved.has_mask is not None:
        masks = [mask if known else None for mask, known in zip(moved.masks, moved.has_mask.tolist())]
    return Targets(moved.boxes, targets.classes[moved.kept], masks, moved.keypoints)


class TestMapper:
    """A record to an inference sample: resized by ``MIN_SIZE_TEST``, with the original size beside it."""

    __test__ = False

    def __init__(self, cfg: CfgNode) -> None:
        self.short = cfg.INPUT.MIN_SIZE_TEST
        self.longest = cfg.INPUT.MAX_SIZE_TEST
        self.image_format = cfg.INPUT.FORMAT

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """The sample: ``image`` (see :func:`image_tensor`), ``height``, ``width``, ``image_id``, ``file_name``."""
        sample = self.from_image(
            read_image(record["file_name"], self.image_format, record.get("value_range"))
        )
        return sample | {"image_id": record["image_id"], "file_name": record["file_name"]}

    def from_image(self, image: np.ndarray) -> dict[str, Any]:
        """The same for pixels already read, ``(H, W, C)`` in ``INPUT.FORMAT``."""
        height, width = image.shape[:2]
        new_height, new_width = shortest_edge_size(height, width, self.short, self.longest)
        geometry = Geometry(new_width / width, new_height / height, new_height, new_width, "none")
        pixels = geometry.image(image, Image.Resampling.BILINEAR)
        return {
            "image": image_tensor(pixels),
            "height": height,
            "width": width,
        }
