"""Instance masks between the image and the fixed square that a mask head sees."""

from __future__ import annotations

import itertools
from typing import Any, TypeAlias

import numpy as np
import torch
from pycocotools import mask as mask_api
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

Mask: TypeAlias = list[np.ndarray] | Tensor | None
"""One ground-truth mask: polygons (flat ``x0, y0, x1, …``), a bool bitmap ``(H, W)``, or none known."""

PASTE_CHUNK_ELEMENTS = 2**28 // 4


def polygons_to_bitmap(polygons: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """Rasterize the union of polygons as COCO does; bool ``(height, width)``."""
    if not polygons:
        return np.zeros((height, width), dtype=bool)
    rle = mask_api.merge(mask_api.frPyObjects([p.tolist() for p in polygons], height, width))
    return mask_api.decode(rle).astype(bool)


def as_bitmap(mask: Mask, height: int, width: int) -> np.ndarray:
    """A mask of any kind as a bool bitmap ``(height, width)``; one that isn't known is empty."""
    if isinstance(mask, Tensor):
        return mask.numpy()
    return polygons_to_bitmap(mask or [], height, width)


def is_empty(mask: Mask) -> bool:
    """Whether a known mask has nothing in it."""
    if mask is None:
        return False
    return not bool(mask.any()) if isinstance(mask, Tensor) else len(mask) == 0


def bounds(mask: Mask) -> np.ndarray:
    """The box around a mask that isn't empty, xyxy ``(4,)``."""
    if isinstance(mask, Tensor):
        x, y = (np.flatnonzero(mask.numpy().any(axis=axis)) for axis in (0, 1))
        return np.array([x[0], y[0], x[-1] + 1, y[-1] + 1], dtype=np.float64)
    points = np.concatenate([polygon.reshape(-1, 2) for polygon in mask or []])
    return np.concatenate((points.min(axis=0), points.max(axis=0)))


def clip_polygon(polygon: np.ndarray, height: int, width: int) -> list[np.ndarray]:
    """The parts of a polygon (flat ``x0, y0, x1, …``) within an image, flat too.

    By Sutherland and Hodgman's algorithm, which leaves the parts of a concave one joined along the image's edges;
    there they are cut apart. These are the parts of Shapely's ``intersection``, by which Detectron2 crops. Of a
    polygon that crosses itself Detectron2 drops some; here all of it stays.
    """
    points = polygon.reshape(-1, 2)
    if (points >= 0).all() and (points <= (width, height)).all():
        return [polygon]
    for axis, side in ((0, width), (1, height)):
        for limit, sign in ((0.0, 1.0), (float(side), -1.0)):
            before = np.roll(points, 1, axis=0)
            inside, inside_before = (sign * (p[:, axis] - limit) >= 0 for p in (points, before))
            kept = []
            for point, last, here, there in zip(points, before, inside, inside_before):
                if here != there:
                    crossing = last + (limit - last[axis]) / (point[axis] - last[axis]) * (point - last)
                    crossing[axis] = limit
                    kept.append(crossing)
                if here:
                    kept.append(point)
            points = np.array(kept).reshape(-1, 2)
    return _parts(points, height, width)


def _parts(points: np.ndarray, height: int, width: int) -> list[np.ndarray]:
    """A clipped polygon's parts, without what runs along the image's edges forth and back."""
    corners = [(float(x), float(y)) for x, y in points]
    edges = list(zip(corners, corners[1:] + corners[:1]))
    for axis, limit in ((0, 0.0), (0, float(width)), (1, 0.0), (1, float(height))):
        there = [start[axis] == end[axis] == limit for start, end in edges]
        along = [(start[1 - axis], end[1 - axis]) for (start, end), on in zip(edges, there) if on]
        edges = [edge for edge, on in zip(edges, there) if not on]
        for low, high in itertools.pairwise(sorted({stop for edge in along for stop in edge})):
            first, last = ((limit, low), (limit, high)) if axis == 0 else ((low, limit), (high, limit))
            forth = sum(start <= low and high <= end for start, end in along)
            back = sum(end <= low and high <= start for start, end in along)
            edges += [(first, last)] * (forth - back) + [(last, first)] * (back - forth)
    following: dict[tuple[float, float], list[tuple[float, float]]] = {}
    for start, end in edges:
        following.setdefault(start, []).append(end)
    parts = []
    for start in following:
        while following[start]:
            part = [start]
            while (point := following[part[-1]].pop()) != start:
                part.append(point)
            if len(part) >= 3:
                parts.append(np.array(part).reshape(-1))
    return parts


def crop_and_resize(masks: list[Mask], boxes: Tensor, side: int) -> Tensor:
    """The part of each mask inside its box, resampled to a square: the mask head's target.

    Polygons are scaled and then rasterized; bitmaps go through an aligned RoIAlign and a threshold
    of one half. Both as Detectron2's ``PolygonMasks`` and ``BitMasks`` do.

    Args:
        masks: one per box, none of them ``None``.
        boxes: ``(M, 4)``, xyxy pixels.
        side: of the square, in pixels.

    Returns:
        bool ``(M, side, side)``, on the host.
    """
    target = torch.zeros((len(masks), side, side), dtype=torch.bool)
    cpu_boxes = boxes.detach().cpu()
    corners = cpu_boxes.double().numpy()
    bitmaps: dict[int, list[int]] = {}
    for i, mask in enumerate(masks):
        if isinstance(mask, Tensor):
            bitmaps.setdefault(id(mask), []).append(i)
            continue
        assert mask is not None
        x0, y0, x1, y1 = corners[i]
        scale = np.array([side / max(x1 - x0, 0.1), side / max(y1 - y0, 0.1)])
        local = [((p.reshape(-1, 2) - (x0, y0)) * scale).reshape(-1) for p in mask]
        target[i] = torch.from_numpy(polygons_to_bitmap(local, side, side))
    for indices in bitmaps.values():
        bitmap = masks[indices[0]]
        assert isinstance(bitmap, Tensor)
        rois = torch.cat([torch.zeros(len(indices), 1), cpu_boxes[indices].float()], dim=1)
        crops = roi_align(bitmap[None, None].float().cpu(), rois, (side, side), 1.0, 0, aligned=True)
        target[indices] = crops[:, 0] >= 0.5
    return target


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float = 0.5) -> Tensor:
    """Put soft square masks into the image by bilinear sampling at pixel centres.

    Args:
        masks: probabilities ``(N, M, M)``.
        boxes: ``(N, 4)``, xyxy pixels of the image.
        height, width: of the image.

    Returns:
        bool ``(N, height, width)``; on the host, where the device of ``masks`` has no room for them.
    """
    try:
        return _paste_masks(masks, boxes, height, width, threshold)
    except torch.OutOfMemoryError:
        pass
    return _paste_masks(masks.cpu(), boxes.cpu(), height, width, threshold)


def _paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float) -> Tensor:
    pasted = torch.zeros((len(masks), height, width), dtype=torch.bool, device=masks.device)
    if masks.device.type == "cpu":
        for i, box in enumerate(boxes.tolist()):
            left, top = max(int(box[0]) - 1, 0), max(int(box[1]) - 1, 0)
            right, bottom = min(int(np.ceil(box[2])) + 1, width), min(int(np.ceil(box[3])) + 1, height)
            if right > left and bottom > top:
                region = _sample(masks[i : i + 1], boxes[i : i + 1], (left, top, right, bottom))
                pasted[i, top:bottom, left:right] = region[0] >= threshold
        return pasted
    per_chunk = max(1, PASTE_CHUNK_ELEMENTS // (height * width))
    for start in range(0, len(masks), per_chunk):
        chunk = slice(start, start + per_chunk)
        pasted[chunk] = _sample(masks[chunk], boxes[chunk], (0, 0, width, height)) >= threshold
    return pasted


def _sample(masks: Tensor, boxes: Tensor, region: tuple[int, int, int, int]) -> Tensor:
    left, top, right, bottom = region
    x0, y0, x1, y1 = boxes.float().split(1, dim=1)
    xs = torch.arange(left, right, device=boxes.device, dtype=torch.float32) + 0.5
    ys = torch.arange(top, bottom, device=boxes.device, dtype=torch.float32) + 0.5
    xs = (xs - x0) / (x1 - x0) * 2 - 1
    ys = (ys - y0) / (y1 - y0) * 2 - 1
    n, width, height = len(masks), xs.shape[1], ys.shape[1]
    grid = torch.stack((xs[:, None].expand(n, height, width), ys[:, :, None].expand(n, height, width)), 3)
    return F.grid_sample(masks[:, None].float(), grid, align_corners=False)[:, 0]


def decode_rle(segmentation: dict[str, Any]) -> np.ndarray:
    """A compressed COCO RLE to uint8 ``(H, W)``."""
    decoded: np.ndarray = mask_api.decode(segmentation)
    return decoded
